"""The tuning study: what its file may say, how runs are made, the statistics, and a whole study of a tiny world."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from tqdm import tqdm

from benchmarks import tuning_results, tuning_runs
from benchmarks.tuning_results import (
    BUDGETS,
    OVER_BOTH,
    OVER_PROMPTS,
    Finished,
    Group,
    Scorer,
    Watched,
    crossed_interval,
    images_to,
    learning_of,
    lines_of,
    paired_differences,
)
from benchmarks.tuning_runs import SCHEMA, Study, begun, carry_out, is_finished, plan_runs, run_command
from benchmarks.tuning_study import main
from errors import InputError
from models import load_denoiser
from solvers import epd_sampler
from tests.by_hand import latents_by_hand
from training.measuring.comparison import Entry
from training.measuring.evaluation import Measured, Store
from training.measuring.statistics import bootstrap_indices, mean_interval, paired_difference_interval
from training.ppo.launch import main as launch_command
from training.ppo.rewards import RewardHPS
from training.ppo.tests.tiny_world import START, write_world
from training.runs.checkpoint import list_checkpoints, step_path
from training.runs.fabric import fabric_of
from training.runs.run_folder import RunFolder
from training.solver import Schedule, classical_solver, load_solver

REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED = sorted((REPOSITORY / "benchmarks" / "studies").glob("*.yaml"))
LETTERS = "hijklm"  # neither trained on nor watched


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    (folder / "final.csv").write_text("text\n" + "\n".join(LETTERS))
    return folder


def arm(world: Path, **values: object) -> dict:
    usual = {"config": str(world / "config.yaml"), "seeds": [0], "starts": [str(world / "start")]}
    return {**usual, **values}


def study_file(world: Path, path: Path, arms: dict, **values: object) -> Path:
    usual = {
        "heldout_prompts": str(world / "final.csv"),
        "heldout_count": 6,
        "heldout_seed": 3,
        "batch": 4,
        "solvers": ["ddim", "dpmpp:2"],
        "schedules": ["discrete", "logsnr"],
        "guidances": [1, 2, 4],
        "plateau": 2,
    }
    path.write_text(yaml.safe_dump({"arms": arms, **usual, **values}, sort_keys=False))
    return path


# --- the study's file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_plan_their_runs(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(path.parents[2])
    study = SCHEMA.load(path).config
    for one in study.arms.values():
        assert one.seeds == [0, 1, 2]
        one.seeds = [0]  # the others differ in nothing that is checked, and checking takes a second each
    runs = plan_runs(study, Path("runs"))
    budgets = {run.images for run in runs}
    assert budgets == {"images": {128, 2048}, "flow": {960, 2048}}.get(path.stem, {960})  # else equal ones
    assert len(runs) == sum(len(one.seeds) * len(one.starts) for one in study.arms.values())


def test_an_arms_overrides_reach_its_runs(world: Path, tmp_path: Path):
    arms = {
        "one": arm(world, overrides=["ppo.steps=7"], seeds=[4, 5]),
        "two": arm(world, overrides=["search.method=cma_es"]),
    }
    runs = plan_runs(SCHEMA.load(study_file(world, tmp_path / "s.yaml", arms)).config, tmp_path)
    assert [run.name for run in runs] == ["one-epd-start-seed4", "one-epd-start-seed5", "two-epd-start-seed0"]
    assert [run.images for run in runs] == [56, 56, 32]
    for interval in (0, 4):
        arms = {"blind": arm(world, overrides=[f"logging.eval_interval={interval}"])}
        with pytest.raises(InputError, match=rf"arms\.blind: logging\.eval_interval={interval} of 4 steps"):
            plan_runs(SCHEMA.load(study_file(world, tmp_path / "s.yaml", arms)).config, tmp_path)
    assert [run.start.config.run.seed for run in runs] == [4, 5, 0]
    assert runs[2].start.config.search.population == 8


@pytest.mark.parametrize(
    ("arms", "values", "message"),
    [
        ({}, {}, "arms is not set"),
        ({"a": {"config": "c", "seeds": [0], "starts": ["1"], "seed": 1}}, {}, "Key 'seed' not in 'Arm'"),
        ({"a": {"config": "c", "seeds": [0, 0], "starts": ["1"]}}, {}, "arms.a.seeds=[0, 0] must name"),
        ({"a": {"config": "c", "seeds": [0], "starts": []}}, {}, "arms.a.starts=[] must name"),
        ({"a/b": {"config": "c", "seeds": [0], "starts": ["1"]}}, {}, "letters, digits, _ and - only"),
        ({"a": {"config": "c", "seeds": [0], "starts": ["1"]}}, {"solvers": ["eular"]}, "unknown solver 'eular'"),
        ({"a": {"config": "c", "seeds": [0], "starts": ["1"]}}, {"schedules": []}, "schedules is empty"),
        (
            {"a": {"config": "c", "seeds": [0], "starts": ["1"]}},
            {"guidances": [1, -2]},
            "every scale must be at least 0",
        ),
        ({"a": {"config": "c", "seeds": [0], "starts": ["1"]}}, {"plateau": 1}, "plateau=1 must be at least 2"),
        ({"a": {"config": "c", "seeds": [0], "starts": ["1"]}}, {"heldout": 5}, "did you mean heldout_"),
    ],
)
def test_faults_of_a_study_file(world: Path, tmp_path: Path, arms: dict, values: dict, message: str):
    with pytest.raises(InputError) as caught:
        SCHEMA.load(study_file(world, tmp_path / "s.yaml", arms, **values))
    assert message in str(caught.value)
    assert str(tmp_path / "s.yaml") in str(caught.value)


def test_runs_that_one_evaluation_cannot_judge_are_refused(world: Path, tmp_path: Path):
    for override, message in (
        ("model.guidance_rate=3", "model.guidance_rate, not 2.0 and 3.0"),
        ("model.negative_prompt=a", "model.negative_prompt, not None and a"),
    ):
        arms = {"a": arm(world), "b": arm(world, overrides=[override])}
        result = study(study_file(world, tmp_path / "s.yaml", arms), tmp_path / "out")
        assert result.exit_code == 2
        assert f"must agree in {message}" in result.output
    for csv, name in (("train.csv", "train.csv"), ("heldout.csv", "heldout.csv")):
        file = study_file(world, tmp_path / "s.yaml", {"a": arm(world)}, heldout_prompts=str(world / csv))
        result = study(file, tmp_path / "out")
        assert result.exit_code == 2
        assert f"6 of its prompts also stand in {world / name}" in result.output
    assert not (tmp_path / "out").exists()


# --- carrying out ----------------------------------------------------------------------------------------------------


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules can be run by `python -m`."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def test_a_command_runs_in_a_process_of_its_own(modules: Path, tmp_path: Path):
    (modules / "talk.py").write_text("import sys, training.ppo\nprint(*sys.argv[1:])\nsys.exit(3)\n")
    assert run_command("talk", ["a", "b c"], tmp_path / "logs" / "talk.log") == 3
    assert (tmp_path / "logs" / "talk.log").read_text() == "a b c\n"


def test_an_interrupt_reaches_the_command_once_and_ends_the_study(modules: Path, tmp_path: Path):
    (modules / "patient.py").write_text(
        "import pathlib, signal, sys, time\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "signals = []\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))\n"
        "(folder / 'ready').touch()\n"
        "while not signals: time.sleep(0.02)\n"
        "time.sleep(0.6)\n"
        "(folder / 'saved').write_text(str(len(signals)))\n"
    )

    def interrupt() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_command("patient", [str(tmp_path)], tmp_path / "log")
    thread.join()
    assert (tmp_path / "saved").read_text() == "1"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_fails_is_told_with_its_last_words(
    world: Path, modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (modules / "fails.py").write_text("import sys\nprint('all went well\\rno: the disk is full')\nsys.exit(2)\n")
    monkeypatch.setattr(tuning_runs, "COMMAND", "fails")
    (run,) = plan_runs(SCHEMA.load(study_file(world, tmp_path / "s.yaml", {"a": arm(world)})).config, tmp_path / "runs")
    outcome = carry_out(run, tmp_path / "runs", None, tmp_path / "a.log")
    assert outcome.folder is None
    assert outcome.failure == (
        f"a-epd-start-seed0 ended with 2, see {tmp_path / 'a.log'}: all went well / no: the disk is full"
    )


# --- statistics ------------------------------------------------------------------------------------------------------


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_runs_that_agree_add_nothing_to_the_interval_over_prompts():
    row, indices = draw(0, 40), bootstrap_indices(40, torch.Generator().manual_seed(0))
    crossed, plain = crossed_interval(row.expand(3, 40), indices), mean_interval(row, indices)
    assert crossed == pytest.approx(plain, abs=1e-12)
    assert crossed_interval(row[None], indices) == pytest.approx(plain, abs=1e-12)


def test_runs_that_differ_widen_it():
    values = torch.tensor([0.0, 1.0, 2.0]).double()[:, None].expand(3, 40)  # no spread over the prompts at all
    interval = crossed_interval(values, bootstrap_indices(40, torch.Generator().manual_seed(0)))
    # Three draws of three runs are all the lowest, or all the highest, with a probability of 1/27 > 2.5%.
    assert interval == (1.0, 0.0, 2.0)


def test_the_crossed_interval_holds_what_it_promises():
    """The bootstrap's variance, with many rows, is that of a mean over crossed effects: a^2 / R + b^2 / N."""
    rows, columns = 60, 50
    values = draw(1, rows)[:, None] + 2 * draw(2, columns)[None]
    interval = crossed_interval(values, bootstrap_indices(columns, torch.Generator().manual_seed(0)))
    expected = (values.mean(1).var(correction=0) / rows + values.mean(0).var(correction=0) / columns).sqrt().item()
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(expected, rel=0.07)


def test_differences_of_each_seed_and_of_all():
    values, baseline = draw(3, 2, 30) + 0.5, draw(4, 30)
    found = {(seed, over): interval for seed, over, interval in paired_differences(values, baseline, [7, 8])}
    assert list(found) == [(7, OVER_PROMPTS), (8, OVER_PROMPTS), (None, OVER_PROMPTS), (None, OVER_BOTH)]
    indices = bootstrap_indices(30, torch.Generator().manual_seed(0))
    assert found[8, OVER_PROMPTS] == paired_difference_interval(values[1], baseline, indices)
    mean = (values.mean(0) - baseline).mean().item()
    assert found[None, OVER_PROMPTS].estimate == pytest.approx(mean)
    assert found[None, OVER_BOTH].estimate == pytest.approx(mean)
    assert len(list(paired_differences(values[:1], baseline, [7]))) == 1


def test_images_to_a_gain():
    seen = Watched([0, 16, 32, 48], [0.5, 0.6, 0.8, 0.7], [0.0, 0.1, 0.3, 0.2])
    assert images_to(seen, 0.1) == 16
    assert images_to(seen, 0.2) == 32
    assert images_to(seen, 0.31) is None


def fake_run(world: Path, root: Path, name: str, seed: int, gains: list[float]) -> Finished:
    """A run of which nothing but the configuration and the metrics is looked at."""
    file = study_file(world, root / "s.yaml", {name: arm(world, seeds=[seed])})
    (run,) = plan_runs(SCHEMA.load(file).config, root)
    folder = RunFolder(root / f"{name}-{seed}")
    folder.logs.mkdir(parents=True)
    rows = [
        {"step": step, "heldout/reward": 0.4 + gain, "heldout/reward_difference": gain,
         **({"reward_within_variance": 0.02, "reward_between_variance": 0.3 + seed} if step else {})}
        for step, gain in enumerate(gains)
    ]  # fmt: skip
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Finished(run, folder, {"final": run.start.snapshot, "best": run.start.snapshot})


def entry(label: str, nfe: int, values: torch.Tensor) -> Entry:
    measured = Measured({"reward": values}, values > 99, torch.zeros(0), torch.zeros, label)
    solver = replace(classical_solver("ddim", nfe + 1, Schedule("discrete", 1.0)), label=label)
    return Entry(solver, measured)


def group(name: str, runs: list[Finished], **entries: object) -> Group:
    values = {"start": entry("start", 4, draw(0, 20)), "tables": {}, "classical": {}} | entries
    return Group(name, "epd-start", runs, **values)


def test_a_run_that_moved_its_noise_levels_is_held_against_those_that_it_started_from(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = fake_run(world, tmp_path, "a", 0, [0, 0.1]).run
    moved = replace(run.start.solver, sigmas=torch.tensor([9.0, 2.0, 0.1]), schedule=None)
    monkeypatch.setattr(tuning_results, "newest_checkpoint", lambda folder: folder / "policy-step000004.pt")
    monkeypatch.setattr(tuning_results, "_exported", lambda folder, checkpoint: moved)
    finished = tuning_results.finish(run, RunFolder(tmp_path / "without-a-best"))
    assert finished.tables["final"] is moved
    denoiser = load_denoiser(world / "model", device="cpu", dtype=torch.float32)
    named = Schedule("discrete", 1.0).sigmas(3, denoiser)
    for start in (finished.start, finished.tables["best"]):  # the best is the start where the watch found none better
        assert torch.equal(start.on(denoiser).sigmas, named)
        assert start.guidance_scale == 2.0


def test_learning_is_counted_by_hand(world: Path, tmp_path: Path):
    slow = [fake_run(world, tmp_path, "slow", seed, gains) for seed, gains in
            ((0, [0, 0.1, 0.1, 0.2, 0.2]), (1, [0, 0.1, 0.31, 0.3, 0.2]))]  # fmt: skip
    fast = [fake_run(world, tmp_path, "fast", seed, gains) for seed, gains in
            ((0, [0, 0.4, 0.4, 0.3, 0.5]), (1, [0, 0.1, 0.2, 0.5, 0.3]))]  # fmt: skip
    settings = Study(plateau=2, gain_share=0.75)
    first, second = learning_of([group("slow", slow), group("fast", fast)], settings)
    assert (first.plateau, second.plateau) == pytest.approx(((0.2 + 0.25) / 2, 0.4))
    assert first.target == second.target == pytest.approx(0.3)
    assert first.images_to_target == [None, 2 * 8]
    assert second.images_to_target == [8, 3 * 8]
    assert (first.median_images, second.median_images) == (float("inf"), 2 * 8)
    assert first.scatter == pytest.approx((statistics.variance([0.3, 0.2]) / 2) ** 0.5)
    assert first.between_seeds == pytest.approx(statistics.stdev([0.2, 0.25]))
    assert (first.within, first.between) == pytest.approx((0.02, 0.8))
    assert first.images == 32
    none = [fake_run(world, tmp_path, "none", 0, [0, -0.1, -0.2])]
    assert learning_of([group("none", none)], settings)[0].images_to_target == [None]


def test_the_rival_is_the_best_classical_solver_of_its_budget(world: Path, tmp_path: Path):
    runs = [fake_run(world, tmp_path, "a", 0, [0, 0.1, 0.2])]
    poor, good, rich = (entry(name, nfe, draw(7, 20) + mean) for name, nfe, mean in
                        (("poor", 4, 0.0), ("good", 4, 1.0), ("rich", 8, 3.0)))  # fmt: skip
    tuned = {"final": [entry("a", 4, draw(7, 20) + 2)]}
    lines = list(
        lines_of(
            group("a", runs, tables=tuned, classical={"as many in all": [poor, good], "twice as many in all": [rich]})
        )
    )
    assert [(line.budget, line.baseline, line.baseline_total) for line in lines] == [
        (None, "epd-start", 4),
        ("as many in all", "good, discrete", 4),
        ("twice as many in all", "rich, discrete", 8),
    ]
    assert [line.difference.estimate for line in lines[1:]] == pytest.approx([1.0, -1.0])
    assert lines[1].difference.low == pytest.approx(1.0)  # the same prompts and noise: their spread falls out


@pytest.mark.parametrize(("guidances", "expected"), [([], {2.0}), ([1, 3], {1.0, 3.0})])
def test_rivals_are_tried_at_every_guidance_of_the_study(
    world: Path, tmp_path: Path, guidances: list[float], expected: set[float]
):
    file = study_file(world, tmp_path / "s.yaml", {"a": arm(world)}, guidances=guidances)
    study, bar = SCHEMA.load(file).config, tqdm(disable=True)
    scorer = Scorer(study, plan_runs(study, tmp_path), fabric_of("cpu", 1), Store(tmp_path / "kept", pytest.fail), bar)
    found = {(rival.label, rival.grid_name, rival.guidance_scale) for rival in scorer.classical(4)}
    assert found == {
        (name, schedule, scale)
        for name in ("ddim", "dpmpp:2") for schedule in ("discrete", "logsnr") for scale in expected
    }  # fmt: skip


# --- a whole study ---------------------------------------------------------------------------------------------------


def study(file: Path, output: Path) -> Result:
    return CliRunner().invoke(main, [str(file), "--output", str(output), "--cache", str(output.parent / "cache")])


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with three runs: PPO's seed 0 and CMA-ES finished, PPO's seed 1 stopped before its last step."""
    output = tmp_path_factory.mktemp("study") / "out"
    for run in plan_runs(SCHEMA.load(whole_study(world, output.parent)).config, output / "runs"):
        if run.arm != "broken":
            result = CliRunner().invoke(launch_command, ["--config", run.config_path, "--override", *run.overrides])
            assert result.exit_code == 0, result.output
    (stopped,) = (output / "runs").glob("*-ppo-epd-start-seed1")
    step_path(RunFolder(stopped).checkpoints, 4).unlink()
    return output


def whole_study(world: Path, folder: Path) -> Path:
    arms = {
        "ppo": arm(world, seeds=[0, 1]),
        "cma": arm(world, overrides=["search.method=cma_es"]),
        "broken": arm(world, overrides=["logging.panel=null"]),
    }
    return study_file(world, folder / "whole.yaml", arms)


@pytest.fixture(scope="module")
def studied(world: Path, made: Path) -> tuple[Path, Result]:
    def run_here(module: str, words: list[str], log: Path) -> int:
        """The command, but for the arm that is to fail; in processes of its own tests/faults has a study run it."""
        assert module == "training.ppo.launch"
        log.parent.mkdir(parents=True, exist_ok=True)
        if "logging.panel=null" in words:
            log.write_text("no more memory")
            return 1
        result = CliRunner().invoke(launch_command, words)
        log.write_text(result.output)
        return result.exit_code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning_runs, "run_command", run_here)
        result = study(whole_study(world, made.parent), made)
    return made, result


def test_what_is_left_is_done_and_what_fails_is_told(studied: tuple[Path, Result]):
    output, result = studied
    assert result.exit_code == 2, result.output
    assert "1 of 4 runs failed" in result.output
    assert "FAILED: broken-epd-start-seed0 ended with 1" in (output / "study.md").read_text()
    assert "no more memory" in result.output
    assert len(list((output / "runs").iterdir())) == 3  # none was made anew
    resumed = (output / "logs" / "ppo-epd-start-seed1.log").read_text()
    assert "goes on after step 2" in resumed
    assert not (output / "logs" / "ppo-epd-start-seed0.log").exists()
    for folder in map(RunFolder, (output / "runs").iterdir()):
        assert list_checkpoints(folder.checkpoints)[-1].name == "policy-step000004.pt"
        assert len(list(folder.export.glob("*.pkl"))) >= 1


def test_the_scores_are_those_of_the_exported_tables(studied: tuple[Path, Result], world: Path):
    output, _ = studied
    content = json.loads((output / "study.json").read_text())
    denoiser = load_denoiser(world / "model", device="cpu", dtype=torch.float32)
    reward = RewardHPS(world / "reward.pt")
    (folder,) = (output / "runs").glob("*-ppo-epd-start-seed0")
    exported = load_solver(folder / "export" / "network-snapshot-export-step000004.pkl")

    def scores(table) -> torch.Tensor:
        def solve(denoise, x, sigmas):
            return epd_sampler(denoise, x, sigmas, table)

        latents = latents_by_hand(denoiser, LETTERS, range(3, 9), solve, exported.on(denoiser).sigmas, 2.0)
        with torch.no_grad():
            return reward.score(denoiser.decode(latents), list(LETTERS)).double()

    before, after = scores(START), scores(exported.table)
    (line,) = (
        line for line in content["differences"]
        if (line["arm"], line["seed"], line["table"], line["budget"]) == ("ppo", 0, "final", None)
    )  # fmt: skip
    assert (line["baseline_value"], line["value"]) == pytest.approx(
        (before.mean().item(), after.mean().item()), abs=1e-5
    )
    interval = paired_difference_interval(after, before, bootstrap_indices(6, torch.Generator().manual_seed(0)))
    assert [line["difference"][key] for key in interval._fields] == pytest.approx(list(interval), abs=1e-5)
    assert (line["parallel"], line["total"]) == (4, 6)


def test_every_comparison_is_there(studied: tuple[Path, Result]):
    output, result = studied
    content = json.loads((output / "study.json").read_text())
    keys = {(line["arm"], line["seed"], line["over"], line["table"], line["budget"]) for line in content["differences"]}
    seeds = [("ppo", 0, "prompts"), ("ppo", 1, "prompts"), ("ppo", None, "prompts"), ("ppo", None, OVER_BOTH)]
    assert keys == {
        (*who, table, budget)
        for who in (*seeds, ("cma", 0, "prompts"))
        for table in ("final", "best")
        for budget in (None, *BUDGETS)
    }
    spent = {line["budget"]: line["baseline_total"] for line in content["differences"] if line["budget"]}
    assert list(spent.values()) == [4, 6, 12]
    assert {line["baseline"].split(" g")[1] for line in content["differences"] if line["budget"]} <= {"1", "2", "4"}
    assert [(item["arm"], item["images"]) for item in content["learning"]] == [("ppo", 32), ("cma", 32)]
    written = (output / "study.md").read_text()
    for text in ("all seeds, over seeds and prompts", "| 4 / 6 |", "## Learning", "twice as many in all: 12"):
        assert text in written
        assert text in result.output
    with Image.open(output / "study.png") as picture:
        assert picture.size[0] > 300


@pytest.mark.slow
def test_two_processes_score_what_one_scores(studied: tuple[Path, Result], world: Path, tmp_path: Path):
    output, _ = studied
    shutil.copytree(output / "runs", tmp_path / "out" / "runs")
    file = study_file(world, tmp_path / "two.yaml", {"ppo": arm(world, seeds=[0, 1])})
    told = [str(file), "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--num-devices", "2"]
    command = [sys.executable, "-m", "benchmarks.tuning_study", *told]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "study.json").read_text())["command"] == shlex.join(["python", *command[1:]])
    assert done.stdout.count("drawn and judged") == done.stdout.count("## Learning") == 1
    expected, found = (
        [line for line in json.loads((folder / "study.json").read_text())["differences"] if line["arm"] == "ppo"]
        for folder in (output, tmp_path / "out")
    )
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.pop("difference") == pytest.approx(theirs.pop("difference"), abs=1e-6)
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_settings_that_changed_are_refused_and_names_are_whole(made: Path, world: Path):
    root = made / "runs"
    changed = study_file(world, made.parent / "changed.yaml", {"ppo": arm(world, overrides=["ppo.clip_range=0.1"])})
    (run,) = plan_runs(SCHEMA.load(changed).config, root)
    with pytest.raises(InputError, match=r"other settings than the study now has \(ppo\.clip_range: 0\.2, now 0\.1\)"):
        begun(run, root)
    (same,) = plan_runs(SCHEMA.load(study_file(world, made.parent / "same.yaml", {"ppo": arm(world)})).config, root)
    folder = begun(same, root)
    assert is_finished(same, folder)
    longer = replace(same.start.config.ppo, steps=5)
    start = replace(same.start, config=dataclasses.replace(same.start.config, ppo=longer))
    assert not is_finished(replace(same, start=start), folder)
    shutil.copytree(folder.path, root / "20990101-000000-other-ppo-epd-start-seed0")  # the run of an arm `other-ppo`
    assert begun(same, root) == folder
    shutil.rmtree(root / "20990101-000000-other-ppo-epd-start-seed0")
