"""What a pickled `EPD_predictor` holds, read without running anything.

A pickle is a program, and none is run here (`models.pickles`): a short list of names is answered with harmless
stand-ins, and a file is refused at the first other name. Source code that a file carries (the public code base's
snapshots do) is skipped over as the text that it is.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import InputError
from models.pickles import STORAGES, PickleReader, StandIn, plain_dict, plain_set, require_tree

LARGEST_TENSOR = 2**20  # numbers, of all its tensors together
MOST_PARTS = 50_000  # of the structure; a snapshot has some five hundred


def predictor_state(path: Path, content: bytes) -> object:
    """The state of the predictor under the key `model`, as its class would be given it; None where there is none.

    Raises InputError, naming `path`, at a name that no snapshot needs; pickle.UnpicklingError where it is no pickle.
    """
    unpickled = _Reader(path).read(content)
    model = unpickled.get("model") if isinstance(unpickled, dict) else None
    state = model.state if isinstance(model, _Predictor) else None
    require_tree(state, most=MOST_PARTS)
    return state


class _Predictor(StandIn):
    """Stands for an EPD_predictor: none of its code runs while the file is read."""


def _persistent(meta: object) -> StandIn:
    """Stands for the public code base's reconstruction from embedded source: keeps the state, ignores the source."""
    if not isinstance(meta, dict):
        raise pickle.UnpicklingError("a persistent object without its description")
    stand_in = _Predictor() if meta.get("class_name") == "EPD_predictor" else StandIn()
    stand_in.state = meta.get("state")
    return stand_in


def _parameter(tensor: Tensor, *_: object) -> Tensor:
    """Stands for torch._utils._rebuild_parameter: the numbers alone."""
    return tensor


_STAND_INS: Mapping[str, Any] = {
    "builtins.set": plain_set,
    "collections.OrderedDict": plain_dict,
    "dnnlib.util.EasyDict": plain_dict,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.nn.modules.activation.Sigmoid": StandIn,
    "torch.nn.modules.activation.Softmax": StandIn,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "training.networks.EPD_predictor": _Predictor,
}


class _Reader:
    """Builds tensors, plain containers and stand-ins, and nothing else: no name in the file is ever imported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers = 0  # of all tensors so far
        self._known = {
            **_STAND_INS,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch.storage._load_from_bytes": self._storage,
        }

    def read(self, content: bytes) -> object:
        """What the pickle describes. Raises InputError at a name that no snapshot needs."""
        return PickleReader(self._stand_in, most=MOST_PARTS).load(io.BytesIO(content))

    def _stand_in(self, module: str, name: str) -> Any:
        if module == "solvers" and name.endswith("_sampler"):  # the public training loss names its samplers
            return StandIn
        return self._one_of(self._known, module, name)

    def _one_of(self, known: Mapping[str, Any], module: str, name: str) -> Any:
        if f"{module}.{name}" not in known:
            raise InputError(
                f"{self.path}: refused, nothing in it was run: it asks for {module}.{name}, which no snapshot needs"
            )
        return known[f"{module}.{name}"]

    def _count(self, numbers: int) -> None:
        self._numbers += numbers
        if self._numbers > LARGEST_TENSOR:
            raise pickle.UnpicklingError(f"a tensor of {numbers:,} numbers")

    def _storage(self, content: bytes) -> Tensor:
        """Stands for torch.storage._load_from_bytes: the numbers [M] of a tensor, in torch's format of five pickles.

        They are a mark, a version, facts of the machine, the description and the names of what follows: for the one
        tensor its length in eight bytes, and its numbers.
        """
        file = io.BytesIO(content)
        resolve = partial(self._one_of, STORAGES)
        *_, described, _ = (PickleReader(resolve, tuple, most=MOST_PARTS).load(file) for _ in range(5))
        _, dtype, _, _, numbers, _ = described
        self._count(numbers)
        start = file.tell() + 8
        return torch.frombuffer(bytearray(content[start : start + numbers * dtype.itemsize]), dtype=dtype)

    def _tensor(self, storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Tensor:
        """Stands for torch._utils._rebuild_tensor_v2: a copy."""
        self._count(math.prod(size))
        return storage.as_strided(tuple(size), tuple(stride), offset).clone()
