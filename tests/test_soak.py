"""The watch of a long run: what it reads of a process, and what it calls broken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.soak import Sample, faults, watch
from errors import InputError

RUN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({status}))
file = pathlib.Path({root!r}) / "run" / "logs" / "metrics.jsonl"
file.parent.mkdir(parents=True)
while True:
    with file.open("a") as rows:
        rows.write('{{"step": 1, "seconds/step": 0.1}}\\n')
    time.sleep(0.1)
"""


def test_a_process_is_watched_and_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN.format(root=str(tmp_path), status=143)]
    samples, steps = watch(command, tmp_path, 0.03)
    assert samples[-1].rows > samples[0].rows
    assert all(one.memory > 1e6 and one.files >= 3 for one in samples)
    assert set(steps) == {0.1}


def test_a_run_that_does_not_end_as_it_should_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ended with 1 after SIGTERM"):
        watch([sys.executable, "-c", RUN.format(root=str(tmp_path), status=1)], tmp_path, 0.01)


@pytest.mark.parametrize(
    ("memory", "files", "processor", "broken"),
    [(0, 0, 0, []), (5e4, 0, 0, ["memory"]), (0, 1 / 240, 0, ["open files"]), (0, 0, 0.01, ["time"])],
)
def test_what_grows_is_broken(memory: float, files: float, processor: float, broken: list[str]) -> None:
    """Growth a second, of 100 MB, 8 files and a second of processor time a row."""
    samples = [
        Sample(s, int(1e8 + memory * s), 8 + int(files * s), s + processor * s**2 / 2, s + 1) for s in range(300)
    ]
    assert faults(samples, [1.0] * 300, 1.0) == broken
