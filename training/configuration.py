"""Configurations: dataclasses of knobs, read from YAML and overrides, closed, all faults in one message.

A schema is a dataclass whose fields are knobs or sections, each section a dataclass of knobs. A dotted key names a
knob (`finetune.lr`, or `seed` at the top). Precedence, lowest first: the defaults, the file, `--override`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from errors import InputError

OVERRIDE = "--override"

Config = TypeVar("Config")
Disagreements = Iterator[tuple[set[str], str]]
"""Values that are each allowed and cannot go together: their keys, why, and what to set instead."""


@dataclass(frozen=True)
class Limits:
    """Which values a knob accepts: an inclusive or exclusive range, or a list of choices; `required`: no empty text."""

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
        if self.required and not value:
            return "is not set"
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}"
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least:g}"
        if self.above is not None and value <= self.above:
            return f"must be above {self.above:g}"
        if self.at_most is not None and value > self.at_most:
            return f"must be at most {self.at_most:g}"
        if self.below is not None and value >= self.below:
            return f"must be below {self.below:g}"
        return None


def knob(
    default: Any,
    meaning: str,
    *,
    required: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A configuration field: its default, what it means with unit and scope, and the values it accepts."""
    metadata = {"meaning": meaning, "limits": Limits(required, at_least, above, at_most, below, choices)}
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

    def __init__(self, kind: type[Config], disagreements: Callable[[Config], Disagreements], *, shipped: str) -> None:
        """Describe a kind of configuration.

        Args:
            kind: the dataclass.
            disagreements: what values that are each allowed cannot go together.
            shipped: where the configurations that come with the project are, for messages.
        """
        self.kind = kind
        self.knobs: dict[str, dataclasses.Field] = dict(_knobs(kind))
        """Every dotted key with its field; `.metadata["meaning"]` documents it."""
        self._sections = [part.name for part in dataclasses.fields(kind) if "limits" not in part.metadata]
        self._disagreements = disagreements
        self._shipped = shipped

    def load(self, path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig[Config]:
        """Read a YAML file, then the overrides (`section.key=value`); check every value and all that must agree.

        Raises:
            InputError: lists all faults at once: unknown keys (with the nearest known one), wrong types, values out of
                range, combinations that cannot work.
        """
        return self.build(self._read_yaml(Path(path)), str(path), overrides)

    def build(self, values: Mapping[str, Any], origin: str, overrides: Sequence[str] = ()) -> LoadedConfig[Config]:
        """As `load`, from nested plain values; `origin` names them in messages."""
        faults: list[str] = []
        overridden = list(_parse_overrides(overrides, faults))
        assigned = [(key, value, origin) for key, value in self._flatten(values, origin, faults)]
        assigned += [(key, value, OVERRIDE) for key, value in overridden]
        node = OmegaConf.structured(self.kind)
        origins: dict[str, str] = {}
        unsound: set[str] = set()
        for key, value, where in assigned:
            if key not in self.knobs:
                faults.append(f"{where}: unknown key {key}{self._suggestion(key)}")
                continue
            try:
                OmegaConf.update(node, key, value)
                origins[key] = where
            except OmegaConfBaseException as error:
                unsound.add(key)
                reason = str(error).splitlines()[0]
                faults.append(f"{where}: {key}={value!r}: {reason} ({self.knobs[key].metadata['meaning']})")
        config = OmegaConf.to_object(node)
        for key, complaint in self._out_of_range(config):
            if key not in unsound:
                unsound.add(key)
                where = origins.get(key, origin)
                value = value_of(config, key)
                shown = key if value in ("", {}, []) else f"{key}={value!r}"
                faults.append(f"{where}: {shown} {complaint} ({self.knobs[key].metadata['meaning']})")
        # A pair is judged only where each of its values stands on its own.
        faults += [fault for keys, fault in self._disagreements(config) if unsound.isdisjoint(keys)]
        raise_all(faults)
        return LoadedConfig(config, frozenset(key for key, _ in overridden))

    def _read_yaml(self, path: Path) -> Mapping[str, Any]:
        try:
            values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such configuration file; those that come with the project are in {self._shipped}"
            ) from None
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
            raise InputError(f"{path}: not a readable YAML file: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected sections ({', '.join(self._sections)}), found a list")
        return values

    def _flatten(self, values: Mapping[str, Any], origin: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
        for section, content in values.items():
            if section in self.knobs:
                yield section, content
            elif section not in self._sections:
                known = ", ".join(self._sections)
                hint = self._suggestion(str(section))
                faults.append(f"{origin}: unknown section {section}{hint}; the sections are {known}")
            elif content is None:
                continue
            elif not isinstance(content, Mapping):
                faults.append(f"{origin}: {section}={content!r}: expected keys and values below it")
            else:
                yield from ((f"{section}.{leaf}", value) for leaf, value in content.items())

    def _suggestion(self, key: str) -> str:
        leaf = key.rpartition(".")[2]
        candidates = [known for known in self.knobs if known.rpartition(".")[2] == leaf]
        candidates += difflib.get_close_matches(key, [*self.knobs, *self._sections], n=1, cutoff=0.6)
        leaves = {known.rpartition(".")[2]: known for known in self.knobs}
        candidates += [leaves[close] for close in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
        return f"; did you mean {candidates[0]}?" if candidates else ""

    def _out_of_range(self, config: Config) -> Iterator[tuple[str, str]]:
        for key, known in self.knobs.items():
            complaint = known.metadata["limits"].complaint(value_of(config, key))
            if complaint:
                yield key, complaint


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key such as `finetune.lr`."""
    for name in key.split("."):
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
        raise InputError(f"the configuration has {count}:\n" + "\n".join(f"  - {fault}" for fault in faults))


def _knobs(kind: type) -> Iterator[tuple[str, dataclasses.Field]]:
    for part in dataclasses.fields(kind):
        if "limits" in part.metadata:
            yield part.name, part
        else:
            yield from ((f"{part.name}.{key}", leaf) for key, leaf in _knobs(part.default_factory))


def _parse_overrides(overrides: Iterable[str], faults: list[str]) -> Iterator[tuple[str, Any]]:
    for pair in overrides:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            faults.append(f"{OVERRIDE} {pair}: expected section.key=value")
            continue
        try:
            # OmegaConf's YAML reads 7e-5 as a number, as everybody means it; plain YAML 1.1 reads a string.
            yield key, OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"] if text else ""
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            faults.append(f"{OVERRIDE} {pair}: the value is not readable as YAML: {str(error).splitlines()[0]}")
