"""Events for TensorBoard, written where they are made: torch's writer has a thread for it, which a full disk kills."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from training.runs.run_folder import GrowingFile


class EventFile:
    """An event file of a run, which grows as `GrowingFile` does."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Nothing is written yet. Events from `first_step` on of the folder's earlier files are superseded by it."""
        path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        start = Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
        self._file = GrowingFile(path, "events", [_record(version), _record(start)])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a number for each name. Raises InputError where the file cannot be written now."""
        self._append([summary.scalar(name, value) for name, value in values.items()], step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add a picture, uint8 [H, W, 3]. Raises InputError where the file cannot be written now."""
        self._append([summary.image(name, pixels, dataformats="HWC")], step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Add a figure. Raises InputError where the file cannot be written now."""
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self.picture(name, np.asarray(canvas.buffer_rgba())[..., :3], step)

    def _append(self, summaries: list[Summary], step: int) -> None:
        self._file.add(*(_record(Event(wall_time=time.time(), step=step, summary=part)) for part in summaries))


def _record(event: Event) -> bytes:
    buffer = BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
