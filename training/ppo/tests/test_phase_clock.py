"""The clock of a step: what is counted where, and that measuring does not make the host wait."""

import sys
import time

import pytest
import torch

from training.ppo.phase_clock import CudaTimer, HostTimer, PhaseClock, timer_of

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class ScriptedTimer:
    """A device that is at the given moments when it is marked; they can be read only after it was waited for."""

    def __init__(self, moments):
        self.moments, self.waits, self.passed = iter(moments), 0, 0
        self.marked = 0

    def mark(self):
        self.marked += 1
        return self.marked, next(self.moments)

    def wait(self):
        self.waits += 1
        self.passed = self.marked

    def seconds(self, first, last):
        assert max(first[0], last[0]) <= self.passed
        return last[1] - first[1]


def test_a_phase_inside_another_counts_for_itself_alone():
    # outer 0..100 holds inner 10..30 and 40..45; the second holds innermost 41..43; later 100..107
    timer = ScriptedTimer([0, 10, 30, 40, 41, 43, 45, 100, 100, 107])
    clock = PhaseClock(timer)
    with clock.measure("outer"):
        with clock.measure("inner"):
            pass
        with clock.measure("inner"), clock.measure("innermost"):
            pass
    with clock.measure("later"):
        pass
    assert clock.take() == {"outer": 75, "inner": 23, "innermost": 2, "later": 7}


def test_the_device_is_waited_for_once_when_the_times_are_read():
    timer = ScriptedTimer(range(100))
    clock = PhaseClock(timer)
    for _ in range(10):
        with clock.measure("outer"), clock.measure("inner"):
            pass
    assert timer.waits == 0
    assert clock.take() == {"outer": 20, "inner": 10}
    assert timer.waits == 1
    assert clock.take() == {}


def test_a_phase_that_fails_is_counted_and_closed():
    clock = PhaseClock(ScriptedTimer([0, 1, 4, 9, 9, 11]))
    with pytest.raises(KeyError), clock.measure("outer"), clock.measure("inner"):
        raise KeyError
    with clock.measure("outer"):
        pass
    assert clock.take() == {"outer": 8, "inner": 3}


def test_the_hosts_clock_runs():
    clock = PhaseClock(timer_of(torch.device("cpu")))
    with clock.measure("outer"):
        time.sleep(0.01)
        with clock.measure("inner"):
            time.sleep(0.05)
    seconds = clock.take()
    assert seconds["inner"] >= 0.05
    assert 0.01 <= seconds["outer"] < 0.05


def test_each_device_gets_its_timer():
    assert isinstance(timer_of(torch.device("cpu")), HostTimer)
    assert isinstance(timer_of(torch.device("cuda")), CudaTimer)


@needs_cuda
def test_on_cuda_work_is_timed_where_it_is_done_and_measuring_does_not_wait():
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    clock = PhaseClock(timer_of(device))
    torch.cuda.synchronize()
    start = time.perf_counter()
    with clock.measure("product"):
        for _ in range(50):
            matrix @ matrix
    handed_over = time.perf_counter() - start
    seconds = clock.take()["product"]
    whole = time.perf_counter() - start
    assert handed_over < 0.5 * seconds
    assert seconds <= whole


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
