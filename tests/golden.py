"""Reference numbers of a public peer implementation, kept beside the checkout (`<repository>/../shared/golden`).

They are never part of the repository. A test that asks for them where they are absent is skipped, and says why:

    def test_something():
        arrays = golden.arrays("schedules")
        ...

`present` is for decorators and for parametrisation at collection time, when skipping a single test is not yet possible.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden"
present = FOLDER.is_dir()
SKIP_REASON = "the golden reference numbers are not beside this checkout (../shared/golden)"
needs_golden = pytest.mark.skipif(not present, reason=SKIP_REASON)

ArrayFile = Literal["solvers", "schedules", "policy"]


def arrays(file: ArrayFile) -> Mapping[str, np.ndarray]:
    """Every array of `<file>.npz` by name; skips the calling test where the files are absent."""
    _skip_if_absent()
    return _load_arrays(file)


def tensor(file: ArrayFile, name: str) -> torch.Tensor:
    """One array of `<file>.npz` as a fresh tensor of its own dtype; skips the calling test where absent."""
    return torch.from_numpy(np.array(arrays(file)[name]))


def solver_cases() -> list[dict[str, Any]]:
    """One entry per solver run (`solvers_index.json`); empty where absent, so that it may parametrise tests."""
    return json.loads((FOLDER / "solvers_index.json").read_text())["cases"] if present else []


def table_names() -> list[str]:
    """Names of the published predictor tables; empty where absent, so that it may parametrise tests."""
    return sorted(path.stem for path in (FOLDER / "tables").glob("*.json"))


def table(name: str) -> dict[str, Any]:
    """A published predictor table (`tables/README.md` names its keys); skips the calling test where it is absent."""
    _skip_if_absent()
    return json.loads((FOLDER / "tables" / f"{name}.json").read_text())


def _skip_if_absent() -> None:
    if not present:
        pytest.skip(SKIP_REASON)


@cache
def _load_arrays(file: ArrayFile) -> Mapping[str, np.ndarray]:
    with np.load(FOLDER / f"{file}.npz") as archive:
        return dict(archive)
