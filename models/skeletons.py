"""Modules without memory for their weights: what a configuration describes, before anything is allocated for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

SPARE_TENSORS = 5_000  # a module may have so many more than its weights, and is then told which of them are missing

Module = TypeVar("Module", bound=nn.Module)


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
