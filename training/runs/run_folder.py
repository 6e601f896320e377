"""The folder that a run writes (design.md, section 7): names, and the log of metrics.

exps/<timestamp>-<run_name>/
    configs/resolved_config.yaml     what the run was told, snapshot and overrides merged in
    logs/metrics.jsonl               one JSON object a step; TensorBoard's event files lie beside it
    checkpoints/policy-stepXXXXXX.pt and policy-best.pt
    samples/                         images of the same held-out prompts and seeds at each evaluation
    export/                          what export_epd_predictor.py writes
    report.html
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from errors import InputError
from files import append_whole, removed_if_it_fails, unused, write_atomically

log = logging.getLogger(__name__)

SHOWN_LINES = 10  # numbers of lines in a message
LONGEST_NAME = 200  # bytes of a run's name; file systems take 255 with the time before it


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one run lies."""

    path: Path

    @classmethod
    def create(cls, output_root: str | Path, run_name: str, config: str) -> RunFolder:
        """A new folder, named by the time and the run's name, with the configuration's text in it.

        Raises:
            InputError: `run_name` is no plain file name, or the folder cannot be made; then there is none.
        """
        if fault := name_fault(run_name):
            raise InputError(fault)
        try:
            folder = cls(_new_folder(Path(output_root), run_name))
            with removed_if_it_fails(folder.path):
                for part in (folder.config.parent, folder.logs, folder.checkpoints, folder.samples):
                    part.mkdir()
                write_atomically(folder.config, config.encode())
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be made ({error.strerror})") from error
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of a run that exists, or that a checkpoint in it belongs to.

        Raises:
            InputError: there is no such run.
        """
        path = Path(path)
        root = path.parent.parent if path.suffix == ".pt" else path
        folder = cls(root)
        if not folder.config.is_file():
            raise InputError(f"{path}: no folder of a run (there is no {folder.config})")
        return folder

    @property
    def config(self) -> Path:
        """The resolved configuration, YAML."""
        return self.path / "configs" / "resolved_config.yaml"

    @property
    def logs(self) -> Path:
        """Folder of the metrics and of TensorBoard's event files."""
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.logs / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of the preview images."""
        return self.path / "samples"

    @property
    def export(self) -> Path:
        """Folder of the exported predictors."""
        return self.path / "export"

    @property
    def report(self) -> Path:
        """The report of the run, HTML."""
        return self.path / "report.html"


def name_fault(run_name: str) -> str | None:
    """Why a run cannot be called so, or None."""
    plain = Path(run_name).name == run_name and not run_name.startswith(".") and run_name.isprintable()
    if run_name and plain and len(run_name.encode()) <= LONGEST_NAME:
        return None
    return (
        f"run.run_name={run_name[:LONGEST_NAME]!r}: it becomes a part of a folder's name: no slashes, no leading dot, "
        f"nothing that does not print, at most {LONGEST_NAME} bytes"
    )


def _new_folder(output_root: Path, run_name: str) -> Path:
    """Make `<timestamp>-<run_name>`; where a run of that name began in the same second, wait for the next one."""
    output_root.mkdir(parents=True, exist_ok=True)
    while True:
        now = datetime.now()
        path = output_root / f"{now:%Y%m%d-%H%M%S}-{run_name}"
        try:
            path.mkdir()
        except FileExistsError:
            time.sleep(1 - now.microsecond / 1e6)
        else:
            return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, in order; a last line that a crash cut off is left out.

    Raises:
        InputError: the file is missing, or another line than the last is no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line, "step")
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise InputError(f"{path}, line {number}: no row of metrics, a JSON object with a whole number `step`")
    return rows


def _row(line: str | bytes, key: str) -> dict[str, Any] | None:
    """What a line says: an object with a whole number under `key`; None: it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get(key)) is int else None


def seconds_by_phase(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean seconds a step by phase, the longest first; `other` is what no phase accounts for. Empty without steps.

    Args:
        rows: of the metrics file; those without a step's time are passed over.
    """
    timed = [row for row in rows if "seconds/step" in row]
    spent: dict[str, float] = {}
    for row in timed:
        for name, seconds in row.items():
            phase = name.removeprefix("seconds/")
            if phase not in (name, "step"):
                spent[phase] = spent.get(phase, 0.0) + seconds / len(timed)
    if timed:
        whole = sum(row["seconds/step"] for row in timed) / len(timed)
        spent["other"] = max(0.0, whole - sum(spent.values()))
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


class GrowingFile:
    """Appends to a file; what a full disk refuses is kept and written with what comes later."""

    def __init__(self, path: Path, what: str, first: Sequence[bytes] = ()) -> None:
        """`path`: the file, made by the first `add`, which writes `first` before all else. `what`: it is made of."""
        self.path, self._what, self._pending = path, what, list(first)

    def add(self, *pieces: bytes) -> None:
        """Write them.

        Raises:
            InputError: the file cannot be written now; the pieces are kept and tried again by the next call.
        """
        self._pending += pieces
        try:
            append_whole(self.path, b"".join(self._pending))
        except OSError as error:
            waiting = f"{len(self._pending)} {self._what} wait in memory"
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); {waiting}") from error
        self._pending.clear()


class MetricsLog:
    """Appends rows to a metrics file, as `GrowingFile` does."""

    def __init__(self, path: Path, key: str = "step") -> None:
        """`path`: the file, made by the first row. `key`: what numbers the rows."""
        self.path, self._key = path, key
        self._rows = GrowingFile(path, "rows")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row. Raises InputError where that cannot be now; it is tried again by the next call."""
        self._rows.add((json.dumps(row) + "\n").encode())

    def rewind(self, step: int) -> int:
        """Forget the rows after `step`, which a resumed run makes again, and lines that are damaged, which is said.

        A copy of the file as it was stays beside it.

        Returns:
            How many rows after `step` there were.

        Raises:
            InputError: the file cannot be read or written.
        """
        if not self.path.exists():
            return 0
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from error
        *lines, cut_off = content.split(b"\n")  # after the last newline stands what a crash cut off, or nothing
        rows = [_row(line, self._key) for line in (*lines, cut_off)]
        damaged = [str(number) for number, row in enumerate(rows[:-1], start=1) if row is None]
        kept = [line for line, row in zip((*lines, cut_off), rows, strict=True) if row and row[self._key] <= step]
        moved = sum(row is not None for row in rows) - len(kept)
        if damaged or moved:
            copy = unused(self.path.with_stem(f"{self.path.stem}-before-resume-at-{self._key}{max(step, 0):06d}"))
            write_atomically(copy, content)
        if damaged:
            log.warning(
                "%s: line %s is damaged and left out; the file as it was is kept in %s",
                self.path,
                ", ".join(damaged[:SHOWN_LINES]) + (" ..." if len(damaged) > SHOWN_LINES else ""),
                copy.name,
            )
        write_atomically(self.path, b"".join(line + b"\n" for line in kept))
        return moved
