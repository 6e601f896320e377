"""Reading single-file checkpoints of models without ever running code from them."""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from errors import InputError, first_line, is_too_little_memory
from files import write_atomically
from models.digests import check_recorded
from models.pickles import DEEPEST, STORAGES, PickleReader, StandIn, plain_dict, plain_set, require_tree

# What Lightning writes beside the weights: settings and scalars of the training run, of no use here. Objects of these
# types are read as empty stand-ins; the classes that a file names are never imported.
BOOKKEEPING = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf)\..+"
    r"|numpy(\.core|\._core)?\.(multiarray\.scalar|multiarray\._reconstruct|dtype|ndarray)"
    r"|_codecs\.encode|typing\.Any"
)
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth")
UNREADABLE = (OSError, pickle.UnpicklingError)  # what `load_archive` raises
LARGEST_REPEATED = 2**20  # numbers of a tensor in which those of its storage are repeated
MOST_PARTS = 1_000_000  # of a checkpoint's structure; Stable Diffusion 1.x has some fifty thousand

# What the structure of tensors and plain data names; what is called makes no more of what it is given.
TENSOR_NAMES = re.compile(
    r"torch\.(\w+Storage|storage\.UntypedStorage|(bool|b?float|u?int|complex)\w*|Size|device)"
    r"|torch\._utils\._rebuild_(tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|collections\.OrderedDict|_codecs\.encode|(builtins|__builtin__)\.(set|complex)"
)

# Put before the names of all tensors: by DataParallel and averaging, by torch.compile.
WRAPPERS = ("module.", "_orig_mod.")
AVERAGED = "n_averaged"  # how many updates an average has seen (torch.optim.swa_utils)


class ForeignNames(pickle.UnpicklingError):
    """A checkpoint names what is neither a tensor nor the bookkeeping of a training run."""


class _Bookkeeping(StandIn):
    """Takes the place of any bookkeeping object, which keeps nothing."""

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, *_: Any) -> None: ...


def check_checkpoint(path: Path) -> None:
    """Look whether a file is what its suffix says, and whole, without reading its tensors.

    Raises `InputError`, which says what the file is instead.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return
        except SafetensorError as error:
            raise _no_safetensors(path, error) from error
    if path.suffix not in TORCH_SUFFIXES:
        raise InputError(f"{path}: a model file must end in .safetensors, .ckpt, .pt or .pth.")
    # Only the zip format of torch >= 1.6: it has checksums, and can be looked through before anything is built.
    if not _is_zip(path):
        raise InputError(f"{path} is no readable torch checkpoint: {looks_like(path)}.")


def _no_safetensors(path: Path, error: SafetensorError) -> InputError:
    return InputError(f"{path} is no readable safetensors file: {looks_like(path)} ({error}).")


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it claims to be one of several parts
        return False


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .ckpt, .pt or .pth file, by name, on the CPU, mapped from disk where possible.

    All but the first may nest them under `state_dict`. What wrappers of a whole module put before its names
    (`WRAPPERS`) is dropped. Raises `InputError`, which says what the file is instead, for anything that is no such
    file, is cut off or damaged, or names objects that are neither tensors nor the bookkeeping of a training run.
    """
    check_checkpoint(path)
    return read_weights(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """`read_state_dict` of a file whose kind is known; what is no .safetensors was written by torch."""
    if path.suffix == ".safetensors":
        check_recorded(path)
        try:
            return without_wrappers(load_file(path))
        except SafetensorError as error:
            raise _no_safetensors(path, error) from error
    try:
        content = load_archive(path, mapped=True)
    except ForeignNames as error:
        raise InputError(f"{path} is refused: {error} Get the .safetensors version of this model.") from error
    except UNREADABLE as error:
        raise InputError(f"{path} is no readable torch checkpoint: {first_line(error)}") from error
    return _tensors_of(content, path)


def read_module(path: Path) -> dict[str, Tensor]:
    """`read_state_dict`, also of a module that was pickled whole, by the names that its `state_dict` would give.

    Its classes are neither imported nor run: of each object only its tables of parameters, buffers and parts are looked
    at, as plain data.
    """
    check_checkpoint(path)
    if path.suffix == ".safetensors":
        return read_weights(path)
    try:
        content = _plain_content(path)
        if isinstance(content, StandIn):
            return _tensors_below(content)
    except UNREADABLE as error:
        raise InputError(f"{path} is no readable torch checkpoint: {first_line(error)}") from error
    return read_weights(path)


def read_metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file says about itself; nothing for files of other kinds."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not the named tensors of a model.")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        inner = sorted(str(name) for name, value in content.items() if isinstance(value, dict))
        raise InputError(
            f"{path} holds no named tensors of a model"
            + (f", but more such under {', '.join(inner)}: save the one that is wanted by itself." if inner else ".")
        )
    return without_wrappers(tensors)


def without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without what DataParallel, torch.compile and averaging put before the names of a module's own.

    Only what stands before all names is dropped (an average's count of updates aside), in whatever order it came.
    """
    names = state.keys() - {AVERAGED}
    for prefix in WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            return without_wrappers({name.removeprefix(prefix): state[name] for name in state if name in names})
    return state


def write_archive(path: Path, content: Any) -> None:
    """What `load_archive` reads, whole or not at all. Raises InputError where it cannot be written."""
    buffer = io.BytesIO()  # torch.save itself says nothing that tells a full disk from other faults
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_archive(path: Path, *, mapped: bool) -> Any:
    """What `torch.save` wrote to `path`, on the CPU, after `check_archive`; no code of the file is run.

    mapped: tensors stay on disk until they are used. Raises as `check_archive`.
    """
    names = check_archive(path)
    try:
        with torch.serialization.safe_globals([(_Bookkeeping, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what a forged pickle makes torch trip over can be anything
        if is_too_little_memory(error):
            raise
        raise pickle.UnpicklingError(f"{type(error).__name__}: {first_line(error)}") from error


def _plain_content(path: Path) -> Any:
    """What `torch.save` wrote, its tensors real, all other objects stand-ins; nothing of the file is run.

    Raises pickle.UnpicklingError where it is damaged or forged.
    """
    with _opened(path) as (archive, root):
        numbers = cache(lambda key: bytearray(archive.read(f"{root}/data/{key}")))

        def storage(described: tuple[str, torch.dtype, str, str, int]) -> Tensor:
            _, dtype, key, _, count = described
            if len(numbers(key)) != count * dtype.itemsize:
                found = f"{len(numbers(key))} bytes"
                raise pickle.UnpicklingError(f"{count} numbers are to lie in data/{key}, which has {found}")
            return torch.frombuffer(numbers(key), dtype=dtype) if count else torch.empty(0, dtype=dtype)

        def resolve(module: str, name: str) -> Any:
            return {**_MADE, **_REAL}.get(f"{module}.{name}", StandIn)

        pickled = archive.read(f"{root}/data.pkl")
        return PickleReader(resolve, storage, most=MOST_PARTS).load(io.BytesIO(pickled))


def _tensors_below(module: StandIn) -> dict[str, Tensor]:
    """The tensors of a pickled module and of its parts, by name. Raises pickle.UnpicklingError where it is none."""
    tensors: dict[str, Tensor] = {}
    parts = [("", module)]
    for _ in range(MOST_PARTS):
        if not parts:
            return tensors
        prefix, part = parts.pop()
        state = part.state if isinstance(part, StandIn) and isinstance(part.state, dict) else {}
        tables = [state.get(f"_{table}") for table in ("parameters", "buffers", "modules")]
        if not all(isinstance(table, dict) for table in tables) or prefix.count(".") > DEEPEST:
            raise pickle.UnpicklingError(
                f"it holds a {type(part).__name__} and no module of torch at {prefix or 'its top'}"
            )
        passing = state.get("_non_persistent_buffers_set") or ()
        named = {**tables[0], **{name: buffer for name, buffer in tables[1].items() if name not in passing}}
        tensors |= {f"{prefix}{name}": tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}
        parts += [(f"{prefix}{name}.", child) for name, child in tables[2].items() if child is not None]
    raise pickle.UnpicklingError(f"it has more than {MOST_PARTS:,} parts")


def check_archive(path: Path) -> list[str]:
    """Look through a file that `torch.save` wrote, before anything is built: every byte of it, none of it run.

    torch itself holds nothing against its checksum, and where it maps a file it takes whatever lies there for numbers.

    Returns:
        The names of bookkeeping objects in it.

    Raises:
        ForeignNames: see there.
        pickle.UnpicklingError: it is damaged, compressed or forged.
    """
    with _opened(path) as (archive, root):
        pickled = archive.read(f"{root}/data.pkl")
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    return _check_pickle(pickled, sizes, root)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, str]]:
    """A file that `torch.save` wrote, every byte of it checked, and the folder in it that all of it lies in.

    What goes wrong with it inside the `with` is a pickle.UnpicklingError too.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(archive, path.stat().st_size)
            yield archive, archive.infolist()[0].filename.partition("/")[0]
    except (FileNotFoundError, MemoryError, pickle.UnpicklingError):
        raise
    except Exception as error:  # zipfile raises many kinds for what is damaged
        raise pickle.UnpicklingError(f"{looks_like(path)} ({error})") from error


def _check_entries(archive: zipfile.ZipFile, size: int) -> None:
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise pickle.UnpicklingError(
            "it was compressed, which torch never does: unzip it, and zip it again without compression (zip -0)"
        )
    if len({entry.filename for entry in entries}) < len(entries) or sum(entry.file_size for entry in entries) > size:
        raise pickle.UnpicklingError("its entries lie over each other")
    damaged = archive.testzip()
    if damaged is not None:
        raise pickle.UnpicklingError(
            f"it is damaged, or was saved without checksums: {damaged} does not match its CRC-32; fetch or copy it anew"
        )


def _check_pickle(pickled: bytes, sizes: Mapping[str, int], root: str) -> list[str]:
    """Hold the structure of a checkpoint against what tensors and plain data need, and against its records' sizes."""
    names: set[str] = set()

    def resolve(module: str, name: str) -> Any:
        names.add(f"{module}.{name}")
        return _MADE.get(f"{module}.{name}", StandIn)

    def record(described: tuple[str, torch.dtype, str, str, int]) -> StandIn:
        _, dtype, key, _, numbers = described
        found = sizes.get(f"{root}/data/{key}")
        if found != numbers * dtype.itemsize:
            raise pickle.UnpicklingError(f"{numbers} numbers are to lie in data/{key}, which has {found} bytes")
        stand_in = StandIn()
        stand_in.state = numbers
        return stand_in

    content = PickleReader(resolve, record, most=MOST_PARTS).load(io.BytesIO(pickled))
    require_tree(content, most=MOST_PARTS)
    others = {name for name in names if not TENSOR_NAMES.fullmatch(name)}
    if refused := sorted(name for name in others if not BOOKKEEPING.fullmatch(name)):
        raise ForeignNames(
            f"besides tensors it names {', '.join(refused)}, which could run code. Nothing of it was run."
        )
    return sorted(others)


def _tensor(storage: StandIn, _: int, size: Sequence[int], *__: object) -> StandIn:
    """Stands for a tensor; few numbers that lie in a file may not be claimed to be many."""
    if math.prod(size) > max(storage.state, LARGEST_REPEATED):
        raise pickle.UnpicklingError(f"a tensor of {math.prod(size):,} numbers is made of {storage.state:,}")
    return StandIn()


_MADE = {
    **STORAGES,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "collections.OrderedDict": plain_dict,
    "builtins.set": plain_set,
    "__builtin__.set": plain_set,
}


def _real_tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Tensor:
    """A tensor of the numbers of a storage; few of them may not be claimed to be many."""
    if math.prod(size) > max(len(storage), LARGEST_REPEATED):
        raise pickle.UnpicklingError(f"a tensor of {math.prod(size):,} numbers is made of {len(storage):,}")
    return storage.as_strided(tuple(size), tuple(stride), offset)


_REAL = {
    "torch._utils._rebuild_tensor_v2": _real_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}


def looks_like(path: Path) -> str:
    """What a file that cannot be read appears to be, by its first bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
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
