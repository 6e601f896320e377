"""The how-tos: every command and every file in them, run as it stands there, in a folder like a checkout."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from models.pictures import opened_picture
from solvers import EPDTable
from tests.test_families import save_lora
from tests.tiny_stock_pipelines import tiny_sd
from training.ppo import assembly
from training.snapshot import save_snapshot

REPOSITORY = Path(__file__).resolve().parents[1]
HOW_TOS = sorted((REPOSITORY / "docs" / "how-to").glob("own-*.md"))
BLOCK = re.compile(r"^```(\w+)(?: ([\w.]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LISTED = re.compile(r"\$\(ls -d ([^)]+)\)")
SOLVER = {"dataset_name": "my-model", "schedule_type": "discrete", "guidance_type": "cfg", "guidance_rate": 4.0}


def blocks(file: Path) -> list[tuple[str, str, str]]:
    """Language, name of the file (empty for commands), and text of each block."""
    return BLOCK.findall(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the how-tos call my-..., made with stock diffusers; rewards are those of their how-to."""
    folder = tmp_path_factory.mktemp("mine")
    tiny_sd().save_pretrained(folder / "my-model")
    file, _ = save_lora("sd", folder / "my-model", folder / "lora")
    file.rename(folder / "my-lora.safetensors")
    table = EPDTable(torch.tensor([[0.3], [0.5]]).double(), torch.ones(2, 1).double())
    save_snapshot(folder / "my-solver.json", table, SOLVER)
    (folder / "my-solver.pkl").unlink()
    (folder / "my-prompts.csv").write_text("text\na dog\na red cat\ntwo birds\n" + "a very long prompt " * 9 + "\n")
    (folder / "my-heldout.txt").write_text("a hat\na cup\na sea\na hill\n")
    own_reward = next(text for language, name, text in blocks(HOW_TOS[-1].with_name("own-reward.md")) if name)
    (folder / "my_rewards.py").write_text(own_reward)
    return folder


@pytest.fixture
def checkout(tmp_path: Path, prepared: Path) -> Path:
    """A folder that looks like a checkout with these things in it, and no runs."""
    folder = tmp_path / "checkout"
    shutil.copytree(prepared, folder)
    for path in REPOSITORY.iterdir():
        if path.name not in ("exps", "outputs", ".git") and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    return folder


def run(code: str, patch: pytest.MonkeyPatch) -> None:
    """Run the commands of a block from the current folder, each as `python` would, but all in this process."""
    for line in code.replace("\\\n", " ").splitlines():
        python, *words = shlex.split(LISTED.sub(lambda found: str(next(Path().glob(found[1]))), line))
        assert python == "python"
        by_name = words[0] == "-m"
        patch.setattr(sys, "argv", words[by_name:])
        try:
            (runpy.run_module if by_name else runpy.run_path)(words[by_name], run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                pytest.fail(f"{line} ended with {ended.code}")


@pytest.mark.slow
@pytest.mark.parametrize("file", HOW_TOS, ids=lambda file: file.stem)
def test_a_how_to_does_what_it_says(
    file: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, caplog
) -> None:
    assembly._say_skipped.cache_clear()  # it says so once a process
    monkeypatch.chdir(checkout)
    monkeypatch.syspath_prepend(checkout)  # as `python -m` has it, for the reader's own module of rewards
    for language, name, text in blocks(file):
        if language == "python":
            (checkout / name).write_text(text)
        else:
            run(text, monkeypatch)
    sys.modules.pop("my_rewards", None)
    said = capfd.readouterr().out + caplog.text
    drawn = [path for path in checkout.rglob("*.png") if "assets" not in path.parts]
    for picture in drawn[:4]:
        with opened_picture(picture) as image:
            assert image.size == (16, 16)
    assert drawn or "nothing was trained" in said
    runs = [path for path in (checkout / "exps").glob("*") if path.is_dir()]
    assert len(runs) == (file.stem in ("own-lora", "own-model", "own-prompts"))
    assert all((run / "report.html").is_file() for run in runs)
    if file.stem in ("own-prompts", "own-model"):
        assert "1 of 4 prompts are too long for the model and left out" in said


def test_the_python_how_to_has_eight_lines_and_no_guidance_of_its_own() -> None:
    ((_, _, code), *_) = blocks(REPOSITORY / "docs" / "how-to" / "own-python.md")
    assert len([line for line in code.splitlines() if line]) == 8
    assert "7.5" not in code
    assert "guid" not in code


def test_there_are_five_how_tos_and_their_index_names_them() -> None:
    index = (REPOSITORY / "docs" / "how-to" / "README.md").read_text(encoding="utf-8")
    assert len(HOW_TOS) == 5
    assert all(f"({file.name})" in index for file in HOW_TOS)
