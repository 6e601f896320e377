"""What a signal does to a command: it ends in a line, with the status that shells show, and a run between two steps.

SIGINT (Ctrl-C) and SIGTERM are treated alike. Imports nothing that takes long, so that it can be asked first of all.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn


class Interrupted(KeyboardInterrupt):
    """A signal ended a command before its end; the message says how to go on, if that is possible."""

    def __init__(self, number: int, message: str = "") -> None:
        """`number`: the signal's."""
        super().__init__(message)
        self.number = number


def exit_status(error: KeyboardInterrupt) -> int:
    """The status that shells show for a process that a signal ended: 130 or 143."""
    return 128 + getattr(error, "number", signal.SIGINT)


def end_at_once_on_signals() -> None:
    """From now until a command takes over, end in a line: Python traces back what interrupts the loading of modules.

    What is loaded then has its idle threads sleep, unless the environment says OMP_WAIT_POLICY: beside another process,
    threads that wait for each other by spinning take each other's core.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads it once, when torch is loaded
    for number in _heeded():
        signal.signal(number, _end_at_once)


def end_at_once_where_started() -> None:
    """`end_at_once_on_signals` for a package, while `python -m` looks in it for the module that is the command."""
    if sys.argv[0] == "-m":  # so called until that is found
        end_at_once_on_signals()


@contextmanager
def signals_raise() -> Iterator[None]:
    """Have a signal raise `Interrupted`, so that what is half done is tidied up."""
    received: list[int] = []
    hook = sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        raise Interrupted(number)

    def unraisable(problem: sys.UnraisableHookArgs) -> None:
        if issubclass(problem.exc_type, KeyboardInterrupt):  # it struck in a destructor, where Python would drop it
            _end_at_once(received[-1] if received else signal.SIGINT, None)
        hook(problem)

    handlers = {number: signal.signal(number, interrupt) for number in _heeded()}
    sys.unraisablehook = unraisable
    try:
        yield
    except Exception:
        if received:  # a library that it struck in made another error of it
            raise Interrupted(received[-1]) from None
        raise
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def goes_on_by(command: str) -> Iterator[None]:
    """Have an interrupt say the command that goes on where it struck."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(getattr(error, "number", signal.SIGINT), f"go on: {command}") from None


class Interrupts:
    """While active, a first signal is remembered instead of obeyed; a second one is obeyed."""

    def __init__(self) -> None:
        """Not active yet, nothing remembered."""
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        """Start to listen."""
        self._previous = {number: signal.signal(number, self._remember) for number in _heeded()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        name = signal.Signals(number).name
        _say(f"\n{name}: the step is finished and a checkpoint saved; once more ends at once, without\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _heeded() -> list[signal.Signals]:
    """What interrupts this process: not what whoever started it (nohup) had it ignore, nothing in a further thread."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    _say("interrupted\n")
    os._exit(128 + number)


def _say(text: str) -> None:
    """Write past all buffers: a signal may have struck inside a write to one."""
    os.write(2, text.encode())
