"""The functions below the nodes for ComfyUI, called as ComfyUI calls samplers, against our own sampler."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from integrations.comfyui.epd import GUIDANCE, Solver, guided_by_row, read_solver, sample_epd
from models import load_denoiser
from models.generate import initial_noise
from solvers import EPDSteps, EPDTable
from tests.test_diffusers_scheduler import CPU, SEEDS, SIGMAS, TABLES, scheduler_of, solver_of
from training.snapshot import save_snapshot

PROMPTS = ["a large red star on a white background", "a small cyan ring on a black background"]
SCALE = 3.0


@pytest.fixture(scope="module")
def shapes():
    return load_denoiser("shapes", device=CPU, dtype=torch.float32)


def solver_in(folder: Path, table: EPDTable, **config: Any) -> Solver:
    file = folder / "solver.json"
    file.write_text(scheduler_of(table, **config).to_json_string())
    return read_solver(file)


class ComfyModel:
    """The denoised estimate as ComfyUI's samplers get it: conditionings of B rows, repeated as a whole."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser, self.rows, self.guided = denoiser, [], []
        self.text = denoiser.encode(PROMPTS, SCALE)

    def __call__(self, x: Tensor, sigma: Tensor, *, model_options: dict[str, Any], seed: int) -> Tensor:
        assert (sigma.shape, sigma.dtype, seed) == ((len(x),), torch.float32, 5)
        self.rows.append(len(x))
        scales, options = SCALE, model_options
        if GUIDANCE in model_options:
            scales, options = guided_by_row(model_options)
            self.guided.append(model_options[GUIDANCE])
        texts = (part["encoder_hidden_states"] for part in (self.text.unconditional, self.text.text))
        estimates = [self._estimate(x, sigma, rows) for rows in texts]
        arguments = dict(zip(("uncond", "cond"), (x - estimate for estimate in estimates), strict=True))
        if "sampler_cfg_function" in options:  # on x - D, as ComfyUI has it
            return x - options["sampler_cfg_function"]({**arguments, "cond_scale": scales})
        return torch.lerp(*estimates, scales)

    def _estimate(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """D with the text of rows that are repeated as a whole."""
        levels = sigma.double()
        norm = (1 + levels**2).sqrt().float().view(-1, 1, 1, 1)
        timesteps = self.denoiser.process.network_time(levels).float()
        text = text.repeat(len(x) // len(text), 1, 1)
        return x - sigma.view(-1, 1, 1, 1) * self.denoiser.network(x / norm, timesteps, text, return_dict=False)[0]


EXTRA = {"model_options": {"transformer_options": {}}, "seed": 5}


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
@pytest.mark.parametrize("name", ["three points", "no points, history", "all columns"])
def test_the_shapes_model_draws_what_our_sampler_draws(shapes, tmp_path: Path, name: str, at_once: bool) -> None:
    table, model = TABLES[name], ComfyModel(shapes)
    solver, seen = solver_in(tmp_path, table), []
    noise = initial_noise(SEEDS, shapes.latent_shape, device=CPU, dtype=torch.float32)
    sigmas = torch.tensor(solver.sigmas)
    latents = sample_epd(
        model, noise * SIGMAS[0].item(), sigmas, EXTRA, seen.append, True, solver=solver, at_once=at_once
    )
    ours = solver_of(table, guidance_scale=None if table.guidance is not None else SCALE).latents(
        shapes, PROMPTS, SEEDS
    )
    torch.testing.assert_close(latents, ours, rtol=0, atol=1e-4)
    points = [2] * table.num_points if not at_once else [2 * table.num_points] * bool(table.num_points)
    assert model.rows == [2, *points] * 3
    assert [(step["i"], float(step["sigma"]), step["x"].shape) for step in seen] == [
        (i, pytest.approx(float(SIGMAS[i])), noise.shape) for i in range(3)
    ]


def cosine(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
    """An estimate that depends on the row's level, and on what else is said."""
    sigma = sigma.double().view(-1, 1, 1, 1)
    scales = extra.get("model_options", {}).get(GUIDANCE)
    weight = 1.0 if scales is None else torch.tensor(scales).double().view(-1, 1, 1, 1)
    return x / (1 + sigma**2) + 0.3 * weight * (x / (1 + sigma**2).sqrt()).cos()


def ours_from(start: int, table: EPDTable, x: Tensor) -> Tensor:
    """The states of our sampler from the start of an interval to the end."""

    def denoise(x: Tensor, sigma: Tensor, *guidance: Tensor) -> Tensor:
        told = {"model_options": {GUIDANCE: guidance[0].tolist()}} if guidance else {}
        return cosine(x, sigma.expand(len(x)), **told)

    steps = EPDSteps(denoise, table, SIGMAS, x)
    for i in range(start, len(steps)):
        x = steps.interval(i, x)
    return x


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("start", "at_once"), [(0, True), (0, False), (1, True)])
def test_every_column_steps_as_ours_does_and_from_the_middle_too(
    tmp_path: Path, name: str, start: int, at_once: bool
) -> None:
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64) * SIGMAS[start]
    solver = solver_in(tmp_path, TABLES[name])
    sigmas = torch.tensor(solver.sigmas[start:])
    result = sample_epd(cosine, x, sigmas, disable=True, solver=solver, at_once=at_once)
    torch.testing.assert_close(result, ours_from(start, TABLES[name], x), rtol=1e-6, atol=1e-6)


def test_what_is_masked_is_asked_point_by_point(tmp_path: Path) -> None:
    """A mask, and the image below it, have a row for each image, and not for each point."""
    asked = []

    def model(x: Tensor, sigma: Tensor, denoise_mask: Tensor) -> Tensor:
        asked.append(len(x))
        return x * denoise_mask

    solver = solver_in(tmp_path, TABLES["three points"])
    extra = {"denoise_mask": torch.ones(2, 1, 4, 4)}
    sample_epd(model, torch.randn(2, 4, 4, 4), torch.tensor(solver.sigmas), extra, disable=True, solver=solver)
    assert asked == [2] * 12


@pytest.mark.parametrize(
    ("scales", "one"), [([2.0, 2.0], 2.0), ([1.0, 1.0], 1.0), ([1.0, 3.0], 3.0), ([0.0, 0.5], 0.0), ([1.0, 0.5], 0.5)]
)
@pytest.mark.parametrize("own", [True, False], ids=["its own rule", "the usual rule"])
def test_each_row_is_guided_at_its_own_scale(scales: list[float], one: float, own: bool) -> None:
    def halved(arguments: dict[str, Any]) -> Tensor:  # a node's own rule of guidance
        return 0.5 * arguments["uncond"] + (arguments["cond"] - arguments["uncond"]) * arguments["cond_scale"]

    options = {GUIDANCE: scales, **({"sampler_cfg_function": halved} if own else {})}
    scale, rule = guided_by_row(options)
    assert scale == one
    with_text, without = torch.randn(2, 2, 4, 3, 3)
    rows = torch.tensor(scales).view(2, 1, 1, 1)
    arguments = {"cond": with_text, "uncond": without, "cond_scale": scale}
    if "sampler_cfg_function" in rule:
        found = rule["sampler_cfg_function"](arguments)
    else:  # as ComfyUI does
        found = without + scale * (with_text - without)
    expected = (0.5 if own else 1.0) * without + rows * (with_text - without)
    torch.testing.assert_close(found, expected)
    assert options[GUIDANCE] is scales


class Guider:
    """ComfyUI's, without what it does."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def set_conds(self, positive: Any, negative: Any) -> None: ...

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg


@pytest.mark.parametrize("embedded", [True, False])
def test_a_model_that_is_told_its_guidance_is_not_guided_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: bool
) -> None:
    """Of ComfyUI there is as little as the nodes need."""
    io = Mock(ComfyNode=object, NodeOutput=lambda *outputs: outputs)
    for name, content in {
        "comfy": {},
        "comfy.samplers": {"KSAMPLER": object, "CFGGuider": Guider},
        "comfy_api": {},
        "comfy_api.latest": {"ComfyExtension": object, "io": io},
        "folder_paths": {},
    }.items():
        monkeypatch.setitem(sys.modules, name, Mock(**content))
    sys.modules["comfy"].samplers = sys.modules["comfy.samplers"]
    monkeypatch.delitem(sys.modules, "integrations.comfyui.nodes", raising=False)
    nodes = importlib.import_module("integrations.comfyui.nodes")
    monkeypatch.delitem(sys.modules, "integrations.comfyui.nodes")
    model = Mock()
    model.model.model_config.unet_config = {"guidance_embed": embedded}  # as ComfyUI says it of FLUX [dev], [schnell]
    asked = (model, [], [], solver_in(tmp_path, TABLES["one point"], guidance_scale=3.5), 7.5)
    if embedded:
        with pytest.raises(ValueError, match="told its guidance: set the solver's scale with FluxGuidance"):
            nodes.EPDGuiderNode.execute(*asked)
    else:
        (guider,) = nodes.EPDGuiderNode.execute(*asked)
        assert (guider.model, guider.cfg) == (model, 3.5)


# ---------------------------------------------------------------------------------------------------------- files


def test_reads_exports_and_snapshots_alike(tmp_path: Path) -> None:
    table = TABLES["all columns"]
    save_snapshot(tmp_path / "snapshot", table, {"sigmas": SIGMAS.tolist(), "guidance_rate": 4.0})
    snapshot, export = read_solver(tmp_path / "snapshot.json"), solver_in(tmp_path, table, guidance_scale=4.0)
    for name in ("sigmas", "guidance", "history", "direction_history", "guidance_scale"):
        assert getattr(snapshot, name) == getattr(export, name)
    for name in ("positions", "weights", "scale_dir", "scale_time"):
        assert torch.equal(getattr(snapshot, name), getattr(table, name))
        assert torch.equal(getattr(export, name), getattr(table, name))


def test_a_snapshot_in_which_a_digit_flipped_is_refused(tmp_path: Path) -> None:
    save_snapshot(tmp_path / "snapshot", TABLES["all columns"], {"sigmas": SIGMAS.tolist(), "guidance_rate": 4.0})
    file = tmp_path / "snapshot.json"
    file.write_text(file.read_text().replace('"guidance_rate": 4.0', '"guidance_rate": 6.0'))
    with pytest.raises(ValueError, match=r"snapshot\.json: is damaged: its content is not that of its sha256"):
        read_solver(file)


GOOD = {"sigmas": [3.0, 1.0], "positions": [[0.5]], "weights": [[1.0]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "solver.json: Expecting property name"),
        ("[1]", "holds no solver"),
        ({"r": [[0.5]], "w": [[1.0]], "metadata": {"schedule_type": "discrete"}}, "does not list all its numbers"),
        ({**GOOD, "sampler_stu": "ipndm"}, "does not list all its numbers"),
        ({**GOOD, "afs": True}, "takes its first direction without asking"),
        ({**GOOD, "sigmas": [1.0]}, "at least two positive numbers"),
        ({**GOOD, "sigmas": ["a", "b"]}, "holds no solver"),
        ({**GOOD, "weights": [["a"]]}, "weights must be 1 rows of 1 numbers"),
        ({**GOOD, "weights": [[math.nan]]}, "weights must be 1 rows of 1 numbers"),
        ({**GOOD, "weights": [[True]]}, "weights must be 1 rows of 1 numbers"),
        ({**GOOD, "scale_dir": [[math.inf]]}, "scale_dir must be 1 rows of 1 numbers"),
        ({**GOOD, "sigmas": [10**400, 1]}, "holds no solver"),
        ({**GOOD, "guidance_scale": "7.5"}, "its guidance scale '7.5' is no finite number"),
        ({**GOOD, "version": 3, "a column of later days": [[1.0]]}, "has version 3, of a later RLEPD"),
        ({"metadata": 1}, "holds no solver"),
        ({**GOOD, "sigmas": [1.0, 3.0]}, "each below the one before"),
        ({**GOOD, "weights": [[0.5, 0.5]]}, "weights must be 1 rows of 1 numbers"),
        ({**GOOD, "guidance": [[3.0]]}, "guidance must be 1 rows of 2 numbers"),
    ],
)
def test_refuses_what_holds_no_solver(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "solver.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_solver(file)
    with pytest.raises(ValueError, match=r"missing\.json: cannot be read"):
        read_solver(tmp_path / "missing.json")


@pytest.mark.parametrize("sigmas", [[14.6, 2.0, 0.8, 0.1], [14.6, 0.8, 0.1], [20.0, 14.6, 3.0, 0.8, 0.1]])
def test_refuses_other_noise_levels_than_the_solvers(tmp_path: Path, sigmas: list[float]) -> None:
    solver = solver_in(tmp_path, TABLES["one point"])
    with pytest.raises(ValueError, match=r"noise levels of its own, \[14\.6, 3\.0, 0\.8, 0\.1\]"):
        sample_epd(cosine, torch.zeros(1, 1, 2, 2), torch.tensor(sigmas), solver=solver)


def test_the_workflow_has_the_packs_nodes_and_every_link_two_ends() -> None:
    pack = Path("integrations/comfyui")
    graph, nodes = json.loads((pack / "workflow.json").read_text()), (pack / "nodes.py").read_text()
    by_number = {node["id"]: node for node in graph["nodes"]}
    for name in ("LoadEPDSolver", "EPDSampler", "EPDSigmas", "EPDGuider"):
        assert f'node_id="{name}"' in nodes
        assert name in {node["type"] for node in graph["nodes"]}
    for number, source, output, target, socket, kind in graph["links"]:
        given, taken = by_number[source]["outputs"][output], by_number[target]["inputs"][socket]
        assert (given["type"], taken["type"], taken["link"]) == (kind, kind, number)
        assert number in given["links"]
