"""Tests marked `integration` run only with EPD_INTEGRATION_TEST=1, a CUDA device and the real assets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[3]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _reason_to_skip()
    for item in items:
        if reason and item.get_closest_marker("integration"):
            item.add_marker(pytest.mark.skip(reason=reason))


def _reason_to_skip() -> str | None:
    if os.environ.get("EPD_INTEGRATION_TEST") != "1":
        return "integration test: set EPD_INTEGRATION_TEST=1 to run it"
    if not torch.cuda.is_available():
        return "integration test: torch finds no CUDA device here"
    return None


@pytest.fixture
def asset() -> Callable[[str], Path]:
    """Path of an asset, relative to the repository; the test is skipped where the file is not there."""

    def find(relative: str) -> Path:
        path = REPOSITORY / relative
        if not path.exists():
            pytest.skip(f"the asset {relative} is not here; `python -m models.assets doctor` says how to fetch it")
        return path

    return find
