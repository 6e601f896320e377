"""What a run writes for TensorBoard: read back by TensorBoard itself, and on a disk that is full for a while."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training.runs.run_folder
from errors import InputError
from training.runs.events import EventFile


def read(folder):
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_reads_what_was_written(tmp_path):
    events = EventFile(tmp_path, 1)
    events.scalars({"reward": 0.25, "kl": 1e-3}, 1)
    events.scalars({"reward": 0.5}, 2)
    events.picture("held-out", np.zeros((4, 15, 3), dtype=np.uint8), 2)
    events.figure("table", Figure(figsize=(2, 1), dpi=50), 2)
    found = read(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("reward")] == [(1, 0.25), (2, 0.5)]
    assert [event.value for event in found.Scalars("kl")] == pytest.approx([1e-3])
    sizes = {name: (found.Images(name)[0].width, found.Images(name)[0].height) for name in found.Tags()["images"]}
    assert sizes["table"] == (100, 50)
    assert sizes["held-out"] == (15, 4)


def test_a_run_that_goes_on_supersedes_the_steps_that_it_makes_again(tmp_path):
    first = EventFile(tmp_path, 1)
    for step in (1, 2, 3):
        first.scalars({"reward": 0.0}, step)
    again = EventFile(tmp_path, 2)
    again.scalars({"reward": 1.0}, 2)
    assert [(event.step, event.value) for event in read(tmp_path).Scalars("reward")] == [(1, 0.0), (2, 1.0)]


def test_events_survive_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch):
    events = EventFile(tmp_path, 1)

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(training.runs.run_folder, "append_whole", full)
        for step in (1, 2):
            with pytest.raises(InputError, match="No space left on device"):
                events.scalars({"reward": 0.5}, step)
    events.scalars({"reward": 0.5}, 3)
    assert [event.step for event in read(tmp_path).Scalars("reward")] == [1, 2, 3]


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
