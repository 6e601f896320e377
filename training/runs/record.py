"""What a run writes down while it goes on: metrics, TensorBoard's events, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from errors import InputError
from training.runs.checkpoint import set_aside
from training.runs.events import EventFile
from training.runs.run_folder import MetricsLog, RunFolder

log = logging.getLogger(__name__)


class RunRecord:
    """Training outlives a disk that is full for a while: what cannot be written now is said and passed over."""

    def __init__(self, folder: RunFolder, unit: str) -> None:
        """Nothing is written yet. `unit`: what the run counts, step or epoch."""
        self.folder = folder
        self._unit = unit
        self._metrics = MetricsLog(folder.metrics)
        self._events: EventFile | None = None
        self._saved_step = -1

    def rewind(self, step: int) -> None:
        """Go on from the checkpoint of `step`: take back what was written about later ones; a copy stays."""
        self._saved_step = step
        moved = self._metrics.rewind(step)
        set_aside(self.folder.checkpoints, step)
        if moved:
            log.warning(
                "%d %ss after %s %d are made again; their log is kept in %s",
                *(moved, self._unit, self._unit, step, self.folder.logs),
            )

    def row(self, row: Mapping[str, float], **more: Any) -> None:
        """Log the numbers of a step, and beside them what TensorBoard does not draw."""
        self.attempt("metrics", lambda: self._metrics.append({**row, **more}))
        step = int(row["step"])
        scalars = {name: value for name, value in row.items() if name != "step"}
        self.attempt("TensorBoard", lambda: self.events(step).scalars(scalars, step))

    def events(self, step: int) -> EventFile:
        """The event file, which begins with the first step that is written about."""
        self._events = self._events or EventFile(self.folder.logs, step)
        return self._events

    def is_due(self, step: int, interval: int) -> bool:
        """Whether a multiple of `interval` was passed since the last step whose checkpoint could be saved."""
        return step // interval > max(self._saved_step, 0) // interval

    def save(self, step: int, write: Callable[[], None], *, last: bool) -> None:
        """Have a checkpoint of the step written, if there is none; only the last one must succeed."""
        if self._saved_step == step:
            return
        if last:
            write()
        elif not self.attempt(f"no checkpoint of {self._unit} {step}, it is tried again later", write):
            return
        self._saved_step = step

    @staticmethod
    def attempt(what: str, write: Callable[[], None]) -> bool:
        """Whether it could be written."""
        try:
            write()
        except (InputError, OSError) as error:
            log.warning("%s: %s", what, error)
            return False
        return True
