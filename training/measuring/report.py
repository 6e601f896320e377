"""A comparison as files: a Markdown table, CSV and JSON for machines, a figure, and images to look at."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from files import write_atomically
from training.image_folder import write_sheet
from training.measuring.comparison import Comparison, Difference, Entry, Row
from training.measuring.metrics import metric_of
from training.measuring.protocol import Published
from training.measuring.statistics import Interval
from training.networks import Plain

TERMINAL_WIDTH = 100  # characters
LEGEND = """[low, high] is a 95% interval over prompts. Behind it: schedule and guidance (g; g*: one for each
evaluation). Behind a difference: better or worse, open if it cannot be told from 0; to what."""
LONGEST_LABEL = 32  # of a solver, in a terminal
MARKERS = "osv^Dp<>hX*P"
FIGURE_DPI = 110
FIGURE_WIDTH = 9.6  # inches: as wide as a page's column at that resolution
FEWEST_FOR_AXIS = 3  # numbers of evaluations; of fewer, a figure lists the solvers by name
CSV_COLUMNS = (
    *("label", "solver", "schedule", "guidance", "num_steps", "parallel_evaluations", "total_evaluations", "exploded"),
    *("metric", "estimate", "low", "high", "best"),
)


class Cells(NamedTuple):
    """A table: its headings, and its lines, each with a text for each heading."""

    headings: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True, eq=False)
class Report:
    """What is written about a comparison.

    reference: the fine solution from the same noise, where there is one. real: uint8 [P, H, W, 3], true images of the
    first prompts, where the world has some. prompts: all N. settings: plain values for the record, shown at the top.
    published: figures that stand beside ours. groups: of the prompts, by name.
    """

    comparison: Comparison
    differences: Sequence[Difference]
    reference: Entry | None
    real: np.ndarray | None
    prompts: Sequence[str]
    settings: Mapping[str, Plain]
    published: Sequence[Published] = ()
    groups: Mapping[str, slice] = field(default_factory=dict)

    def write(self, folder: Path) -> list[Path]:
        """Write report.md, results.csv, results.json, metrics.png and a sheet of images for each parallel NFE."""
        texts = {"report.md": self.markdown(), "results.csv": self.csv(), "results.json": self.json()}
        for name, text in texts.items():
            write_atomically(folder / name, text.encode())
        write_atomically(folder / "metrics.png", self.figure())
        return [*(folder / name for name in (*texts, "metrics.png")), *self.write_sheets(folder)]

    # -------------------------------------------------------------------------------------------------- tables

    @property
    def chosen_on(self) -> str:
        """The prompts that settings were chosen on, in words."""
        validation = self.comparison.validation
        if validation is None:
            return "these very prompts, which favours classical solvers"
        unseen = [metric_of(name).heading for name in self.comparison.metrics if name not in validation.metrics]
        beside = f" (not measured there: {', '.join(unseen)}; of what is best there by any other, the best on these)"
        return f"the validation prompts{beside if unseen else ''}"

    def markdown(self) -> str:
        """The whole report as Markdown."""
        settings = [f"- {name}: {value}" for name, value in self.settings.items()]
        sheets = [f"## Images at {nfe} parallel evaluations\n\n![]({name})" for nfe, name in self.sheets().items()]
        meanings = [f"- {metric_of(name).heading}: {metric_of(name).meaning}." for name in self.comparison.metrics]
        parts = [
            "# Solvers side by side",
            "\n".join(settings),
            self.table(),
            *self.published_lines(),
            f"In brackets: 95% bootstrap intervals over the prompts ({self.comparison.resamples} resamples). "
            f"Each metric of a classical solver stands at the schedule and guidance (named) that are best for it on "
            f"{self.chosen_on}; g* is a scale for each evaluation. Parallel NFE counts evaluations one after another, "
            "total NFE all of them; both before guidance, which doubles those at another scale than 1. Exploded are "
            "images whose latents were not finite or beyond the limit, or that the decoder lost. Differences are taken "
            "between best settings, prompt by prompt: better or worse where the interval excludes 0, otherwise open.",
            "\n".join(meanings),
            "![every metric of every solver](metrics.png)",
            *self.group_tables(),
            *self.difference_tables(),
            *sheets,
        ]
        return "\n\n".join(parts) + "\n"

    def table(self) -> str:
        """Solvers against metrics, the reference in the first line, as Markdown."""
        label = "" if self.reference is None else self.reference.solver.label
        return _markdown_table(*self._cells(label, {True: " (higher is better)", False: " (lower is better)"}))

    def group_tables(self) -> list[str]:
        """Where there are several groups of prompts, one table for each metric of single images: solvers by groups."""
        return _titled(self._group_cells())

    def difference_tables(self) -> list[str]:
        """One table for each baseline: solvers against metrics, with the verdict and what was the baseline there."""
        return _titled(self._difference_cells())

    def terminal(self) -> str:
        """The same tables in plain text, at most `TERMINAL_WIDTH` columns wide."""
        first = _text_tables(*self._cells("reference", {True: " (up)", False: " (down)"}))
        tables = {**self._group_cells(), **self._difference_cells()}
        titled = ["\n\n".join([title, *_text_tables(*cells)]) for title, cells in tables.items()]
        return "\n\n".join([*first, *self.published_lines(), *titled, LEGEND])

    def _cells(self, reference: str, arrows: Mapping[bool, str]) -> Cells:
        metrics = self.comparison.metrics
        headings = [metric_of(name).heading + arrows[metric_of(name).higher_is_better] for name in metrics]
        lines = []
        if self.reference is not None:
            cells = (_number(self.comparison.interval(self.reference.measured, name)) for name in metrics)
            lines.append([reference, "", "", *cells, _exploded([self.reference])])
        for row in self.comparison.rows:
            found = ((row.cells[name], self.beside(row, name)) for name in metrics)
            cells = [f"{_number(cell.interval)} {setting_of(cell.entry)}{beside}" for cell, beside in found]
            lines.append([row.label, str(row.parallel), str(row.total), *cells, _exploded(row.entries)])
        return Cells(["solver", "parallel NFE", "total NFE", *headings, "exploded"], lines)

    def beside(self, row: Row, metric: str) -> str:
        """The published figure for a cell, in brackets."""
        figures = (one.value for one in self.published if one.metric == metric and _is(row, one))
        return "".join(f" (published: {value:g})" for value in figures)

    def published_lines(self) -> list[str]:
        """The published figures with their sources, as one block; nothing where there are none."""
        lines = [
            f"- published: {one.solver} at {one.nfe} parallel evaluations, {metric_of(one.metric).heading} "
            f"{one.value:g} ({one.source})" + ("" if self._is_measured(one) else "; not measured here")
            for one in self.published
        ]
        return ["\n".join(lines)] if lines else []

    def _is_measured(self, figure: Published) -> bool:
        return figure.metric in self.comparison.metrics and any(_is(row, figure) for row in self.comparison.rows)

    def _group_cells(self) -> dict[str, Cells]:
        if len(self.groups) < 2:
            return {}
        tables = {}
        for metric in (name for name in self.comparison.metrics if name in self.comparison.entries[0].measured.values):
            lines = []
            for row in self.comparison.rows:
                measured = row.cells[metric].entry.measured
                cells = [_number(self.comparison.interval_of(measured, metric, rows)) for rows in self.groups.values()]
                lines.append([row.label, str(row.parallel), *cells])
            headings = ["solver", "parallel NFE", *self.groups]
            tables[f"{metric_of(metric).heading} by prompts"] = Cells(headings, lines)
        return tables

    def _difference_cells(self) -> dict[str, Cells]:
        tables = {}
        for baseline in dict.fromkeys(difference.baseline for difference in self.differences):
            found = {(id(item.row), item.metric): item for item in self.differences if item.baseline == baseline}
            compared = {row for row, _ in found}
            rows = [row for row in self.comparison.rows if id(row) in compared]
            lines = [
                [
                    row.label,
                    str(row.parallel),
                    *(_verdict(found.get((id(row), name))) for name in self.comparison.metrics),
                ]
                for row in rows
            ]
            headings = ["solver", "parallel NFE", *(metric_of(name).heading for name in self.comparison.metrics)]
            title, cells = f"Paired differences to {baseline}", Cells(headings, lines)
            # Solvers without parallel points have as many evaluations in all: one table says both.
            twin = next((before for before, others in tables.items() if others == cells), None)
            tables.pop(twin, None)
            tables[title if twin is None else f"{twin} and {baseline}"] = cells
        return tables

    def csv(self) -> str:
        """Every setting of every solver, one metric a line."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._csv_rows())
        return buffer.getvalue()

    def _csv_rows(self) -> list[dict[str, Plain]]:
        lines: list[dict[str, Plain]] = []
        for row in self.comparison.rows:
            for entry in row.entries:
                for metric in self.comparison.metrics:
                    interval = self.comparison.interval(entry.measured, metric)
                    best = row.cells[metric].entry is entry
                    lines.append({**_described(entry), "metric": metric, **interval._asdict(), "best": best})
        return lines

    def json(self) -> str:
        """The settings, everything that the CSV holds, and the paired differences."""
        reference = self.reference and {
            name: self.comparison.interval(self.reference.measured, name)._asdict() for name in self.comparison.metrics
        }
        differences = [
            {
                "label": item.row.label,
                "parallel_evaluations": item.row.parallel,
                "schedule": item.row.cells[item.metric].entry.solver.grid_name,
                "guidance": item.row.cells[item.metric].entry.solver.guidance_scale,
                "baseline": str(item.baseline),
                "baseline_entry": _described(item.baseline_entry),
                "metric": item.metric,
                **item.interval._asdict(),
                "verdict": item.verdict,
            }
            for item in self.differences
        ]
        content = {
            "settings": dict(self.settings),
            "reference": reference,
            "results": self._csv_rows(),
            "differences": differences,
            "published": [asdict(one) for one in self.published],
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    # -------------------------------------------------------------------------------------------------- pictures

    def figure(self) -> bytes:
        """`plots` as PNG."""
        buffer = io.BytesIO()
        FigureCanvasAgg(self.plots()).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()

    def plots(self) -> Figure:
        """Each metric against the parallel evaluations (left) and all evaluations (right), once where these agree.

        Where there are fewer than `FEWEST_FOR_AXIS` numbers of evaluations, each metric of the solvers one by one.
        """
        rows, metrics = self.comparison.rows, self.comparison.metrics
        listed = len({row.parallel for row in rows}) < FEWEST_FOR_AXIS
        same = all(row.parallel == row.total for row in rows)
        axes = (None,) if listed else ("parallel",) if same else ("parallel", "total")
        shown = [(metric, axis) for metric in metrics for axis in axes]
        lines = -(-len(shown) // 2)
        height = 0.8 + 0.24 * len(rows) if listed else 3.2
        figure = Figure(figsize=(FIGURE_WIDTH, 0.6 + lines * height), dpi=FIGURE_DPI, layout="constrained")
        panels = figure.subplots(lines, 2, squeeze=False, sharey="row" if listed or not same else "none").flat
        for panel, (metric, axis) in zip(panels, shown, strict=False):
            panel.set_title(metric_of(metric).heading)
            panel.grid(alpha=0.3)
            panel.tick_params(labelsize=8)
            if axis is None:
                self._list(panel, metric)
            else:
                self._draw(panel, metric, axis)
        for panel in panels[len(shown) :]:
            panel.set_axis_off()
        handles, labels = panels[0].get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
        return figure

    def _list(self, panel: Axes, metric: str) -> None:
        """A line for each solver."""
        rows = self.comparison.rows
        for place, row in enumerate(rows):
            colour = "C0" if row.sampler == "epd" else "C7"
            cell = row.cells[metric].interval
            panel.errorbar(cell.estimate, place, xerr=_whiskers([cell]), marker="o", color=colour, capsize=2)
        names = [f"{row.label}, {row.parallel} ({row.total} in all)" for row in rows]
        panel.set_yticks(range(len(rows)), names)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        self._finish(panel.axvline, panel.xaxis, metric)

    def _draw(self, panel: Axes, metric: str, attribute: str) -> None:
        """A curve for each solver, beside each other by a little, so that no interval hides another."""
        labels = list(dict.fromkeys(row.label for row in self.comparison.rows))
        for number, label in enumerate(labels):
            rows = [row for row in self.comparison.rows if row.label == label]
            cells = [row.cells[metric].interval for row in rows]
            aside = 1.01 ** (number - (len(labels) - 1) / 2)
            panel.errorbar(
                [getattr(row, attribute) * aside for row in rows],
                [cell.estimate for cell in cells],
                yerr=_whiskers(cells),
                marker=MARKERS[number % len(MARKERS)],
                markersize=8 if rows[0].sampler == "epd" else 4,
                linestyle="none" if rows[0].sampler == "epd" else "-",
                linewidth=1,
                color=f"C{number % 10}",
                capsize=2,
                label=label,
            )
        self._finish(panel.axhline, panel.yaxis, metric)
        counts = sorted({getattr(row, attribute) for row in self.comparison.rows})
        panel.set_xscale("log")
        panel.set_xticks(counts, counts)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel(f"{attribute} NFE")

    def _finish(self, line: Callable[..., object], axis: Axis, metric: str) -> None:
        """Draw the reference as a line; take logarithms of distances."""
        reference = self.reference and self.comparison.estimate(self.reference.measured, metric)
        if reference is not None and reference > 0:
            line(reference, color="black", linestyle=":", label=self.reference.solver.label)
        estimates = [row.cells[metric].interval.estimate for row in self.comparison.rows]
        if not metric_of(metric).higher_is_better and min(estimates) > 0:  # KID is unbiased, and may be negative
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())

    def sheets(self) -> dict[int, str]:
        """The name of the sheet of images of each parallel NFE; none where no images were kept."""
        shown = len(self.comparison.entries[0].measured.previews) > 0
        return {row.parallel: f"grid-nfe{row.parallel:02d}.png" for row in self.comparison.rows if shown}

    def write_sheets(self, folder: Path) -> list[Path]:
        """One sheet for each parallel NFE: a row a prompt; columns classical solvers, ours, and what they aim at."""
        count = len(self.comparison.entries[0].measured.previews)
        for nfe, name in self.sheets().items():
            shown = [row for row in self.comparison.rows if row.parallel == nfe]
            entries = [row.cells["reward"].entry for row in sorted(shown, key=lambda row: row.sampler == "epd")]
            columns = {_heading(entry): entry.measured.previews.numpy() for entry in entries}
            if self.reference is not None:
                columns[self.reference.solver.label] = self.reference.measured.previews.numpy()
            if self.real is not None:
                columns["true image"] = self.real
            rows = [[images[index] for images in columns.values()] for index in range(count)]
            write_sheet(folder / name, rows, self.prompts[:count], list(columns))
        return [folder / name for name in self.sheets().values()]


def _whiskers(cells: Sequence[Interval]) -> np.ndarray:
    """How far intervals reach below and above their estimates: [2, n]."""
    reach = np.array([[cell.estimate - cell.low, cell.high - cell.estimate] for cell in cells]).T
    return reach.clip(min=0)


def _is(row: Row, figure: Published) -> bool:
    """Whether a figure is of the row's solver, or of its kind, at as many parallel evaluations."""
    return figure.nfe == row.parallel and figure.solver in (row.label, row.sampler)


def _described(entry: Entry) -> dict[str, Plain]:
    solver = entry.solver
    return {
        "label": solver.label,
        "solver": solver.sampler,
        "schedule": solver.grid_name,
        "guidance": solver.guidance_scale,
        "num_steps": solver.num_steps,
        "parallel_evaluations": solver.evaluations.parallel,
        "total_evaluations": solver.evaluations.total,
        "exploded": int(entry.measured.exploded.sum()),
    }


def _heading(entry: Entry) -> str:
    """An entry in words."""
    scale = entry.solver.guidance_scale
    guidance = "its own" if scale is None else f"{scale:g}"
    return f"{entry.solver.label}, {entry.solver.grid_name} schedule, guidance {guidance}"


def setting_of(entry: Entry) -> str:
    """The schedule and the guidance of an entry; * for a guidance of each evaluation's own."""
    scale = entry.solver.guidance_scale
    return f"{entry.solver.grid_name} g{'*' if scale is None else f'{scale:g}'}"


def _number(interval: Interval) -> str:
    return f"{interval.estimate:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def _verdict(difference: Difference | None) -> str:
    if difference is None:
        return "itself"
    interval, theirs = difference.interval, difference.baseline_entry
    numbers = f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"
    return f"{numbers} {difference.verdict} ({theirs.solver.label}, {setting_of(theirs)})"


def _exploded(entries: Sequence[Entry]) -> str:
    """How many images exploded, at the calmest and at the wildest schedule where they differ."""
    counts = sorted(int(entry.measured.exploded.sum()) for entry in entries)
    count = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    return f"{count}/{len(entries[0].measured.exploded)}"


def _text_tables(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Text, at most `TERMINAL_WIDTH` wide: as many of the columns as fit, then the next, the solver before each."""
    shown = [[_shortened(row[0]), *row[1:]] for row in [headings, *lines]]
    widths = [max(len(row[column]) for row in shown) for column in range(len(headings))]
    left, taken = list(range(1, len(headings))), [0]
    while left:
        while left and (len(taken) == 1 or sum(widths[c] + 2 for c in [*taken, left[0]]) <= TERMINAL_WIDTH + 2):
            taken.append(left.pop(0))
        yield "\n".join("  ".join(row[c].ljust(widths[c]) for c in taken).rstrip() for row in shown)
        taken = [0]


def _shortened(label: str) -> str:
    """A label, the middle of a long one left out."""
    half = LONGEST_LABEL // 2
    return label if len(label) <= LONGEST_LABEL else f"{label[:half]}…{label[1 - half :]}"


def _titled(tables: Mapping[str, Cells]) -> list[str]:
    return [f"## {title}\n\n{_markdown_table(*cells)}" for title, cells in tables.items()]


def _markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
