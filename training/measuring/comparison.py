"""What the measurements say: each solver at its own best schedule, and paired differences, all with 95% intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from errors import InputError
from models.randomness import generator_of
from training.measuring.evaluation import Measured, Store
from training.measuring.metrics import METRICS, metric_of
from training.measuring.statistics import Interval, bootstrap_indices, mean_interval, paired_difference_interval
from training.solver import Solver

CLASSICAL_BASELINE = "classical"
TOTAL = "total"


class SetDistance(NamedTuple):
    """A metric of all images together, as values of each (see `training.measuring.distances`).

    features: the name of the features that it is of. fingerprint: of what it is taken to. values: of features [N, D],
    [N].
    """

    features: str
    fingerprint: str
    values: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Entry:
    """A solver and what it did."""

    solver: Solver
    measured: Measured


@dataclass(frozen=True)
class Baseline:
    """What others are held against.

    label: a solver's or predictor's, or `classical` for the best of all classical solvers. nfe: at how many parallel
    evaluations; None for as many as the other has, `TOTAL` for as many as the other has in all.
    """

    label: str
    nfe: int | str | None

    def __str__(self) -> str:
        """As it is written on the command line."""
        return self.label if self.nfe is None else f"{self.label}@{self.nfe}"

    def evaluations(self, row: Row) -> int:
        """At how many parallel evaluations it is taken for a row."""
        return {None: row.parallel, TOTAL: row.total}.get(self.nfe, self.nfe)


@dataclass(frozen=True, eq=False)
class Cell:
    """One metric of one solver: at which entry (its best schedule and guidance for that metric), and how much."""

    entry: Entry
    interval: Interval


@dataclass(frozen=True, eq=False)
class Row:
    """One solver at one parallel NFE, over all its schedules and guidance scales."""

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
    """A row minus a baseline on the same prompts and noises, each at its own best setting for the metric."""

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
        return "better" if (self.interval.estimate > 0) == metric_of(self.metric).higher_is_better else "worse"


class Comparison:
    """Intervals and differences over entries that share prompts and noises.

    One set of bootstrap draws of the prompts serves everything, so that whatever is subtracted is paired.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        distances: Mapping[str, SetDistance],
        store: Store,
        *,
        seed: int,
        validation: Comparison | None = None,
    ) -> None:
        """Nothing is resampled yet.

        distances: of all images together, by metric. seed: of the bootstrap. validation: the same solvers on other
        prompts; what is best by a metric is then what is best there, if it was measured there (see `contenders`).
        """
        self.entries = list(entries)
        self.validation = validation
        order = {name: float(number) for number, name in enumerate(METRICS)}  # rewards without a place follow the first
        measured = dict.fromkeys((*entries[0].measured.values, *distances))
        self.metrics = sorted(measured, key=lambda name: order.get(name, order["reward"] + 0.5))
        self._distances, self._store, self._seed = dict(distances), store, seed
        self._indices = bootstrap_indices(len(entries[0].measured.exploded), generator_of(seed))
        self._values: dict[tuple[str, str], Tensor] = {}
        self._intervals: dict[tuple[str, str], Interval] = {}

    @property
    def resamples(self) -> int:
        """How many bootstrap draws every interval is made of."""
        return len(self._indices)

    @cached_property
    def rows(self) -> list[Row]:
        """All solvers by parallel NFE, in the order in which they were handed in."""
        return [
            Row(label, entries, {name: self._cell(entries, name) for name in self.metrics})
            for (_, label), entries in sorted(self._groups.items(), key=lambda group: group[0][0])
        ]

    @cached_property
    def _groups(self) -> dict[tuple[int, str], list[Entry]]:
        groups: dict[tuple[int, str], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.solver.evaluations.parallel, entry.solver.label), []).append(entry)
        return groups

    def values(self, measured: Measured, metric: str) -> Tensor:
        """Values [N] whose mean is the metric."""
        if metric in measured.values:
            return measured.values[metric]
        key = (measured.key, metric)
        if key not in self._values:
            distance = self._distances[metric]
            description = {"kind": "distance", "of": metric, "measured": measured.key, "to": distance.fingerprint}
            self._values[key] = self._store.fetch(
                description, lambda: {"values": distance.values(measured.features(distance.features)).cpu()}
            )["values"]
        return self._values[key]

    def estimate(self, measured: Measured, metric: str) -> float:
        """The metric's value."""
        return self.values(measured, metric).double().mean().item()

    def interval(self, measured: Measured, metric: str) -> Interval:
        """The metric's value with its interval."""
        key = (measured.key, metric)
        if key not in self._intervals:
            self._intervals[key] = mean_interval(self.values(measured, metric), self._indices)
        return self._intervals[key]

    def interval_of(self, measured: Measured, metric: str, rows: slice) -> Interval:
        """The same on some of the prompts, for a metric of single images."""
        values = measured.values[metric][rows]
        return mean_interval(values, bootstrap_indices(len(values), generator_of(self._seed)))

    def best(self, entries: Sequence[Entry], metric: str) -> Entry:
        """The entry that is best by the metric, on the validation prompts if there are any; the first of several."""
        if len(entries) == 1:
            return entries[0]
        if self.validation is not None and metric in self.validation.metrics:
            elsewhere = {entry.solver: entry for entry in self.validation.entries}
            chosen = self.validation.best([elsewhere[entry.solver] for entry in entries], metric)
            return next(entry for entry in entries if entry.solver is chosen.solver)
        sign = 1 if metric_of(metric).higher_is_better else -1
        return max(entries, key=lambda entry: sign * self.estimate(entry.measured, metric))

    def contenders(self) -> list[Solver]:
        """Of each solver at each parallel NFE those that are best by some metric: worth measuring on other prompts."""
        best = (self.best(entries, name) for entries in self._groups.values() for name in self.metrics)
        return list(dict.fromkeys(entry.solver for entry in best))

    def differences(self, baselines: Sequence[Baseline]) -> list[Difference]:
        """Every row against every baseline that has an entry for it, itself excepted."""
        return [
            difference for baseline in baselines for row in self.rows for difference in self._against(row, baseline)
        ]

    def _against(self, row: Row, baseline: Baseline) -> Iterator[Difference]:
        nfe = baseline.evaluations(row)
        candidates = [entry for entry in self.entries if _is_meant(entry.solver, baseline.label, nfe)]
        for metric in self.metrics if candidates else ():
            ours, theirs = row.cells[metric].entry, self.best(candidates, metric)
            if ours is not theirs:
                both = (self.values(entry.measured, metric) for entry in (ours, theirs))
                yield Difference(row, baseline, theirs, metric, paired_difference_interval(*both, self._indices))

    def _cell(self, entries: Sequence[Entry], metric: str) -> Cell:
        best = self.best(entries, metric)
        return Cell(best, self.interval(best.measured, metric))


def parse_baseline(text: str, solvers: Sequence[Solver]) -> Baseline:
    """`classical`, the label of one of `solvers`, each also with `@NFE` or `@total`.

    Raises InputError for another text, and where none of the solvers that it names takes NFE parallel evaluations.
    """
    label, at, nfe = text.partition("@")
    labels = dict.fromkeys(solver.label for solver in solvers)
    if label not in (CLASSICAL_BASELINE, *labels):
        raise InputError(
            f"baseline {text!r}: {label!r} is not compared here; there are {CLASSICAL_BASELINE}, {', '.join(labels)}"
        )
    if nfe == TOTAL:
        return Baseline(label, TOTAL)
    if at and not nfe.isdecimal():
        raise InputError(f"baseline {text!r}: write a number of evaluations after @, or {TOTAL}: {label}@8")
    if at and not any(_is_meant(solver, label, int(nfe)) for solver in solvers):
        raise InputError(f"baseline {text!r}: {label} is not compared at {nfe} evaluations: add {nfe} to --nfe")
    return Baseline(label, int(nfe) if at else None)


def _is_meant(solver: Solver, label: str, nfe: int) -> bool:
    fits = solver.sampler != "epd" if label == CLASSICAL_BASELINE else solver.label == label
    return fits and solver.evaluations.parallel == nfe
