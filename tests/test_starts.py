"""What `train.py --init-only --start` writes is what `sample.py` draws; and tables with every column."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import sample
import train
from errors import InputError
from models.families.stable_diffusion import StableDiffusion
from scripts import show_solver
from solvers import EPDTable
from tests.tiny_pipeline import save_tiny_pipeline
from training.distillation_options import load_options
from training.distillation_run import untrained_table
from training.ppo.assembly import start_from_snapshot
from training.ppo.config import SCHEMA
from training.ppo.figures import solver_figure
from training.snapshot import find_snapshot, load_snapshot, private_parts, save_snapshot
from training.starts import needs_grid

REPOSITORY = Path(__file__).resolve().parents[1]
STARTS = [("ddim", 0), ("ipndm", 0), ("ipndm:2", 0), ("dpmpp:2", 0), ("dpmpp", 0), ("dpm2", 1)]
METADATA = {"dataset_name": "tiny", "guidance_rate": 3.0, "schedule_type": "polynomial", "schedule_rho": 4.0}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def run(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def drawn(folder, pipeline, *arguments):
    """Pixels of one image, and its record."""
    common = ("--model_path", pipeline, "--prompt", "a dog", "--seeds", 5, "--device", "cpu", "--outdir", folder)
    result = run(sample.main, *arguments, *common)
    assert result.exit_code == 0, result.output
    [picture] = folder.glob("*.png")
    return np.array(Image.open(picture)).astype(int), json.loads((folder / "images.jsonl").read_text())


def full_table(guidance=2.0):
    """Every column, two points, three intervals."""
    draw = torch.Generator().manual_seed(1)
    rows = {name: 0.8 + 0.1 * torch.rand(3, 2, generator=draw, dtype=torch.float64) for name in ("a", "b", "c")}
    lower = torch.tril(torch.rand(3, 3, generator=draw, dtype=torch.float64), -1)
    return EPDTable(
        torch.tensor([[0.3, 0.7]] * 3, dtype=torch.float64),
        torch.tensor([[0.6, 0.4]] * 3, dtype=torch.float64),
        scale_dir=rows["a"],
        scale_time=rows["b"],
        guidance=torch.full((3, 3), guidance, dtype=torch.float64),
        history=-0.2 * lower,
        direction_history=0.1 * lower,
    )


@pytest.mark.parametrize(("start", "points"), STARTS)
def test_a_start_draws_what_its_sampler_draws(pipeline, tmp_path, start, points):
    shape = ("--num_steps", 5, "--num_points", points, "--schedule_type", "polynomial", "--schedule_rho", 3)
    made = run(
        train.main,
        *("--dataset_name", "tiny", "--model_path", pipeline, "--init-only", "--start", start, "--outdir", tmp_path),
        *shape,
    )
    assert made.exit_code == 0, made.output
    table, table_record = drawn(tmp_path / "table", pipeline, "--predictor_path", next(tmp_path.glob("00000-*")))
    sampler, sampler_record = drawn(
        tmp_path / "sampler", pipeline, "--solver", start, "--num-steps", 5, "--schedule", "polynomial:3"
    )
    assert np.abs(table - sampler).max() <= 1
    assert table.std() > 5
    for cost in ("parallel_evaluations", "total_evaluations", "guidance", "num_steps"):
        assert table_record[cost] == sampler_record[cost]


def test_the_start_that_is_shipped_for_stable_diffusion_is_what_its_options_write():
    file = find_snapshot(REPOSITORY / "exps/00006-ms_coco-11-20-epd-near_euler-discrete")
    options = load_options(file.parent)
    table, metadata = load_snapshot(file)
    assert needs_grid(options.start, options.num_points) is False
    written = untrained_table(options, None)
    assert table.columns().keys() == written.columns().keys()
    assert all(torch.equal(table.columns()[name], written.columns()[name]) for name in table.columns())
    said = options.metadata(None)
    assert said["guidance_rate"] == 7.5
    assert {key: metadata[key] for key in said} == said
    assert file.parent.name.partition("-")[2] == options.description


@pytest.mark.parametrize(
    ("start", "points", "message"),
    [
        ("heun", 0, "heun is no table"),
        ("ddim", 2, "needs --num_points 0, not 2"),
        ("dpm2", 0, "needs --num_points 1, not 0"),
        ("near_euler", 0, "needs --num_points 1 or more"),
        ("dpmpp:7", 0, "the orders of dpmpp are 1, 2, 3"),
        ("euler", 0, "unknown solver 'euler'"),
    ],
)
def test_a_start_that_is_none_is_refused_and_leaves_no_folder(tmp_path, start, points, message):
    result = run(
        train.main,
        *("--dataset_name", "shapes", "--init-only", "--start", start, "--num_points", points, "--outdir", tmp_path),
    )
    assert result.exit_code == 2
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_plug_in_for_ipndm_has_points_and_a_history_of_directions(tmp_path):
    made = run(
        train.main,
        *("--dataset_name", "shapes", "--init-only", "--start", "ipndm:2", "--num_points", 2, "--outdir", tmp_path),
    )
    assert made.exit_code == 0, made.output
    table, _ = load_snapshot(next(tmp_path.glob("*/network-snapshot-000000.json")))
    assert table.direction_history.tolist() == [[0, 0, 0], [-0.5, 0, 0], [0, -0.5, 0]]
    assert table.num_points == 2


@pytest.mark.parametrize("points", [0, 2])
def test_every_column_and_a_grid_of_its_own_survive_the_file_exactly(tmp_path, points):
    table = full_table()
    if points == 0:
        empty = torch.empty(3, 0, dtype=torch.float64)
        table = EPDTable(empty, empty, guidance=table.guidance[:, :1], history=table.history)
    metadata = {**METADATA, "sigmas": [14.0, 3.1, 0.7, 0.03]}
    path = save_snapshot(tmp_path / "network-snapshot-000001", table, metadata)
    assert path.suffix == ".json"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    found, described = load_snapshot(path)
    assert found.columns().keys() == table.columns().keys()
    for name, entries in table.columns().items():
        assert torch.equal(found.columns()[name], entries)
    assert {key: described[key] for key in metadata} == metadata


def test_a_table_that_the_public_code_cannot_hold_replaces_the_pickle_of_one_that_it_can(tmp_path):
    table = full_table()
    public = EPDTable(table.positions, table.weights, table.scale_dir, table.scale_time)
    assert private_parts(public, METADATA) == []
    assert save_snapshot(tmp_path / "one", public, METADATA).suffix == ".pkl"
    assert save_snapshot(tmp_path / "one", table, METADATA).suffix == ".json"
    assert not (tmp_path / "one.pkl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "has version 3; this RLEPD reads versions 1 and 2"),
        ({"curvature": [[0.0]]}, "a column 'curvature', which this RLEPD (version 2) does not know"),
        ({"history": [[0, 0, 0], [0, 0.5, 0], [0, 0, 0]]}, "history must be strictly lower triangular"),
        ({"guidance": [[1, 1, -1]] * 3}, "guidance must be at least 0; entry [0, 2] is -1"),
        ({"guidance": [[1, 1]] * 3}, "guidance has shape [3, 2]"),
        ({"r": [[]] * 3}, "weights has shape [3, 2], positions have [3, 0]"),
        ({"metadata": {"sigmas": [14.0, 3.0, 3.0, 0.1]}}, "each below the one before"),
        ({"metadata": {"sigmas": [14.0, 3.0, 0.1]}}, "sigmas must be num_steps=4 positive numbers"),
        ({"metadata": {"sigmas": "falling"}}, "sigmas must be a list of numbers"),
    ],
)
def test_what_is_no_solver_is_refused_in_a_line(tmp_path, changes, message):
    path = save_snapshot(tmp_path / "table", full_table(), METADATA)
    described = json.loads(path.read_text())
    del described["sha256"]  # edited on purpose
    path.write_text(json.dumps({**described, **changes}))
    with pytest.raises(InputError) as caught:
        load_snapshot(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_guidance_by_evaluation_reaches_the_network(pipeline, tmp_path):
    """A column of one scale draws what that constant draws, and other scales draw something else."""
    table = full_table(guidance=3.0)
    constant = {name: entries for name, entries in table.columns().items() if name != "guidance"}
    folders = {}
    for name, variant in (
        ("column", table),
        ("constant", EPDTable(**constant)),
        ("other", full_table(guidance=1.0)),
    ):
        file = save_snapshot(tmp_path / name / "network-snapshot-000001", variant, METADATA)
        folders[name], record = drawn(tmp_path / name / "images", pipeline, "--predictor_path", file)
        assert record["guidance"] == (3.0 if name == "constant" else None)
    assert np.abs(folders["column"] - folders["constant"]).max() <= 1
    assert np.abs(folders["column"] - folders["other"]).max() > 3
    refused = run(
        sample.main,
        *("--predictor_path", tmp_path / "column", "--model_path", pipeline, "--prompt", "a dog"),
        *("--guidance", 2, "--outdir", tmp_path / "none"),
    )
    assert refused.exit_code == 2
    assert "has a scale of its own for each evaluation" in refused.output


def test_an_evaluation_at_guidance_1_takes_one_row(pipeline, tmp_path, monkeypatch):
    table = full_table()
    guidance = table.guidance.clone()
    guidance[1] = 1.0
    table = EPDTable(**{**table.columns(), "guidance": guidance})
    file = save_snapshot(tmp_path / "network-snapshot-000001", table, METADATA)
    rows = []
    predict = StableDiffusion._predict

    def counted(self, *arguments):
        handle = self.network.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
        try:
            return predict(self, *arguments)
        finally:
            handle.remove()

    monkeypatch.setattr(StableDiffusion, "_predict", counted)
    drawn(tmp_path / "images", pipeline, "--predictor_path", file)
    assert rows == [2, 4, 1, 2, 2, 4]
    assert sum(rows) == table.evaluations().rows


def test_a_grid_of_its_own_is_used_unless_a_schedule_is_named(pipeline, tmp_path):
    sigmas = [14.0, 5.0, 1.0, 0.05]
    empty = torch.empty(3, 0, dtype=torch.float64)
    own = save_snapshot(tmp_path / "own", EPDTable(empty, empty), {**METADATA, "sigmas": sigmas})
    named = save_snapshot(tmp_path / "named", EPDTable(empty, empty), METADATA)
    pictures = {
        "own": drawn(tmp_path / "1", pipeline, "--predictor_path", own),
        "named": drawn(tmp_path / "2", pipeline, "--predictor_path", named),
        "overridden": drawn(tmp_path / "3", pipeline, "--predictor_path", own, "--schedule", "polynomial:4"),
    }
    assert [pictures[name][1]["schedule"] for name in pictures] == ["own", "polynomial:4", "polynomial:4"]
    assert np.array_equal(pictures["named"][0], pictures["overridden"][0])
    assert not np.array_equal(pictures["named"][0], pictures["own"][0])


def test_ppo_begins_at_every_column_of_its_start(tmp_path):
    file = save_snapshot(tmp_path / "table", full_table(), METADATA)
    loaded = SCHEMA.build(
        {
            "data": {"predictor_snapshot": str(file), "prompt_csv": "p.csv"},
            "reward": {"weights_path": "w.pt"},
            "logging": {"eval_interval": 0},
        },
        "x.yaml",
    )
    start = start_from_snapshot(loaded)
    assert start.table.columns().keys() == full_table().columns().keys()
    for name, entries in full_table().columns().items():
        torch.testing.assert_close(start.table.columns()[name], entries, rtol=0, atol=1e-12)
    assert start.notes == ()


@pytest.mark.parametrize("own_grid", [True, False])
def test_a_solver_is_described_and_drawn_without_its_model(tmp_path, own_grid):
    metadata = {**METADATA, **({"sigmas": [14.0, 5.0, 1.0, 0.05]} if own_grid else {})}
    file = save_snapshot(tmp_path / "00007-x" / "network-snapshot-000001", full_table(), metadata)
    result = run(show_solver.main, file, "--beside", file, "--output", tmp_path / "solver.png")
    assert result.exit_code == 0, result.output
    assert "3 intervals of 2 points: 6 evaluations in sequence, 9 in all, 18 network rows" in result.output
    assert ("its own noise levels" if own_grid else "schedule polynomial:4") in result.output
    assert "guidance [2 2 2]" in result.output
    assert ("sigma  14.0000 to   5.0000" in result.output) == own_grid
    assert Image.open(tmp_path / "solver.png").size[0] > 500


def test_beside_a_guidance_column_a_constant_guidance_is_drawn(tmp_path, monkeypatch):
    figures = []

    def drawn_figure(*drawn):
        figures.append(solver_figure(*drawn))
        return figures[-1]

    monkeypatch.setattr(show_solver, "solver_figure", drawn_figure)
    column = save_snapshot(tmp_path / "column", full_table(2.0), METADATA | {"guidance_rate": None})
    constant = save_snapshot(tmp_path / "constant", replace(full_table(), guidance=None), METADATA)
    for one, other in ((column, constant), (constant, column), (constant, constant)):
        result = run(show_solver.main, one, "--beside", other, "--output", tmp_path / "solver.png")
        assert result.exit_code == 0, result.output
    heights = [
        [[bar.get_height() for bar in bars] for axes in figure.axes for bars in axes.containers] for figure in figures
    ]
    assert heights == [[[2.0] * 3] * 3 + [[3.0] * 3] * 3, [[3.0] * 3] * 3 + [[2.0] * 3] * 3, []]
    colours = [bars[0].get_facecolor() for bars in figures[0].axes[1].containers]
    assert [alpha for *_, alpha in colours] == [1, 1, 1, 0, 0, 0]  # hollow


def test_a_figure_shows_points_where_the_sampler_asks():
    sigmas = torch.tensor([16.0, 1.0], dtype=torch.float64)
    table = EPDTable(
        torch.tensor([[0.5, 0.75]], dtype=torch.float64), torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    )
    discs = solver_figure(("x", sigmas, table)).axes[0].collections[-1]
    assert discs.get_offsets()[:, 0].tolist() == pytest.approx([4.0, 2.0])
    assert discs.get_sizes()[1] == pytest.approx(3 * discs.get_sizes()[0])


def test_a_figure_writes_out_what_a_solver_recalls():
    none = torch.zeros(2, 0, dtype=torch.float64)
    history = torch.tensor([[0.0, 0.0], [-0.381, 0.0]], dtype=torch.float64)
    drawn = solver_figure(
        ("x", torch.tensor([9.0, 3.0, 1.0], dtype=torch.float64), EPDTable(none, none, history=history))
    )
    [entry] = drawn.axes[-1].texts
    assert (entry.get_text(), entry.get_position()) == ("-0.38", (0, 1))
