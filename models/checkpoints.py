"""Reading single-file checkpoints of models without ever running code from them."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from errors import InputError, is_too_little_memory

# What Lightning writes beside the weights: settings and scalars of the training run, of no use here. Objects of these
# types are read as empty stand-ins; the classes that a file names are never imported.
BOOKKEEPING = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf)\..+"
    r"|numpy(\.core|\._core)?\.(multiarray\.scalar|multiarray\._reconstruct|dtype|ndarray)"
    r"|_codecs\.encode|typing\.Any"
)
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth")
UNREADABLE = (RuntimeError, ValueError, EOFError, IndexError, pickle.UnpicklingError)


class _StandIn:
    """Takes the place of any bookkeeping object: accepts every argument and state, keeps nothing, does nothing."""

    def __new__(cls, *_: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def check_checkpoint(path: Path) -> None:
    """Look whether a file is what its suffix says, and whole, without reading its tensors.

    Raises `InputError`, which says what the file is instead.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return
        except SafetensorError as error:
            raise InputError(f"{path} is no readable safetensors file: {looks_like(path)} ({error}).") from error
    if path.suffix not in TORCH_SUFFIXES:
        raise InputError(f"{path}: a model file must end in .safetensors, .ckpt, .pt or .pth.")
    # Only the zip format of torch >= 1.6: it can be mapped, and what it names can be listed before anything is built.
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is no readable torch checkpoint: {looks_like(path)}.")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .ckpt, .pt or .pth file, by name, on the CPU, mapped from disk where possible.

    All but the first may nest them under `state_dict`. Raises `InputError`, which says what the file is instead, for
    anything that is no such file, is cut off, or names objects that are neither tensors nor the bookkeeping of a
    training run.
    """
    check_checkpoint(path)
    return load_file(path) if path.suffix == ".safetensors" else _read_ckpt(path)


def _read_ckpt(path: Path) -> dict[str, Tensor]:
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except UNREADABLE as error:
        raise InputError(f"{path} is no readable torch checkpoint: {error}") from error
    refused = sorted(name for name in named if not BOOKKEEPING.fullmatch(name))
    if refused:
        raise InputError(
            f"{path} is refused: besides tensors it names {', '.join(refused)}, which could run code. "
            "Nothing of it was run. Get the .safetensors version of this model."
        )
    try:
        with torch.serialization.safe_globals([(_StandIn, name) for name in named]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        if is_too_little_memory(error):
            raise
        raise InputError(f"{path} is no readable torch checkpoint: {error}") from error
    return _tensors_of(content, path)


def _tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not the named tensors of a model.")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def looks_like(path: Path) -> str:
    """What a file that cannot be read appears to be, by its first bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if size == 0:
        return "it is empty; fetch it again"
    if start.lstrip()[:1] == b"<":
        return "it is an HTML or XML page, saved in the place of the download; fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull`, or download the file itself"
    if start.startswith(b"PK\x03\x04"):
        return f"it is a torch checkpoint (zip), cut off or misnamed, {size} bytes long; fetch it again"
    if start[8:9] == b"{":
        return f"it is a safetensors file, cut off or misnamed, {size} bytes long; fetch it again"
    if start.startswith(b"\x80"):
        return "it is a bare pickle, which is never read; get the .safetensors version"
    return f"its {size} bytes are in no known format"
