"""A process that has all modules loaded, forks for each command that it is handed, and strikes where it is told.

    python -m tests.faults.strikes

reads a list of modules, then a `Job` a line, and answers each with the status that the command ended with. What is
struck are true commands, as `python -m` runs them, with nothing of theirs replaced: before each operation on a file
below the folder that they work in (an audit hook tells of open, rename, mkdir, rmdir and remove; write and fsync are
watched besides), a line goes to the trace, and the operation whose turn it is meets a signal, or is refused.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "stop": signal.SIGSTOP}
TORN, FULL, FULL_FOR_EVER, GONE, READ_ONLY = "torn", "full", "full for ever", "gone", "read-only"
PR_SET_CHILD_SUBREAPER = 36
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
REMOVING = ("os.remove", "os.rmdir")
WATCHED = {"open", "os.rename", "os.mkdir", *REMOVING}


@dataclass(frozen=True)
class Job:
    """A command to carry out.

    Attributes:
        module, arguments: as for `python -m`.
        folder: that it works in; what lies in it is watched.
        log, trace: files for what it prints and for its operations, outside of the folder.
        strike: what happens, a key of `SIGNALS` or one of the others; "": nothing.
        at: at which operation, from 1; a fraction: after so many seconds.
        user: whose id the command has; None: that of the tests.
    """

    module: str
    arguments: Sequence[str]
    folder: str
    log: str
    trace: str
    strike: str = ""
    at: float = 0
    user: int | None = None


class Striker:
    """Counts the operations of a process, and strikes once."""

    def __init__(self, job: Job) -> None:
        self.job, self.on, self.count = job, True, 0
        self.trace = os.open(job.trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.fsync, self.open = os.fsync, io.open
        os.fsync = self._fsync
        io.open = sys.modules["builtins"].open = self._open
        sys.addaudithook(self._hear)

    def inside(self, path: Any) -> bool:
        """Whether a path leads below the folder."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return Path(self.job.folder) in Path(os.fsdecode(path)).absolute().parents

    def _hear(self, event: str, arguments: tuple) -> None:
        if event in WATCHED and self.on and self.inside(arguments[0]):
            reading = event == "open" and not (arguments[2] or 0) & WRITING
            self.before("read" if reading else event, arguments[0])

    def _fsync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if self.on and self.inside(path):
            self.before("fsync", path)
        self.fsync(descriptor)

    def _open(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
        newline: Any = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        """As `open`; what is written to a file inside is told beforehand."""
        if not self.on or set(mode).isdisjoint("wax+") or not self.inside(file):
            return self.open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = Watched(self, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)

    def before(self, operation: str, path: Any) -> bool:
        """Note an operation, and strike if its turn has come; whether a write is to be a short one, of half the bytes.

        What changes nothing on the disk (a kill after it is a kill before it) has a `=` in the trace, all else a `+`.
        """
        self.count += 1
        there, strike = os.path.lexists(path), self.job.strike
        idle = operation in ("read", "fsync") or (
            there if operation == "os.mkdir" else operation in REMOVING and not there
        )
        name = os.path.relpath(os.fsdecode(path), self.job.folder)
        os.write(self.trace, f"{'=' if idle else '+'} {operation} {name}\n".encode())
        if self.count != self.job.at and not (strike == FULL_FOR_EVER and self.count > self.job.at):
            return False
        if strike in SIGNALS:
            os.kill(os.getpid(), SIGNALS[strike])
        elif operation == "write" and strike in (TORN, FULL, FULL_FOR_EVER) and self.count == self.job.at:
            return True
        elif strike in (FULL, FULL_FOR_EVER) and operation not in ("read", *REMOVING):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))
        elif strike in (GONE, READ_ONLY):
            self.on = False
            (_take_away if strike == GONE else _forbid)(Path(self.job.folder))
        return False


def _take_away(folder: Path) -> None:
    Path(f"{folder}.gone").mkdir()
    for part in folder.iterdir():
        part.rename(f"{folder}.gone/{part.name}")


def _forbid(folder: Path) -> None:
    for part in (*folder.rglob("*"), folder):
        part.chmod(0o555 if part.is_dir() else 0o444)


class Watched(io.FileIO):
    """A file that tells of what is written to it."""

    def __init__(self, striker: Striker, *arguments: Any) -> None:
        self._striker = striker
        super().__init__(*arguments)

    def write(self, content: Any) -> int:
        if not self._striker.on or not self._striker.before("write", self.name):
            return super().write(content)
        written = super().write(bytes(content)[: len(content) // 2])
        if self._striker.job.strike == TORN:
            os.kill(os.getpid(), signal.SIGKILL)
        return written  # as of a disk that has room for no more


class Forked:
    """In the place of `subprocess.Popen`, for `python -m` in a struck process: forks too, and is not struck itself."""

    def __init__(self, command: Sequence[str], striker: Striker, stdout: Any, stderr: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            striker.on = False
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            _end(command[2], command[3:])

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("the command", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(module: str, arguments: Sequence[str]) -> None:
    sys.argv = [module, *arguments]
    warnings.filterwarnings("ignore", message=".*found in sys.modules")
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end(module: str, arguments: Sequence[str]) -> NoReturn:
    """Carry a command out, and end as it would."""
    status = 0
    try:
        _run(module, arguments)
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _become(job: Job) -> None:
    """In a new process: its folder, its output, its user, and the strike that waits for it."""
    os.chdir(job.folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    striker = Striker(job)
    started = subprocess.Popen

    def start(command: Any, *arguments: Any, **options: Any) -> Any:
        if command[0] != sys.executable:
            return started(command, *arguments, **options)
        return Forked(command, striker, options["stdout"], options["stderr"])

    subprocess.Popen = start
    if job.user is not None:
        os.setgroups([])
        os.setgid(job.user)
        os.setuid(job.user)


def _awaited(pid: int, job: Job) -> int:
    """The status that a process ends with; one that stops is let go on."""
    if job.strike in SIGNALS and job.at != int(job.at):
        time.sleep(job.at)
        os.kill(pid, SIGNALS[job.strike])  # it is not waited for before: the id is its own still
    while True:
        status = os.waitpid(pid, os.WUNTRACED)[1]
        if not os.WIFSTOPPED(status):
            break
        time.sleep(0.2)
        os.kill(pid, signal.SIGCONT)
    with suppress(ChildProcessError):  # what it had started and left behind comes to its end too
        while True:
            os.wait()
    return os.waitstatus_to_exitcode(status)


class Server:
    """The other end: the process that carries jobs out, one at a time."""

    def __init__(self, modules: Sequence[str], repository: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.strikes"],
            cwd=repository,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Not as arguments: who ends processes by a command's name would end this one.
        self._process.stdin.write(json.dumps(modules) + "\n")
        self._process.stdin.flush()

    def carry_out(self, job: Job) -> int:
        """The command's exit status; of one that a signal ended, its number below 0."""
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks ended with {self._process.wait()}")
        return int(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for module in json.loads(sys.stdin.readline()):
        import_module(module)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        modules = Path(f"{job.trace}.modules")
        pid = os.fork()
        if pid == 0:
            _become(job)
            try:
                _run(job.module, job.arguments)
            finally:
                if not job.strike:
                    modules.write_text(" ".join(sys.modules))
            return
        print(_awaited(pid, job), flush=True)
        for name in modules.read_text().split() if modules.exists() else ():  # so that the next one need not load them
            with suppress(Exception):
                import_module(name)


if __name__ == "__main__":
    main()
