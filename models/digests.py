"""SHA-256 digests of files, kept beside them, so that a damaged one is not taken for the weights that it held."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from errors import InputError
from files import write_atomically


def digest_of(path: Path, algorithm: str = "sha256") -> str:
    """The digest of a file's bytes, in hexadecimal; a file that has not changed since is not read again."""
    state = path.stat()
    return _digest(path, algorithm, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest(path: Path, algorithm: str, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def record_of(path: Path) -> Path:
    """Where the SHA-256 of a file is kept, in the format of sha256sum."""
    return path.with_name(path.name + ".sha256")


def recorded_digest(path: Path) -> str | None:
    """The SHA-256 that is kept beside a file, None where there is no record; an empty one is that of no file."""
    record = record_of(path)
    return next(iter(record.read_text(errors="replace").split()), "") if record.is_file() else None


def record_digest(path: Path, digest: str) -> None:
    """Keep the SHA-256 of a file beside it."""
    write_atomically(record_of(path), f"{digest}  {path.name}\n".encode())


def record_weights(folder: Path) -> None:
    """Keep the SHA-256 of all .safetensors files in a folder, and in those below it, beside each."""
    for path in folder.rglob("*.safetensors"):
        record_digest(path, digest_of(path))


def check_recorded(path: Path) -> None:
    """Raise `InputError` where a file is not what was recorded of it; without a record there is nothing to hold."""
    recorded = recorded_digest(path)
    if recorded is not None and digest_of(path) != recorded:
        record = record_of(path).name
        raise InputError(
            f"{path} is damaged: its SHA-256 is not the one in {record}. Fetch, copy or make it anew (what belongs to "
            f"the repository by git checkout); where it was replaced on purpose, remove {record}."
        )
