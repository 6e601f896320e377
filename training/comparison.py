"""What the measurements say: each solver at its own best schedule, and paired differences, all with 95% intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from errors import InputError
from models.randomness import generator_of
from training.evaluation import METRICS, Measured, Store
from training.solver import Solver
from training.statistics import (
    FrechetResamples,
    Interval,
    bootstrap_indices,
    frechet_difference_interval,
    frechet_distance,
    frechet_interval,
    frechet_resamples,
    mean_interval,
    paired_difference_interval,
)

CLASSICAL_BASELINE = "classical"


@dataclass(frozen=True, eq=False)
class Entry:
    """A solver and what it did."""

    solver: Solver
    measured: Measured


@dataclass(frozen=True)
class Baseline:
    """What others are held against.

    label: a solver's or predictor's, or `classical` for the best of all classical solvers. nfe: at how many parallel
    evaluations; None for as many as the other has.
    """

    label: str
    nfe: int | None

    def __str__(self) -> str:
        """As it is written on the command line."""
        return self.label if self.nfe is None else f"{self.label}@{self.nfe}"


@dataclass(frozen=True, eq=False)
class Cell:
    """One metric of one solver: at which entry (its best schedule for that metric), and how much."""

    entry: Entry
    interval: Interval


@dataclass(frozen=True, eq=False)
class Row:
    """One solver at one parallel NFE, over all its schedules."""

    label: str
    entries: Sequence[Entry]
    cells: dict[str, Cell]

    @property
    def sampler(self) -> str:
        """The sampler's name."""
        return self.entries[0].solver.sampler

    @property
    def parallel(self) -> int:
        """Evaluations one after another."""
        return self.entries[0].solver.evaluations.parallel

    @property
    def total(self) -> int:
        """All evaluations."""
        return self.entries[0].solver.evaluations.total


@dataclass(frozen=True, eq=False)
class Difference:
    """A row minus a baseline on the same prompts and noises, each at its own best schedule for the metric."""

    row: Row
    baseline: Baseline
    baseline_entry: Entry
    metric: str
    interval: Interval

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval excludes 0, otherwise `open`."""
        if not self.interval.excludes_zero:
            return "open"
        return "better" if (self.interval.estimate > 0) == METRICS[self.metric].higher_is_better else "worse"


class Comparison:
    """Intervals and differences over entries that share prompts and noises.

    One set of bootstrap draws of the prompts serves everything, so that whatever is subtracted is paired.
    """

    def __init__(self, entries: Sequence[Entry], frechet_target: Tensor, store: Store, *, seed: int) -> None:
        """`frechet_target`: features [N, D], row i for the prompt of row i of every entry. `seed`: of the bootstrap."""
        self.entries = list(entries)
        self.metrics = [name for name in METRICS if name == "frechet" or name in entries[0].measured.values]
        self._target, self._store, self._seed = frechet_target, store, seed
        self._target_hash = hashlib.sha256(frechet_target.numpy().tobytes()).hexdigest()
        self._indices = bootstrap_indices(len(frechet_target), generator_of(seed))
        self._estimates: dict[tuple[str, str], float] = {}
        self._intervals: dict[tuple[str, str], Interval] = {}

    @property
    def resamples(self) -> int:
        """How many bootstrap draws every interval is made of."""
        return len(self._indices)

    @cached_property
    def rows(self) -> list[Row]:
        """All solvers by parallel NFE, in the order in which they were handed in."""
        groups: dict[tuple[int, str], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.solver.evaluations.parallel, entry.solver.label), []).append(entry)
        return [
            Row(label, entries, {name: self._cell(entries, name) for name in self.metrics})
            for (_, label), entries in sorted(groups.items(), key=lambda group: group[0][0])
        ]

    def estimate(self, measured: Measured, metric: str) -> float:
        """The metric's value."""
        key = (measured.key, metric)
        if key not in self._estimates:
            if metric == "frechet":
                self._estimates[key] = frechet_distance(measured.features, self._target)
            else:
                self._estimates[key] = measured.values[metric].mean().item()
        return self._estimates[key]

    def interval(self, measured: Measured, metric: str) -> Interval:
        """The metric's value with its interval."""
        key = (measured.key, metric)
        if key not in self._intervals:
            if metric == "frechet":
                self._intervals[key] = frechet_interval(self._frechet(measured))
            else:
                self._intervals[key] = mean_interval(measured.values[metric], self._indices)
        return self._intervals[key]

    def best(self, entries: Sequence[Entry], metric: str) -> Entry:
        """The entry that is best by the metric; the first of several."""
        sign = 1 if METRICS[metric].higher_is_better else -1
        return max(entries, key=lambda entry: sign * self.estimate(entry.measured, metric))

    def differences(self, baselines: Sequence[Baseline]) -> list[Difference]:
        """Every row against every baseline that has an entry for it, itself excepted."""
        return [
            difference for baseline in baselines for row in self.rows for difference in self._against(row, baseline)
        ]

    def _against(self, row: Row, baseline: Baseline) -> Iterator[Difference]:
        nfe = row.parallel if baseline.nfe is None else baseline.nfe
        candidates = [entry for entry in self.entries if _is_meant(entry, baseline.label, nfe)]
        for metric in self.metrics if candidates else ():
            ours, theirs = row.cells[metric].entry, self.best(candidates, metric)
            if ours is not theirs:
                yield Difference(row, baseline, theirs, metric, self._difference(ours, theirs, metric))

    def _difference(self, ours: Entry, theirs: Entry, metric: str) -> Interval:
        if metric == "frechet":
            return frechet_difference_interval(self._frechet(ours.measured), self._frechet(theirs.measured))
        return paired_difference_interval(ours.measured.values[metric], theirs.measured.values[metric], self._indices)

    def _cell(self, entries: Sequence[Entry], metric: str) -> Cell:
        best = self.best(entries, metric)
        return Cell(best, self.interval(best.measured, metric))

    def _frechet(self, measured: Measured) -> FrechetResamples:
        description = {
            "kind": "frechet",
            "features": measured.key,
            "target": self._target_hash,
            "seed": self._seed,
            "resamples": len(self._indices),
        }
        kept = self._store.fetch(description, lambda: self._frechet_replicates(measured))
        return FrechetResamples(self.estimate(measured, "frechet"), kept["replicates"])

    def _frechet_replicates(self, measured: Measured) -> dict[str, Tensor]:
        return {"replicates": frechet_resamples(measured.features, self._target, self._indices).replicates}


def parse_baseline(text: str, labels: Sequence[str]) -> Baseline:
    """`classical`, a solver's or predictor's label, each also with `@NFE`. Raises InputError for another text."""
    label, at, nfe = text.partition("@")
    if label not in (CLASSICAL_BASELINE, *labels):
        raise InputError(
            f"baseline {text!r}: {label!r} is not compared here; there are {CLASSICAL_BASELINE}, {', '.join(labels)}"
        )
    if at and not nfe.isdecimal():
        raise InputError(f"baseline {text!r}: write a number of evaluations after @, for example {label}@8")
    return Baseline(label, int(nfe) if at else None)


def _is_meant(entry: Entry, label: str, nfe: int) -> bool:
    fits = entry.solver.sampler != "epd" if label == CLASSICAL_BASELINE else entry.solver.label == label
    return fits and entry.solver.evaluations.parallel == nfe
