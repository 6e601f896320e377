"""Tests marked `integration` run only with EPD_INTEGRATION_TEST=1; what they integrate is the best that is here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from errors import InputError
from training.ppo.assembly import Parts, Start, build, make_fabric, prepare
from training.ppo.config import load_config
from training.runs.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIGURATIONS = {"cuda": "training/ppo/cfgs/sd15_base.yaml", "cpu": "training/ppo/cfgs/shapes.yaml"}
SMALL = ("ppo.rollout_batch_size=8", "ppo.minibatch_size=8", "ppo.rloo_k=4", "logging.eval_interval=0")
INTEGRATED = pytest.StashKey[set[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("EPD_INTEGRATION_TEST") == "1":
        return
    for item in items:
        if item.get_closest_marker("integration"):
            item.add_marker(pytest.mark.skip(reason="integration test: set EPD_INTEGRATION_TEST=1 to run it"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in sorted(config.stash.get(INTEGRATED, set())):
        terminalreporter.write_line(f"integrated: {line}")


@dataclass(frozen=True)
class Integration:
    """A run that is put together but not begun, of eight images a step: two prompts, four tables each.

    pictures: a folder for images that people look at.
    """

    start: Start
    parts: Parts
    pictures: Path = Path(__file__).parent / "integration_outputs"


@pytest.fixture(scope="module")
def integration(pytestconfig: pytest.Config) -> Iterator[Integration]:
    """Stable Diffusion v1.5 with HPS v2.1 where CUDA and their files are there; otherwise the embedded world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        start, reason = _best_start()
        said = pytestconfig.stash.setdefault(INTEGRATED, set())
        said.add(f"{start.config.model.dataset_name} with {start.config.reward.weights_path}{reason}")
        fabric = make_fabric(start.config)
        fabric.launch()
        yield Integration(start, build(start, fabric))


def _best_start() -> tuple[Start, str]:
    """What to integrate, and why it is not Stable Diffusion, if it is not."""
    if not torch.cuda.is_available():
        reason = "torch finds no CUDA device"
    else:
        try:
            return prepare(load_config(CONFIGURATIONS["cuda"], SMALL)), ""
        except InputError as error:
            reason = str(error)
    start = prepare(load_config(CONFIGURATIONS["cpu"], (*SMALL, "run.device=cpu")))
    return start, f"; not Stable Diffusion v1.5 with HPS v2.1: {reason}"


@pytest.fixture
def copied(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """The run that the module calls `finished`, for a test to go on with."""
    return RunFolder(Path(shutil.copytree(finished.path, tmp_path / "copy")))


@pytest.fixture
def asset() -> Callable[[str], Path]:
    """Path of an asset, relative to the repository; the test is skipped where it or a CUDA device is not there."""

    def find(relative: str) -> Path:
        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device here")
        path = REPOSITORY / relative
        if not path.exists():
            pytest.skip(f"the asset {relative} is not here; `python -m models.assets doctor` says how to fetch it")
        return path

    return find
