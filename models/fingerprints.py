"""What a file, a folder or a model is, as one SHA-256: results that are kept on disk are kept under such names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from errors import InputError
from models import registry
from models.options import AS_IT_IS, ModelOptions


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def fingerprint(paths: Iterable[Path]) -> str:
    """One SHA-256 of the names (below the given paths) and contents of files; folders stand for all files in them."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else path.name
            digest.update(f"{name}\0{file_sha256(file)}\0".encode())
    return digest.hexdigest()


def model_fingerprint(spec: str | Path, options: ModelOptions = AS_IT_IS) -> str:
    """The fingerprint of what `models.load_denoiser(spec)` reads: another weight or option, another fingerprint.

    Raises InputError where something of it is not there.
    """
    weights, model = registry.found(str(spec)), registry.REGISTERED.get(str(spec))
    companions = [registry.SOURCE / asset.path for asset in model.companions] if model else []
    configs = [] if weights.is_dir() else [registry.SOURCE / registry.COMPVIS_CONFIGS]  # a single file lacks its own
    of_files = fingerprint([weights, *companions, *configs, *options.files()])
    if not options.changes():
        return of_files
    return hashlib.sha256(json.dumps([of_files, options.changes()], sort_keys=True).encode()).hexdigest()
