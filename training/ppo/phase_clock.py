"""Where a step's time goes, without making the host wait for the device while the step is under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch


class HostTimer:
    """Marks moments in a device's work, and tells afterwards how far apart they were.

    By the host's own clock, for devices that are done with a call when it returns.
    """

    def mark(self) -> Any:
        """Mark the moment at which the device has done all that it was given so far; must not wait for it."""
        return perf_counter()

    def wait(self) -> None:
        """Return when every moment marked so far has passed."""

    def seconds(self, first: Any, last: Any) -> float:
        """Seconds between two moments that have passed."""
        return last - first


class CudaTimer(HostTimer):
    """Events in the queue of a CUDA device: a mark costs a few microseconds and stops neither host nor device."""

    def __init__(self, device: torch.device) -> None:
        """Mark the work that the current stream of `device` is given."""
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """Queue an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self._device)

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """The device's own measure; its resolution is half a microsecond."""
        return first.elapsed_time(last) / 1000


def timer_of(device: torch.device) -> HostTimer:
    """The timer that suits a device."""
    return CudaTimer(device) if device.type == "cuda" else HostTimer()


class PhaseClock:
    """Seconds by phase; a phase measured inside another counts for itself alone."""

    def __init__(self, timer: HostTimer) -> None:
        """Start at zero."""
        self._timer = timer
        self._spans: list[tuple[str, str | None, Any, Any]] = []  # phase, the one that it is inside, start, end
        self._open: list[str] = []

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time until the block ends to `phase`."""
        outer = self._open[-1] if self._open else None
        start = self._timer.mark()
        self._open.append(phase)
        try:
            yield
        finally:
            self._open.pop()
            self._spans.append((phase, outer, start, self._timer.mark()))

    def take(self) -> dict[str, float]:
        """The seconds so far, by phase; waits for the device, once. The clock starts again at zero."""
        spans, self._spans = self._spans, []
        self._timer.wait()
        seconds: dict[str, float] = {}
        for phase, outer, start, end in spans:
            spent = self._timer.seconds(start, end)
            seconds[phase] = seconds.get(phase, 0.0) + spent
            if outer is not None:
                seconds[outer] = seconds.get(outer, 0.0) - spent
        return seconds
