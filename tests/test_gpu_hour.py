"""The first hour on a GPU, small and on a CPU: every part runs, is kept, and counts what was really done."""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import gpu_hour
from benchmarks.gpu_hour import Size, World, main, network, parts_of, sampling, step
from models import clip
from models.backbone import Backbone
from training.ppo.tests.tiny_world import CLIP, write_world

CPU = torch.device("cpu")
SMALL = Size(images=4, group=2, repeats=1, dtypes=("float32",), batches=(1, 2), matrix=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world")).parent


@pytest.fixture
def model(folder, monkeypatch) -> str:
    name = str(folder / "model")
    monkeypatch.setitem(gpu_hour.SIZES, "cpu", SMALL)
    monkeypatch.setitem(gpu_hour.REWARDS, name, folder / "reward.pt")
    monkeypatch.setattr(Backbone, "compile_network", partialmethod(Backbone.compile_network, backend="eager"))
    return name


def run(model: str, output: Path, minutes: int = 1000) -> Result:
    arguments = ["--model", model, "--device", "cpu", "--output", str(output), "--minutes", str(minutes)]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_every_part_is_run_once_kept_and_shown(model, tmp_path):
    file = tmp_path / "figures.json"
    stopped = run(model, file, minutes=0)
    names = [f"float32/{name}" for name in parts_of(SMALL, "float32")]
    assert f"{len(names)} parts are left: the same command goes on" in stopped.output
    whole = run(model, file)
    assert "\nall parts; " in whole.output
    kept = json.loads(file.read_text())["parts"]
    assert list(kept) == names
    assert all(f"\n{name} " in whole.output for name in names)
    for name, figures in kept.items():
        if "/step/" in name:
            shares = [phase["of the time"] for phase in figures.values() if isinstance(phase, dict)]
            assert sum(shares) == pytest.approx(1)
            assert min(figures[phase]["of peak"] for phase in ("network", "decode", "reward", "text")) > 0
    del kept[names[3]]
    content = json.loads(file.read_text())
    content["parts"].pop(names[3])
    file.write_text(json.dumps(content))
    again = run(model, file)
    assert again.output.count(" ...\n") == 1
    assert f"{names[3]} ..." in again.output
    assert {name: json.loads(file.read_text())["parts"][name] for name in kept} == kept
    file.write_text(json.dumps({**content, "setting": {**content["setting"], "model": "another"}}))
    refused = run(model, file)
    assert refused.exit_code == 2
    assert "name another --output" in refused.output


def test_a_step_counts_the_rows_that_the_network_was_asked(model):
    world = World(model, CPU, torch.float32, SMALL, peak=1.0)
    rows: list[int] = []
    world.denoiser.network.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    figures = step(world, 3, 2, compiled=False)
    # Two steps of four images, three intervals of a start and two points, each twice for guidance; the two images of a
    # prompt have their first evaluation in common.
    assert sum(rows) == 2 * (4 * 3 * 3 - 2) * 2
    done = figures["network"]["of peak"] * figures["network"]["of the time"] * figures["s"]
    assert done == pytest.approx(sum(rows) / 2 * world.cost.row)
    rows.clear()
    step(world, 3, 0, compiled=True)
    assert rows == [8] * 2 * 3


def test_a_part_that_fails_does_not_keep_the_others_from_being_timed(model, tmp_path, monkeypatch):
    def crowded(world: World) -> dict[str, float]:
        raise torch.OutOfMemoryError("no room for it\nand more")

    parts = {"peak": gpu_hour.peak, "network/eager": crowded, "network/tried": lambda world: {"ms a row": 1.0}}
    monkeypatch.setattr(gpu_hour, "parts_of", lambda size, dtype: parts)
    result = run(model, tmp_path / "figures.json")
    assert result.exit_code == 0
    assert "float32/network/eager failed: no room for it\n" in result.output
    assert "\n1 parts are left" in result.output
    assert list(json.loads((tmp_path / "figures.json").read_text())["parts"]) == [
        "float32/peak",
        "float32/network/tried",
    ]


@pytest.mark.parametrize("tried", [False, True])
def test_the_network_is_timed_with_cudnn(model, tried: bool):
    world = World(model, CPU, torch.float32, SMALL, peak=1.0)
    seen: set[tuple[bool, bool]] = set()
    world.denoiser.network.register_forward_pre_hook(
        lambda *_: seen.add((torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark))
    )
    network(world, tried=tried)
    assert seen == {(True, tried)}


def test_diffusers_is_asked_as_often_as_we_ask(model):
    world = World(model, CPU, torch.float32, SMALL)
    rows: list[int] = []
    world.denoiser.network.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    figures = sampling(world, 2, compiled=False)
    assert figures["times as fast"] > 0
    assert rows == [4] * 10 * 2 * 3  # both; first, and two pairs


def test_weights_that_are_not_there_are_random(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "clip.json").write_text(json.dumps(CLIP))
    monkeypatch.setattr(clip, "VIT_H_14", tmp_path / "clip.json")
    bare = tmp_path / "model"
    for file in Path(model).rglob("*.json"):
        (copy := bare / file.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    monkeypatch.setattr(gpu_hour, "KNOWN", (str(bare),))
    figures = step(World(str(bare), CPU, torch.float32, SMALL, peak=1e9), 2, 2, compiled=False)
    assert capsys.readouterr().out.count("random weights in place of") == 2
    assert figures["images/s"] > 0
