"""A reward of the user's own: any Python function of images and prompts, or a class with such a method `score`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from errors import InputError, first_line
from training.ppo.reward_names import FUNCTION
from training.ppo.rewards.named import RewardFiles

THUMBNAIL = 8  # pixels along each side, of what images are compared as

Score = Callable[[Tensor, Sequence[str]], Any]


class FunctionReward:
    """Scores by `my_module:my_reward`, a function (images [N, 3, H, W] in [0, 1], prompts) -> [N], higher is better.

    It may be a class too: it is made once, without arguments, and asked by its method `score`. What it answers may be
    a tensor, an array or a list. It need not look at the prompts.
    """

    reads_prompts = False  # whether it does is its own affair

    def __init__(self, reward: str) -> None:
        """Import it. Raises `InputError` where that fails, or it is no function."""
        found = _imported(reward)
        self.name = FUNCTION.fullmatch(reward)["name"]
        self._score: Score = _score_of(found, reward)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the function says of images [N, 3, H, W] in [0, 1] with N prompts: [N] float32."""
        return torch.as_tensor(self._score(images, prompts)).to(torch.float32)

    def image_features(self, images: Tensor) -> Tensor:
        """Thumbnails of images [N, 3, H, W], [N, 192]: what evaluate.py compares sets of images by."""
        return functional.interpolate(images.float(), (THUMBNAIL, THUMBNAIL), mode="area").flatten(1)

    def say_what_is_cut(self, prompts: Sequence[str]) -> None:
        """Nothing that is known of."""


def find_function(reward: str) -> RewardFiles:
    """The source file of a function, which is imported. Raises `InputError` where it is none."""
    _check_callable(_imported(reward), reward)
    module = sys.modules[FUNCTION.fullmatch(reward)["module"]]
    return RewardFiles(Path(getattr(module, "__file__", None) or __file__), {}, None)


def _imported(reward: str) -> Any:
    module, name = FUNCTION.fullmatch(reward).group("module", "name")
    try:
        with _working_folder_first():
            found = importlib.import_module(module)
    except Exception as error:  # a module of the user's can raise anything
        raise InputError(
            f"Reward {reward}: {module} cannot be imported from {Path.cwd()} or the installed packages: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if not hasattr(found, name):
        raise InputError(f"Reward {reward}: {module} ({getattr(found, '__file__', 'a package')}) has no {name}.")
    return getattr(found, name)


@contextmanager
def _working_folder_first() -> Iterator[None]:
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.remove(str(Path.cwd()))


def _check_callable(found: Any, reward: str) -> None:
    is_function = callable(found) and not inspect.isclass(found)
    if not (is_function or callable(getattr(found, "score", None))):
        raise InputError(
            f"Reward {reward}: it is neither a function (images [N, 3, H, W], prompts) -> [N] nor a class with a "
            "method score of that kind."
        )


def _score_of(found: Any, reward: str) -> Score:
    _check_callable(found, reward)
    if inspect.isclass(found):
        try:
            found = found()
        except Exception as error:  # of the user's
            raise InputError(
                f"Reward {reward}: the class cannot be made without arguments: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
    return getattr(found, "score", found)
