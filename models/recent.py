"""Tensors that are likely to be asked for again: the latest, as many as little memory holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Generic, TypeVar

from torch import Tensor

Kept = TypeVar("Kept", Tensor, Mapping[str, Tensor])

MOST_BYTES = 2**25
"""What may be kept where nobody says otherwise."""


class RecentTensors(Generic[Kept]):
    """Tensors, or named sets of them, by a text; the least recently used are forgotten where they are too large."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        """Nothing is kept yet."""
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._most_bytes = most_bytes
        self.num_bytes = 0
        """Of all that is kept."""

    def get(self, text: str) -> Kept | None:
        """What was kept under `text`, if it has not been forgotten."""
        if text in self._kept:
            self._kept.move_to_end(text)
        return self._kept.get(text)

    def keep(self, text: str, tensors: Kept) -> Kept:
        """Keep tensors that no others share their memory with, under a text that is new; returns them."""
        self._kept[text] = tensors
        self.num_bytes += _bytes_of(tensors)
        while self.num_bytes > self._most_bytes:
            self.num_bytes -= _bytes_of(self._kept.popitem(last=False)[1])
        return tensors


def _bytes_of(kept: Tensor | Mapping[str, Tensor]) -> int:
    return kept.nbytes if isinstance(kept, Tensor) else sum(tensor.nbytes for tensor in kept.values())
