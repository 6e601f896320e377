"""Ending a run between two steps instead of inside one."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While active, a first SIGINT or SIGTERM is remembered instead of obeyed; a second one is obeyed."""

    def __init__(self) -> None:
        """Not active yet, nothing remembered."""
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        """Start to listen."""
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        name = signal.Signals(number).name
        tqdm.write(f"{name}: the step is finished and a checkpoint saved; once more ends at once, without")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
