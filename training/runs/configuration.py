"""Configurations: dataclasses of knobs, read from YAML and overrides, closed, all faults in one message.

A schema is a dataclass whose fields are knobs or sections, each section a dataclass of knobs. A dotted key names a
knob (`finetune.lr`, or `seed` at the top). Precedence, lowest first: the defaults, the file, `--override`.

YAML gives the structure and nothing else: what a scalar means is up to its knob's type, so that 00010 is ten for a
number and itself for a text, and `no` is a name where a name is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import operator
import re
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from errors import InputError

OVERRIDE = "--override"

LARGEST_FILE = 2**15  # bytes; the configurations that come with the project have two thousand
LARGEST_NUMBER = 10**9  # of whole numbers whose knob sets no limit
MOST_FAULTS = 20  # in a message
DEEPEST, MOST_VALUES = 5, 10_000  # of what one key is given, with all that it repeats
NULLS = ("~", "null", "Null", "NULL")
NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)  # as YAML writes it

LONGEST_QUOTE = 200  # characters of what was read, in a message
SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = SHOWN.maxlong = LONGEST_QUOTE
SHOWN.maxlevel = 2

Config = TypeVar("Config")
Disagreements = Iterator[tuple[set[str], str]]
"""Values that are each allowed and cannot go together: their keys, why, and what to set instead."""


BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


@dataclass(frozen=True)
class Limits:
    """Which values a knob accepts: an inclusive or exclusive range, or some of a list of choices.

    A list holds several of the choices, each once. `required`: no empty text, no empty list.
    """

    required: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    def complaint(self, value: Any) -> str | None:
        """What is wrong with `value`, or None."""
        if value is None:
            return None
        if isinstance(value, list) and self.choices:
            return self._complaint_of_several(value)
        if self.required and not value:
            return "is not set"
        if isinstance(value, list):
            return None
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}"
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if isinstance(value, int) and self.at_most is self.below is None and value > LARGEST_NUMBER:
            return f"must be at most {LARGEST_NUMBER}"
        for name, holds in BOUNDS.items():
            bound = getattr(self, name)
            if bound is not None and not holds(value, bound):
                return f"must be {name.replace('_', ' ')} {bound:g}"
        return None

    def _complaint_of_several(self, values: list[str]) -> str | None:
        known = f"known are {', '.join(self.choices)}"
        if self.required and not values:
            return f"must name something; {known}"
        if unknown := [value for value in values if value not in self.choices]:
            return f"names {_cut(unknown[0])}; {known}"
        if twice := [value for value, times in Counter(values).items() if times > 1]:
            return f"names {twice[0]} twice"
        return None


def knob(default: Any, meaning: str, **limits: Any) -> Any:
    """A configuration field: its default, what it means with unit and scope, and the values it accepts (`Limits`)."""
    metadata = {"meaning": meaning, "limits": Limits(**limits)}
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class LoadedConfig(Generic[Config]):
    """A checked configuration, and the dotted keys that `--override` set (they may win over what is read later)."""

    config: Config
    overridden: frozenset[str]


class Schema(Generic[Config]):
    """Reads configurations of one kind."""

    def __init__(
        self,
        kind: type[Config],
        disagreements: Callable[[Config], Disagreements],
        *,
        shipped: str,
        retired: Mapping[str, str | Callable[[Any], str]] = types.MappingProxyType({}),
    ) -> None:
        """Describe a kind of configuration.

        Args:
            kind: the dataclass.
            disagreements: what values that are each allowed cannot go together.
            shipped: where the configurations that come with the project are, for messages.
            retired: keys of earlier versions and of other programs, and what to write instead, or what tells it from
                their value. One that is null, or holds nulls alone, says nothing and is let pass.
        """
        self.kind = kind
        self.knobs: dict[str, dataclasses.Field] = {}
        """Every dotted key with its field; `.metadata["meaning"]` documents it."""
        self._kinds: dict[str, Any] = {}
        for key, known, hint in _knobs(kind):
            self.knobs[key], self._kinds[key] = known, hint
        self._sections = [part.name for part in dataclasses.fields(kind) if "limits" not in part.metadata]
        self._disagreements = disagreements
        self._shipped = shipped
        self._retired = retired

    def load(
        self, path: str | Path, overrides: Sequence[str] = (), *, before: Mapping[str, Any] | None = None
    ) -> LoadedConfig[Config]:
        """Read a YAML file, then the overrides (`section.key=value`); check every value and all that must agree.

        `before`: of a run's own file, which may have been cut off, nested plain values of the keys that it lacks.

        Raises:
            InputError: lists all faults at once: unknown keys (with the nearest known one), wrong types, values out of
                range, combinations that cannot work.
        """
        values = self._read_file(Path(path), own=before is not None)
        return self.build(values, str(path), overrides, before=before)

    def build(
        self,
        values: Mapping[str, Any],
        origin: str,
        overrides: Sequence[str] = (),
        *,
        before: Mapping[str, Any] | None = None,
    ) -> LoadedConfig[Config]:
        """As `load`, from nested plain values; `origin` names them in messages."""
        faults: list[str] = []
        overridden = list(self._parse_overrides(overrides, faults))
        assigned = {
            key: (value, origin)
            for part in (before or {}, values)
            for key, value in self._flatten(part, origin, faults)
        }
        assigned |= {key: (value, OVERRIDE) for key, value in overridden}
        node = OmegaConf.structured(self.kind)
        origins: dict[str, str] = {}
        unsound: set[str] = set()
        for key, (value, where) in assigned.items():
            if key in self._retired:
                if not _is_silent(value):
                    instead = self._retired[key]
                    instead = instead if isinstance(instead, str) else instead(value)
                    faults.append(f"{where}: {key} is gone: {_cut(instead)}")
                continue
            if key not in self.knobs:
                hint = self._suggestion(key) if len(faults) < MOST_FAULTS else ""
                faults.append(f"{where}: unknown key {_cut(key)}{hint}")
                continue
            reason = value_fault(value) or self._assign(node, key, value)
            if reason is None:
                origins[key] = where
            else:
                unsound.add(key)
                faults.append(f"{where}: {key}={_shown(value)}: {reason} ({self.knobs[key].metadata['meaning']})")
        config = OmegaConf.to_object(node)
        for key, known in self.knobs.items():
            value = value_of(config, key)
            complaint = known.metadata["limits"].complaint(value)
            if complaint and key not in unsound:
                unsound.add(key)
                shown = key if value in ("", {}, []) else f"{key}={_shown(value)}"
                faults.append(f"{origins.get(key, origin)}: {shown} {complaint} ({known.metadata['meaning']})")
        # A pair is judged only where each of its values stands on its own; in the place of others the defaults do.
        for key in unsound:
            *section, leaf = key.split(".")
            setattr(value_of(config, ".".join(section)), leaf, value_of(self.kind(), key))
        disagreements = self._disagreements(config)
        faults += [f"{origin}: {fault}" for keys, fault in disagreements if unsound.isdisjoint(keys)]
        raise_all(faults)
        return LoadedConfig(config, frozenset(key for key, _ in overridden))

    def _assign(self, node: DictConfig, key: str, value: Any) -> str | None:
        """Set a knob, in the place of all that it held before; or say why it cannot be."""
        if typing.get_origin(self._kinds[key]) is list and not isinstance(value, list):
            return "must be a list in brackets, [one, two]"
        if value is None and types.NoneType not in _members(self._kinds[key]):
            usual = value_of(self.kind(), key)
            return f"must not be null: leave it out, or set {key}={usual}" if usual else "must not be null"
        if float in _members(self._kinds[key]) and isinstance(value, str) and NOT_FINITE.fullmatch(value):
            value = float(value.replace(".", ""))
        try:
            holds_dataclasses = any(map(dataclasses.is_dataclass, typing.get_args(self._kinds[key])))
            if holds_dataclasses:  # emptied, then merged: only a merge makes dataclasses of plain entries
                OmegaConf.update(node, key, {}, merge=False)
            OmegaConf.update(node, key, value, merge=holds_dataclasses)
        except (OmegaConfBaseException, ValueError, OverflowError) as error:
            return _cut(str(error).splitlines()[0].replace(str(value), _shown(value).strip("'")[:40]))
        return None

    def _parse_overrides(self, overrides: Iterable[str], faults: list[str]) -> Iterator[tuple[str, Any]]:
        for pair in overrides:
            key, equals, text = pair.partition("=")
            if not equals or not key:
                faults.append(f"{OVERRIDE} {_cut(pair)}: expected section.key=value")
                continue
            try:
                yield key, self._override(key, text.strip())
            except yaml.YAMLError as error:
                faults.append(f"{OVERRIDE} {_cut(pair)}: the value is not readable as YAML: {_one_line(error)}")

    def _override(self, key: str, text: str) -> Any:
        """A text is taken as it was typed, unless in quotes: a name may look like YAML. All else is YAML."""
        if not text or (str in _members(self._kinds.get(key)) and text not in NULLS and text[0] not in "'\""):
            return text
        return _read_yaml(text)

    def _read_file(self, path: Path, *, own: bool) -> Mapping[str, Any]:
        try:
            values = read_yaml_file(path, whole=own) or {}
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such configuration file; those that come with the project are in {self._shipped}"
            ) from None
        if not isinstance(values, dict):
            found = "a list" if isinstance(values, list) else _shown(values)
            raise InputError(f"{path}: expected sections ({', '.join(self._sections)}), found {found}")
        return values

    def _flatten(self, values: Mapping[str, Any], origin: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
        for section, content in values.items():
            if section in self.knobs:
                yield section, content
            elif section not in self._sections:
                known = ", ".join(self._sections)
                hint = self._suggestion(str(section)) if len(faults) < MOST_FAULTS else ""
                faults.append(f"{origin}: unknown section {_cut(str(section))}{hint}; the sections are {known}")
            elif content is None:
                continue
            elif not isinstance(content, Mapping):
                shown = _cut(content) if isinstance(content, str) else _shown(content)
                faults.append(f"{origin}: {section}={shown}: expected keys and values below it")
            else:
                yield from ((f"{section}.{leaf}", value) for leaf, value in content.items())

    def _suggestion(self, key: str) -> str:
        leaf = key.rpartition(".")[2]
        candidates = [known for known in self.knobs if known.rpartition(".")[2] == leaf]
        candidates += difflib.get_close_matches(key, [*self.knobs, *self._sections], n=1, cutoff=0.6)
        leaves = {known.rpartition(".")[2]: known for known in self.knobs}
        candidates += [leaves[close] for close in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
        return f"; did you mean {candidates[0]}?" if candidates else ""


def read_yaml_file(path: Path, *, whole: bool = False) -> Any:
    """What a YAML file says, its scalars as texts or None; of any depth and, by aliases, any size (see `value_fault`).

    `whole`: a last line without its end is refused: what is left of a number may be another one.

    Raises:
        FileNotFoundError: there is none.
        InputError: it cannot be read, is too large for a configuration, or no YAML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise yaml.YAMLError(f"it has more than {LARGEST_FILE} bytes")
        if whole and content and not content.endswith(b"\n"):
            raise yaml.YAMLError("its last line was cut off: write it again, or take it away")
        return _read_yaml(content)
    except FileNotFoundError:
        raise
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable YAML file: {_one_line(error)}") from None


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key such as `finetune.lr`; of the empty key, all of it."""
    for name in filter(None, key.split(".")):
        config = getattr(config, name)
    return config


def to_plain(config: Any) -> dict[str, Any]:
    """The configuration as nested plain values."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The configuration as YAML text that its schema reads back to the same configuration."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def config_hash(config: Any) -> str:
    """SHA-256 of the configuration's values, in hexadecimal."""
    return hashlib.sha256(json.dumps(to_plain(config), sort_keys=True).encode()).hexdigest()


def refuse_changes(before: Any, now: Any, keys: Iterable[str], files: Collection[str], run: Path) -> None:
    """Raise `InputError` where a resumed run would no longer be what it began as.

    Args:
        before: the configuration of the run's checkpoint.
        now: that of the resumed run.
        keys: dotted keys that must not change.
        files: those of them that name files or folders, which may have moved: only their names must not change.
        run: its folder, for the message.
    """
    changed = []
    for key in keys:
        old, new = value_of(before, key), value_of(now, key)
        moved = key in files and old and new and Path(old).name == Path(new).name
        if old != new and not moved:
            changed.append(f"{key}={new!r}: the run in {run} has {old!r}; leave {key} out, or begin a new run")
    raise_all(changed)


def raise_all(faults: Sequence[str]) -> None:
    """Raise one `InputError` that lists the faults, if there are any."""
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        listed = [f"  - {fault}" for fault in faults[:MOST_FAULTS]]
        listed += [f"  - and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        raise InputError("\n".join([f"the configuration has {count}:", *listed]))


def _knobs(kind: type) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every dotted key with its field and its type."""
    hints = typing.get_type_hints(kind)
    for part in dataclasses.fields(kind):
        if "limits" in part.metadata:
            yield part.name, part, hints[part.name]
        else:
            yield from ((f"{part.name}.{key}", *leaf) for key, *leaf in _knobs(part.default_factory))


def _members(kind: Any) -> tuple[Any, ...]:
    """The types that a value may have: of `X | None` both, of any other type itself."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


class _StructureLoader(yaml.SafeLoader):
    """Reads mappings, lists, and scalars as the texts that they are; of YAML's types it knows null alone."""

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [(tag, form) for tag, form in known if tag.rpartition(":")[2] in ("null", "merge")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: typing.ClassVar = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq", "map")
    }

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """As its base does, which takes the square of the depth in time."""
        self._require_shallow(self.flow_level)
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        """As its base does, to any depth."""
        self._require_shallow(len(self.indents))
        return super().add_indent(column)

    def _require_shallow(self, depth: int) -> None:
        if depth > 2 * DEEPEST:
            raise yaml.scanner.ScannerError(None, None, "it is nested too deeply", self.get_mark())

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As its base does, which lets the last of equal keys win."""
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        name, times = names.most_common(1)[0] if names else ("", 0)
        if times > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {name} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(content: str | bytes) -> Any:
    """What YAML says, its scalars as texts or None. Raises yaml.YAMLError."""
    return yaml.load(content, _StructureLoader)


def _is_silent(value: Any) -> bool:
    """Whether it is null, or a mapping that holds nulls alone."""
    return value is None or (isinstance(value, Mapping) and all(part is None for part in value.values()))


def value_fault(value: Any) -> str | None:
    """Why what a knob is given can be no value of any knob, or None."""
    left, seen = [(value, 0)], 0
    while left:
        part, depth = left.pop()
        seen += 1
        if depth > DEEPEST or seen + len(left) > MOST_VALUES:
            return "is nested too deeply, or has too many entries"
        if isinstance(part, Mapping):
            left += [(entry, depth + 1) for pair in part.items() for entry in pair]
        elif isinstance(part, list):
            left += [(entry, depth + 1) for entry in part]
        elif isinstance(part, str) and ("${" in part or part == "???"):
            return "${...} and ??? stand for values elsewhere and are not resolved: write the value itself"
        elif isinstance(part, str) and ("\0" in part or any("\ud800" <= letter <= "\udfff" for letter in part)):
            return "holds characters that no text has"
    return None


def _shown(value: Any) -> str:
    return _cut(SHOWN.repr(value))


def _cut(text: str) -> str:
    """The beginning of a text that may be of any length, for a message."""
    shown = text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."
    return shown.encode(errors="backslashreplace").decode()


def _one_line(error: Exception) -> str:
    return _cut(" ".join(str(error).split()))
