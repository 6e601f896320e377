"""Snapshots of EPD tables: a `.json` of plain numbers, and beside it a `.pkl` that the public EPD code loads too."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import shlex
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from errors import InputError, first_line
from files import write_atomically
from models.asset_table import HUB_ID
from models.digests import check_recorded
from solvers import COLUMNS, EPDTable
from training.networks import PUBLIC_ATTRIBUTES, EPD_predictor, Plain
from training.pickled_predictor import predictor_state

SIZES = ("num_steps", "num_points")
VERSION = 2  # of our .json; 1, without a number, had positions, weights and scales alone
PUBLIC_KEYS = {"positions": "r", "weights": "w"}  # columns that the published tables call otherwise
JSON_KEYS = {column.name: PUBLIC_KEYS.get(column.name, column.name) for column in COLUMNS}
GRID = "sigmas"  # in the metadata: noise levels of the table's own, in place of a named schedule
PUBLIC_COLUMNS = ("positions", "weights", "scale_dir", "scale_time")  # what a .pkl can hold
CHECKSUM = "sha256"  # of all else in a .json; those of others have none
BOUNDS = ("scale_dir", "scale_time")
# What a table is used with: a value that cannot be read must not be taken for one that is not there.
NEEDED = frozenset({*PUBLIC_ATTRIBUTES, *SIZES, *BOUNDS, "sigma_min", "sigma_max", "model_path"})
PARAMETERS = ("r_params", "weight_s", "scale_dir_params", "scale_time_params")

Snapshot: TypeAlias = tuple[EPDTable, dict[str, Plain]]

LARGEST_FILE = 16 * 2**20  # bytes; a snapshot has some ten thousand
DEEPEST = 20  # levels of nested settings
LARGEST_NUMBER = 2**64  # of whole ones
SHOWN_OF_A_PATH = 60  # characters, in a message
# How far a .pkl may be from its .json: float32 parameters, and weights that sum to 1 by construction, beside float64
# numbers whose weights may miss 1 by 1e-5 (EPDTable).
AGREEMENT = 2e-5

HUB_SNAPSHOTS = "network-snapshot-*.json"  # no pickle is taken from a hub
SNAPSHOT_NAME = re.compile(r"network-snapshot-.*?(\d+)\.(pkl|json)")


# ---------------------------------------------------------------------------------------------------------- save


def save_snapshot(path: str | Path, table: EPDTable, metadata: Mapping[str, Plain]) -> Path:
    """Write a table and what it was made for as `<path>.json`, and as `<path>.pkl` where the public code can hold it.

    The .json holds every column's numbers exactly (float64), with a checksum. The .pkl holds positions, weights and
    scales to float32 precision, as an `EPD_predictor` under the key `model`, pickled by reference; for a table with
    other columns, with noise levels of its own or without points there is none. Each file appears whole or not at all.

    Args:
        path: where to; its suffix, if any, is .pkl or .json. Missing folders are made, files replaced.
        table: one table, no batch.
        metadata: plain values (None, bool, int, finite float, str, and lists and dicts of them), by name. `sigmas`, a
            list of S + 1 descending numbers, is a grid of the table's own.

    Returns:
        The path of the .pkl where there is one, otherwise of the .json.

    Raises:
        InputError: the table is not valid, the metadata is not plain, or the files cannot be written.
    """
    path = Path(path)
    if path.suffix not in ("", ".pkl", ".json"):
        raise InputError(f"{path}: a snapshot is a .pkl and a .json, not {path.suffix!r}")
    text, predictor = _described(path, table, metadata)
    write_atomically(path.with_suffix(".json"), text)
    if predictor is None:
        path.with_suffix(".pkl").unlink(missing_ok=True)  # of a table that stood here before
        return path.with_suffix(".json")
    write_atomically(path.with_suffix(".pkl"), pickle.dumps({"model": predictor}, protocol=4))
    return path.with_suffix(".pkl")


def snapshot_json(path: Path, table: EPDTable, metadata: Mapping[str, Plain]) -> bytes:
    """The .json that `save_snapshot` writes, for a `path` that messages name; it raises as that does."""
    return _described(path, table, metadata)[0]


def _described(path: Path, table: EPDTable, metadata: Mapping[str, Plain]) -> tuple[bytes, EPD_predictor | None]:
    """The .json of a snapshot, and what its .pkl holds, where there is one."""
    for name, value in metadata.items():
        if not is_plain(value):
            raise InputError(f"{path}: metadata {name!r} is {value!r}; a snapshot holds plain, finite values only")
    if table.batch_size is not None:
        raise InputError(f"{path}: a snapshot holds one table [S, K]; this is a batch of {table.batch_size}")
    sizes = {"num_steps": table.num_steps, "num_points": table.num_points}
    predictor, described = None, {**PUBLIC_ATTRIBUTES, **metadata, **sizes}
    if not private_parts(table, metadata):
        try:
            predictor = EPD_predictor.from_table(table, metadata)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
        described = predictor.metadata
    numbers = table.detach().to(device="cpu", dtype=torch.float64).columns()
    columns = {JSON_KEYS[name]: entries.tolist() for name, entries in numbers.items()}
    # What version 1 always wrote is written always, so that readers of it go on.
    content = {"version": VERSION, **sizes, "scale_dir": None, "scale_time": None, **columns, "metadata": described}
    text = json.dumps({**content, CHECKSUM: _checksum(content)}, indent=1, allow_nan=False) + "\n"
    return text.encode(), predictor


def private_parts(table: EPDTable, metadata: Mapping[str, Plain]) -> list[str]:
    """What the public code base's .pkl cannot hold of a solver, in words; empty where it can hold all."""
    parts = [f"the column {name}" for name in table.columns() if name not in PUBLIC_COLUMNS]
    if metadata.get(GRID) is not None:
        parts.append("noise levels of its own")
    return parts if table.num_points else [*parts, "intervals without points"]


def _checksum(described: Mapping[str, Any]) -> str:
    """The SHA-256 of what a .json says, however it is laid out."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- find


def find_snapshot(source: str | Path | int, root: str | Path = "exps") -> Path:
    """The snapshot file that a person means.

    Args:
        source: a .pkl or .json file; a folder with `network-snapshot-*` files (a distillation run, an export), of
            which the one with the largest number is taken; a folder with such a folder `export` (a run of the RL
            job); the number of an experiment, 3 for `<root>/00003-*`; or `OWNER/NAME`, a repository of a hub with such
            files, which are fetched from there.
        root: where numbered experiments lie.

    Returns:
        The .pkl where there is one, otherwise the .json.

    Raises:
        InputError: nothing fits, or several experiments have the number; the message says what was looked for.
    """
    path = _named(source)
    if path.is_file():
        return path
    run = _from_hub(str(source)) if _is_of_a_hub(source) else find_run(source, root)
    for folder in (run, run / "export"):
        newest = _newest_snapshot(folder)
        if newest is not None:
            return newest
    remedy = f"; export it first:  python -m training.ppo.export_epd_predictor {shlex.quote(str(run))}"
    raise InputError(
        f"{run}: holds no network-snapshot-*.pkl or .json, neither itself nor in its folder export/"
        f"{remedy if (run / 'checkpoints').is_dir() else ''}"
    )


def _named(source: str | Path | int) -> Path:
    """The path that a person wrote, if it can be one."""
    path = Path(str(source))
    try:
        path.exists()
    except (OSError, ValueError) as error:  # too long, a null byte
        raise InputError(f"{str(source)[:SHOWN_OF_A_PATH]!r}...: is no path ({error.args[-1]})") from None
    return path


def _is_of_a_hub(source: str | Path | int) -> bool:
    """Whether `OWNER/NAME` is written, and nothing here is called OWNER: otherwise it is a path that is not there."""
    return HUB_ID.fullmatch(str(source)) is not None and not Path(str(source)).parent.exists()


def _from_hub(hub_id: str) -> Path:
    """The folder with the snapshots of a hub's repository, fetched, or as last fetched where there is no network."""
    from models.assets import fetch_files  # with what downloads need, which local files do not

    try:
        return fetch_files(hub_id, [HUB_SNAPSHOTS])
    except InputError as error:
        raise InputError(f"{hub_id}: no such snapshot or run here, and none on the hub: {error}") from None


def find_run(source: str | Path | int, root: str | Path = "exps") -> Path:
    """The folder that a person means by its path or, 3 for `<root>/00003-*`, by its number.

    Raises:
        InputError: there is none, or several have the number.
    """
    path = _named(source)
    if path.is_dir():
        return path
    if path.exists() or not str(source).isdecimal():
        raise InputError(f"{path}: no such snapshot or run; give a file, a folder, or an experiment's number")
    number, root = int(source), Path(root)
    runs = sorted(run for run in root.glob(f"{number:05d}-*") if run.is_dir())
    if not runs:
        known = sorted(run.name for run in root.glob("[0-9][0-9][0-9][0-9][0-9]-*") if run.is_dir())
        raise InputError(
            f"experiment {number}: no folder {root}/{number:05d}-*; there are: "
            f"{', '.join(known) or f'none in {root.absolute()}: start commands in the checkout'}"
        )
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs)
        raise InputError(f"experiment {number}: several folders have that number ({names}); give the path of one")
    return runs[0]


def _newest_snapshot(folder: Path) -> Path | None:
    """The file with the largest number in its name; of a .pkl and a .json the .pkl."""
    found = [
        (match, file) for file in folder.glob("network-snapshot-*") if (match := SNAPSHOT_NAME.fullmatch(file.name))
    ]
    return max(found, key=lambda entry: (int(entry[0][1]), entry[0][2], entry[1].name), default=(None, None))[1]


# ---------------------------------------------------------------------------------------------------------- load


def load_snapshot(path: str | Path) -> Snapshot:
    """Read a table and its metadata from a .pkl or a .json file; of a pair of both, either name reads the same.

    A file is held against the checksum in it, and against the SHA-256 beside it, <file>.sha256, where they are there.
    Read are this project's snapshots, the public EPD code base's (its numbers and plain attributes; the source code
    inside is ignored) and published tables in the layout of our .json (`num_steps`, `num_points`, `r`, `w`,
    `scale_dir`, `scale_time`, `metadata`). Where the two files of a pair are there, they must agree; the .json's
    numbers are returned, which are exact.

    Returns:
        The table (float64 tensors [S, K]) and the metadata, `num_steps` and `num_points` among it.

    Raises:
        InputError: missing, cut off, no snapshot, not finite, wrong shapes, positions outside (0, 1), weights that do
            not sum to 1, a name in the pickle that no snapshot needs, or two files that contradict each other.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise InputError(
            f"{path}: a snapshot is a .pkl or a .json file, not {path.suffix or 'a file without suffix'!r}"
        )
    pair = {suffix: path.with_suffix(suffix) for suffix in _READERS if path.with_suffix(suffix).is_file()}
    if path.suffix not in pair:
        raise InputError(f"{path}: no such file")
    read = {suffix: _READERS[suffix](file, _content(file)) for suffix, file in pair.items()}
    if len(read) == 2 and not _agree(read[".pkl"], read[".json"]):
        raise InputError(f"{pair['.pkl']} and {pair['.json'].name} contradict each other: move one of them away")
    return read.get(".json", read.get(".pkl"))


def _content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise InputError(f"{path}: {size:,} bytes; that is no snapshot, which has some ten thousand")
        check_recorded(path)
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _read_json(path: Path, content: bytes) -> Snapshot:
    try:
        described = json.loads(content)
        recorded = described.pop(CHECKSUM, None) if isinstance(described, dict) else None
        damaged = recorded is not None and recorded != _checksum(described)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no JSON, or was cut off ({error})") from error
    if not isinstance(described, dict) or not {"r", "w", "num_steps", "num_points"} <= described.keys():
        raise InputError(f"{path}: is no snapshot: it lacks one of the keys num_steps, num_points, r and w")
    if damaged:
        raise InputError(
            f"{path}: is damaged: its content is not that of its {CHECKSUM}; where it was edited on purpose, remove "
            f"the entry {CHECKSUM}"
        )
    version = described.get("version", 1)
    if version not in (1, VERSION):
        raise InputError(f"{path}: has version {_shown(version)}; this RLEPD reads versions 1 and {VERSION}")
    unknown = described.keys() - {"version", CHECKSUM, *SIZES, *JSON_KEYS.values(), "metadata"}
    if unknown and version == VERSION:
        raise InputError(f"{path}: has a column {min(unknown)!r}, which this RLEPD (version {VERSION}) does not know")
    metadata = described.get("metadata", {})
    if not isinstance(metadata, dict) or not is_plain({**metadata, **{key: described[key] for key in SIZES}}):
        raise InputError(f"{path}: metadata is no object of plain, finite values")
    metadata = _without_module_state({**metadata, **{key: described[key] for key in SIZES}})
    rows = {field: _rows(path, key, described.get(key)) for field, key in JSON_KEYS.items()}
    _check_grid(path, metadata)
    return _table(path, metadata, **rows), metadata


def _check_grid(path: Path, metadata: Mapping[str, Plain]) -> None:
    """Refuse noise levels of a table's own that are no grid, or not one for its intervals."""
    sigmas = metadata.get(GRID)
    if sigmas is None:
        return
    if not isinstance(sigmas, list) or not all(_is_number(level) for level in sigmas):
        raise InputError(f"{path}: sigmas must be a list of numbers")
    falling = all(math.isfinite(a) and a > b > 0 for a, b in pairwise(sigmas))
    if len(sigmas) != metadata["num_steps"] or not falling:
        raise InputError(
            f"{path}: sigmas must be num_steps={metadata['num_steps']} positive numbers, each below the one before; "
            f"they are {[float(f'{level:.4g}') for level in sigmas[:9]]}"
        )


def _rows(path: Path, key: str, rows: object) -> Tensor | None:
    """float64 [S, n] from S lists of numbers; None stays None for what a table may lack."""
    if rows is None and key not in PUBLIC_KEYS.values():
        return None
    alike = isinstance(rows, list) and all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows)
    if not alike or not rows or not all(_is_number(number) for row in rows for number in row):
        raise InputError(f"{path}: {key} must be rows of equally many numbers, one row per interval")
    return torch.tensor(rows, dtype=torch.float64)


def _read_pickle(path: Path, content: bytes) -> Snapshot:
    try:
        state = predictor_state(path, content)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: is no pickle of a snapshot, or was cut off ({first_line(error)})") from error
    parameters = state.get("_parameters") if isinstance(state, dict) else None
    if not isinstance(parameters, dict) or not all(isinstance(parameters.get(name), Tensor) for name in PARAMETERS):
        raise InputError(f"{path}: is no snapshot: it must hold an EPD_predictor under the key 'model'")

    attributes = {name: _plain(value) for name, value in state.items() if isinstance(name, str)}
    metadata = _without_module_state({name: value for name, value in attributes.items() if is_plain(value)})
    for name in sorted(NEEDED & attributes.keys() - metadata.keys()):
        raise InputError(f"{path}: {name} is {_shown(attributes[name])}; it must be a plain, finite value")
    shape = tuple(parameters["r_params"].shape)
    for name in PARAMETERS:
        if len(shape) != 2 or 0 in shape or tuple(parameters[name].shape) != shape:
            raise InputError(f"{path}: {name} has the shape {tuple(parameters[name].shape)}; all need one shape [S, K]")
        if not (parameters[name].is_floating_point() and parameters[name].isfinite().all()):
            raise InputError(f"{path}: {name} holds NaN, infinity or no real numbers")
    bounds = {key: metadata.get(key) for key in BOUNDS}
    for key, bound in bounds.items():
        if not _is_number(bound) or bound < 0:
            shown = _shown(bound) if key in metadata else "missing"
            raise InputError(f"{path}: {key} is {shown}; the bound of a scale is a number from 0 up")
    try:
        predictor = EPD_predictor(shape[0] + 1, shape[1], **bounds, fcn=metadata.get("fcn", False)).double()
        with torch.no_grad():
            for name in PARAMETERS:
                predictor.get_parameter(name).copy_(parameters[name])
            table = predictor.table()
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    metadata = {"num_steps": table.num_steps, "num_points": table.num_points, **metadata}
    return _table(path, metadata, **table.columns()), metadata


_READERS: dict[str, Callable[[Path, bytes], Snapshot]] = {".pkl": _read_pickle, ".json": _read_json}


# --------------------------------------------------------------------------------------------------------- check


def _table(path: Path, metadata: Mapping[str, Plain], **rows: Tensor | None) -> EPDTable:
    """The table of these rows (float64 [S, K], or None for scales that are not there), if it is a valid one."""
    try:
        table = EPDTable(**rows)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    said, found = tuple(metadata.get(key) for key in SIZES), (table.num_steps, table.num_points)
    if table.batch_size is not None or said != found or any(type(size) is not int for size in said):
        raise InputError(
            f"{path}: num_steps={said[0]!r} and num_points={said[1]!r}, but the rows are {[*table.positions.shape]}; "
            "they must be [num_steps - 1, num_points]"
        )
    return table


def _agree(one: Snapshot, other: Snapshot) -> bool:
    """Whether two tables are the same to the precision of a .pkl, and their metadata the same."""
    (table, metadata), (other_table, other_metadata) = one, other
    ours, theirs = table.columns(), other_table.columns()
    if metadata != other_metadata or ours.keys() != theirs.keys():
        return False
    pairs = [(entries, theirs[name]) for name, entries in ours.items()]
    return all(a.shape == b.shape and bool(((a - b).abs() < AGREEMENT).all()) for a, b in pairs)


def is_plain(value: object, depth: int = 0) -> bool:
    """Whether JSON can say it, exactly, and it is nested no deeper than settings are."""
    if depth > DEEPEST:
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(entry, depth + 1) for key, entry in value.items())
    if isinstance(value, list):
        return all(is_plain(entry, depth + 1) for entry in value)
    if isinstance(value, str):
        return value.isascii() or value.encode(errors="replace").decode() == value  # half a character is none
    return value is None or isinstance(value, bool) or (_is_number(value) and math.isfinite(value))


def _is_number(value: object) -> bool:
    """Whether it is a number, finite or not, that others than Python can hold."""
    return type(value) is float or (type(value) is int and abs(value) < LARGEST_NUMBER)


def _shown(value: object) -> str:
    return repr(value) if value is None or isinstance(value, bool) or _is_number(value) else f"a {type(value).__name__}"


def _plain(value: object) -> object:
    """The same value with its tuples as lists and its mappings as plain dicts."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def _without_module_state(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of a module's attributes without those that torch.nn.Module keeps for itself."""
    return {name: value for name, value in attributes.items() if not name.startswith("_") and name != "training"}
