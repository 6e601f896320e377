"""Files and folders that appear whole or not at all, what killed processes leave of them, and folders with one writer.

A temporary is locked by its writer (flock) for as long as it is written. The system gives the lock back however the
writer ends, so what can be locked is nobody's any more. Where a file system knows no locks, nothing is removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from itertools import count
from pathlib import Path

from errors import InputError

TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]+\.tmp", re.DOTALL)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old file or the new one, never a part.

    Raises:
        InputError: it cannot be written (no such disk, no room, no right); what was there before is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new, empty file or folder beside `path`; it takes that place, on disk, when the block ends well.

    Raises:
        InputError: it cannot be written; what was there before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _swept_once(path.parent)
        temporary, descriptor = _new_temporary(path, folder=folder)
        try:
            yield temporary
            for written in (*temporary.rglob("*"), temporary):
                _flush_to_disk(written)
            (_put_folder if folder else move)(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                _remove(temporary)
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def removed_if_it_fails(folder: Path) -> Iterator[None]:
    """Remove a folder that was just made where the block, which fills it, does not end well."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def append_whole(path: Path, content: bytes) -> None:
    """Append to a file all of `content` or nothing. Raises OSError where there is no room for it."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(content) != len(content):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, on disk. Raises OSError."""
    source.replace(target)
    _flush_to_disk(target.parent)


def unused(path: Path) -> Path:
    """`path`, or where that is taken the first of `<stem>-2`, `<stem>-3`, ... that is not."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return next(other for other in others if not other.exists()) if path.exists() else path


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written in a folder; what is being written now stays."""
    with suppress(OSError):  # no such folder, or none that may be read
        for temporary in folder.iterdir():
            if TEMPORARY_NAME.fullmatch(temporary.name):
                _remove_if_left(temporary)


_swept_once = cache(sweep)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make a folder where there is none, sweep it and the folders in it, and hold it against other processes.

    Raises:
        InputError: another process holds it by this function, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror})") from error
    try:
        _hold(descriptor, folder)
        for part in (folder, *filter(Path.is_dir, folder.iterdir())):
            sweep(part)
        yield
    finally:
        os.close(descriptor)


def _hold(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{folder}: another process is writing to it; wait for its end, or choose another folder"
        ) from None
    except OSError:  # a file system without locks
        pass


def _new_temporary(path: Path, *, folder: bool) -> tuple[Path, int]:
    """A temporary for `path`, and the descriptor that keeps it locked."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir() if folder else temporary.touch(exist_ok=False)
        descriptor = os.open(temporary, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():  # nobody swept it before it was locked
            return temporary, descriptor
        os.close(descriptor)


def _put_folder(temporary: Path, folder: Path) -> None:
    """Put a folder in the place of another. Killed between the two renames, it leaves the other as `.<name>.old`."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    move(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    """Have a file's content, or a folder's entries where its file system can flush them, survive a loss of power."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_if_left(temporary: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(temporary, os.O_RDONLY | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(temporary)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
