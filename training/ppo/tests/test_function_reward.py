"""A reward of the user's own, by the name of its function: in a run, in evaluate.py, and what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import evaluate
from errors import InputError
from training.ppo.launch import main
from training.ppo.rewards import build_reward, find_reward_files, load_reward
from training.ppo.tests.tiny_world import write_world
from training.runs.run_folder import RunFolder, read_metrics

HOW_TO = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "own-reward.md"
SOURCE = """
import numpy as np

def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))

def as_list(images, prompts):
    return [float(len(prompt)) for prompt in prompts]

def as_array(images, prompts):
    return np.arange(len(images))

def wrong_number(images, prompts):
    return images.mean()

def broken(images, prompts):
    raise KeyError("colour")

class Counter:
    def __init__(self):
        self.asked = 0
    def score(self, images, prompts):
        self.asked += 1
        return [self.asked] * len(images)

class Needy:
    def __init__(self, size):
        pass
    def score(self, images, prompts):
        return images

ready = Counter()
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """A module of a name of its own in the working folder."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def loaded(reward: str):
    return load_reward(reward, device="cpu", batch_size=2)


def test_what_the_function_answers_is_the_score(module):
    images = torch.rand(3, 3, 8, 8)
    prompts = ["", "ab", "abc"]
    redness = loaded(f"{module}:redness")
    expected = images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
    assert torch.equal(redness.score(images, prompts), expected)
    assert (redness.name, redness.reads_prompts) == ("redness", False)
    assert loaded(f"{module}:as_list").score(images, prompts).tolist() == [0, 2, 3]
    assert loaded(f"{module}:as_array").score(images, prompts).dtype == torch.float32
    counter = loaded(f"{module}:Counter")
    assert [counter.score(images, prompts)[0].item() for _ in range(2)] == [1, 2]
    assert loaded(f"{module}:ready").name == "ready"
    features = torch.nn.functional.avg_pool2d(images, 1).flatten(1)
    assert torch.allclose(redness.image_features(images), features)
    assert sys.path[0] != str(Path.cwd())


def test_the_file_of_the_function_is_what_a_kept_measurement_depends_on(module, tmp_path):
    for name in ("redness", "Counter", "ready"):
        assert find_reward_files(f"{module}:{name}").paths() == [tmp_path / f"{module}.py"]


def test_functions_are_mixed_with_others_under_their_own_names(module):
    mix = build_reward({f"{module}:redness": 1.0, f"{module}:as_list": 0.5}, device="cpu", batch_size=2)
    assert mix.name == "redness + 0.5 as_list"
    Path("other.py").write_text(SOURCE)
    with pytest.raises(InputError, match="two are called redness"):
        build_reward({f"{module}:redness": 1.0, "other:redness": 1.0}, device="cpu", batch_size=2)
    sys.modules.pop("other")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("number", "it is neither a function"),
        ("absent", "has no absent"),
        ("Needy", "cannot be made without arguments: TypeError"),
    ],
)
def test_what_is_no_reward_is_refused_in_a_line(module, name, says):
    with pytest.raises(InputError) as error:
        loaded(f"{module}:{name}")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine_broken.py").write_text("1 / 0\n")
    with pytest.raises(
        InputError, match=r"mine_broken cannot be imported from .*: ZeroDivisionError: division by zero"
    ):
        find_reward_files("mine_broken:reward")
    with pytest.raises(InputError, match=r"mine_nowhere cannot be imported .*: ModuleNotFoundError"):
        find_reward_files("mine_nowhere:reward")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wrong_number", r"the reward wrong_number gave \[\] for 2 images, not a tensor \[2\]"),
        ("broken", r"the reward broken failed on 2 images: KeyError: 'colour' \(mine_\w+.py, line 17\)"),
    ],
)
def test_what_a_function_does_wrong_is_said_with_its_line(module, name, says):
    mix = build_reward({f"{module}:{name}": 1.0}, device="cpu", batch_size=2)
    with pytest.raises(InputError, match=says):
        mix.score(torch.rand(2, 3, 8, 8), ["a", "b"])


# --- in the commands


def test_the_example_of_the_how_to_trains_and_evaluates(tmp_path, monkeypatch):
    """Its file is written as it stands there, and its rewards are given to a tiny world."""
    shown = HOW_TO.read_text()
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(re.search(r"^```python my_rewards\.py\n(.*?)^```$", shown, re.M | re.S)[1])
    rewards = re.findall(r"my_rewards:\w+", shown)
    assert len(set(rewards)) == 2
    config = write_world(tmp_path / "world")
    try:
        for reward in sorted(set(rewards)):
            overrides = [f"reward.weights_path={reward}", "ppo.steps=1", f"run.output_root=runs_{reward[11:]}"]
            result = CliRunner().invoke(main, ["--config", str(config), "--override", *overrides])
            assert result.exit_code == 0, result.output
            (run,) = Path(f"runs_{reward[11:]}").iterdir()
            assert abs(read_metrics(RunFolder.open(run).metrics)[-1]["reward_mean"]) < 10
        (tmp_path / "prompts.txt").write_text("a\nb\n")
        asked = ["--model", str(tmp_path / "world" / "model"), "--solvers", "ddim", "--nfe", "2", "--number", "2"]
        asked += ["--prompt-file", "prompts.txt", "--schedules", "discrete", "--baseline", "classical"]
        result = CliRunner().invoke(evaluate.main, [*asked, "--reward", rewards[0]])
        assert result.exit_code == 0, result.output
        assert "preference reward" in result.output
    finally:
        sys.modules.pop("my_rewards", None)
