"""Evaluations as files: the options of `evaluate.py`, and the published figures that its own stand beside.

about: what it is, in a sentence
options:                    # of evaluate.py, by their names on its command line, where they have the last word
  model: sd15
  solvers: [ddim, heun]     # lists of commas, and what may be repeated, as YAML lists
published:
  - {solver: ddim, nfe: 20, metric: reward, value: 0.2416, source: where it is printed}
"""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import InputError
from training.runs.configuration import read_yaml_file, value_fault

FOLDER = Path(__file__).resolve().parents[2] / "evaluations"
KEYS = ("about", "options", "published")


@dataclass(frozen=True)
class Published:
    """A published figure: of a solver's label at so many parallel evaluations, by a metric of ours, and its source."""

    solver: str
    nfe: int
    metric: str
    value: float
    source: str


FIGURE = typing.get_type_hints(Published)
"""What a published figure consists of, and what is made of what the file says."""


@dataclass(frozen=True)
class Protocol:
    """An evaluation by name. options: of evaluate.py, values as they are typed there, and lists of them."""

    name: str
    about: str
    options: Mapping[str, str | list[str]]
    published: tuple[Published, ...]


def load_protocol(name: str, options: Collection[str]) -> Protocol:
    """The protocol called `name`, of `evaluations/`, or in the file of that path; `options` are those that there are.

    Raises InputError where there is none, a key or an option is unknown, or a published figure lacks a part.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        content = read_yaml_file(file)
    except FileNotFoundError:
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
        raise InputError(f"protocol {name!r}: there is no {file}; known are {known}, or name a .yaml file") from None
    if reason := value_fault(content):
        raise InputError(f"{file}: it {reason}")
    content = _mapping(file, "it", content)
    _check_keys(file, "", content, KEYS)
    chosen = _mapping(file, "options", content.get("options", {}))
    _check_keys(file, "options.", chosen, options)
    for key, value in chosen.items():
        if not all(isinstance(part, str) for part in (value if isinstance(value, list) else [value])):
            raise InputError(f"{file}: options.{key} is {value!r:.80}; write a value, or a list of values")
    figures = content.get("published", [])
    if not isinstance(figures, list):
        raise InputError(f"{file}: published is {figures!r:.80}; write a list of figures")
    published = tuple(_published(file, number, figure) for number, figure in enumerate(figures, start=1))
    return Protocol(file.stem, str(content.get("about", "")), chosen, published)


def _published(file: Path, number: int, figure: Any) -> Published:
    where = f"published figure {number}"
    figure = _mapping(file, where, figure)
    _check_keys(file, f"{where}: ", figure, FIGURE)
    read: dict[str, Any] = {}
    for key, kind in FIGURE.items():
        value = figure.get(key)
        if value is None or not str(value).strip():
            raise InputError(f"{file}: {where} has no {key}; a figure needs {', '.join(FIGURE)}")
        try:
            read[key] = kind(value)
        except (TypeError, ValueError):
            read[key] = None
        if not isinstance(value, str) or read[key] is None:
            raise InputError(f"{file}: {where}: {key} is {value!r:.80}, not a {'number' if key == 'value' else key}")
    if not math.isfinite(read["value"]):
        raise InputError(f"{file}: {where}: value is {read['value']}; it must be finite")
    return Published(**read)


def _mapping(file: Path, what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{file}: {what} is {value!r:.80}; it must be keys with values")
    return value


def _check_keys(file: Path, prefix: str, found: Collection[str], known: Collection[str]) -> None:
    for key in found:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
            raise InputError(f"{file}: unknown key {prefix}{key}; {hint}")
