"""Property-based tests draw the same examples in every run of continuous integration, and new ones elsewhere.

Nowhere do they have a deadline: how long an example takes says more about what else the machine does. And a shell that
starts the tests in the background has them, and all processes that they start, ignore interrupts: here they count.
"""

import os
import signal

import pytest
from hypothesis import settings

settings.register_profile("continuous-integration", deadline=None, derandomize=True)
settings.register_profile("elsewhere", deadline=None)
settings.load_profile("continuous-integration" if os.environ.get("CI") else "elsewhere")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long tests/faults and tests/test_fuzz.py go on."""
    parser.addoption("--faults", default="1", metavar="N", help="strikes at each command of tests/faults, or all")
    parser.addoption("--fuzz", default=500, type=int, metavar="N", help="spoiled files of tests/test_fuzz.py, in all")


@pytest.fixture(scope="session")
def faults(request: pytest.FixtureRequest) -> str:
    """A number of strikes, or `all`."""
    return request.config.getoption("--faults")


@pytest.fixture(scope="session")
def fuzz(request: pytest.FixtureRequest) -> int:
    """How many spoiled files are read."""
    return request.config.getoption("--fuzz")
