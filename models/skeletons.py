"""Modules without memory for their weights: what a configuration describes, before anything is allocated for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

LARGEST_COUNT = 2**20  # of layers, channels, words or whatever else a configuration counts
SPARE_TENSORS = 5_000  # a module may have so many more than its weights, and is then told which of them are missing

Module = TypeVar("Module", bound=nn.Module)


def require_counts(settings: object, name: str = "a setting") -> None:
    """Raise ValueError for a whole number that no model counts to: some become lists that long before any layer is."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            require_counts(value, str(key))
    elif isinstance(settings, list):
        for value in settings:
            require_counts(value, name)
    elif type(settings) is int and abs(settings) > LARGEST_COUNT:
        raise ValueError(f"{name} is {settings:,}, far more than a model has of anything")


def skeleton(make: Callable[[], Module], weights: Mapping[str, Tensor]) -> Module:
    """The module that `make` makes for these weights, with its own on torch's meta device, which holds no numbers.

    Raises ValueError where it has far more tensors than the weights, as a configuration can ask for any number of
    layers; and whatever `make` raises.
    """
    left = len(weights) + SPARE_TENSORS

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"it describes far more than the {len(weights)} tensors that there are weights for")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return make()
    finally:
        hook.remove()
