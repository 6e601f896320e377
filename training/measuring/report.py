"""A comparison as files: a Markdown table, CSV and JSON for machines, a figure, and images to look at."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from files import write_atomically
from training.image_folder import write_sheet
from training.measuring.comparison import Comparison, Difference, Entry, Row
from training.measuring.evaluation import METRICS, REFERENCE_LABEL, Measured
from training.measuring.statistics import Interval
from training.networks import Plain

MARKERS = "osv^Dp<>hX*P"
FIGURE_DPI = 110
CSV_COLUMNS = (
    *("label", "solver", "schedule", "guidance", "num_steps", "parallel_evaluations", "total_evaluations", "exploded"),
    *("metric", "estimate", "low", "high", "best"),
)


@dataclass(frozen=True, eq=False)
class Report:
    """What is written about a comparison.

    reference: the fine solution from the same noise. real: uint8 [P, H, W, 3], true images of the first prompts, where
    the world has some. prompts: all N. settings: plain values for the record, shown at the top.
    """

    comparison: Comparison
    differences: Sequence[Difference]
    reference: Measured
    real: np.ndarray | None
    prompts: Sequence[str]
    settings: Mapping[str, Plain]

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
        chosen_elsewhere = self.comparison.validation is not None
        if not chosen_elsewhere:
            return "these very prompts, which favours classical solvers"
        return "the validation prompts (of those, distances to the reference stand at the nearest on these)"

    def markdown(self) -> str:
        """The whole report as Markdown."""
        settings = [f"- {name}: {value}" for name, value in self.settings.items()]
        meanings = [f"- {METRICS[name].heading}: {METRICS[name].meaning}." for name in self.comparison.metrics]
        parts = [
            "# Solvers side by side",
            "\n".join(settings),
            self.table(),
            f"In brackets: 95% bootstrap intervals over the prompts ({self.comparison.resamples} resamples). "
            f"Each metric of a classical solver stands at the schedule and guidance (named) that are best for it on "
            f"{self.chosen_on}. Parallel NFE counts evaluations one after another, total NFE all of them; both before "
            "guidance, which doubles those at another scale than 1. Differences are taken between best settings, "
            "prompt by prompt: better or worse where the interval excludes 0, otherwise open.",
            "\n".join(meanings),
            *self.difference_tables(),
        ]
        return "\n\n".join(parts) + "\n"

    def table(self) -> str:
        """Solvers against metrics, the reference in the first line."""
        metrics = self.comparison.metrics
        arrows = {True: "higher is better", False: "lower is better"}
        headings = [f"{METRICS[name].heading} ({arrows[METRICS[name].higher_is_better]})" for name in metrics]
        lines = [[REFERENCE_LABEL, "", "", *(self._reference_cell(name) for name in metrics), _share(self.reference)]]
        for row in self.comparison.rows:
            cells = [_with_setting(row, name) for name in metrics]
            lines.append([row.label, str(row.parallel), str(row.total), *cells, _exploded(row.entries)])
        return _markdown_table(["solver", "parallel NFE", "total NFE", *headings, "exploded"], lines)

    def _reference_cell(self, metric: str) -> str:
        return _number(self.comparison.interval(self.reference, metric))

    def difference_tables(self) -> list[str]:
        """One table for each baseline: solvers against metrics, with the verdict and what was the baseline there."""
        tables = []
        for baseline in dict.fromkeys(difference.baseline for difference in self.differences):
            found = {(id(item.row), item.metric): item for item in self.differences if item.baseline == baseline}
            rows = [row for row in self.comparison.rows if any((id(row), name) in found for name in METRICS)]
            lines = [
                [
                    row.label,
                    str(row.parallel),
                    *(_verdict(found.get((id(row), name))) for name in self.comparison.metrics),
                ]
                for row in rows
            ]
            headings = ["solver", "parallel NFE", *(METRICS[name].heading for name in self.comparison.metrics)]
            tables.append(f"## Paired differences to {baseline}\n\n{_markdown_table(headings, lines)}")
        return tables

    def csv(self) -> str:
        """Every setting of every solver, one metric a line; the interval of a Fréchet distance at the best only."""
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
                    best = row.cells[metric].entry is entry
                    if best or metric != "frechet":
                        interval = self.comparison.interval(entry.measured, metric)
                        ends = {"low": interval.low, "high": interval.high}
                    else:
                        ends = {"low": None, "high": None}
                    estimate = self.comparison.estimate(entry.measured, metric)
                    lines.append({**_described(entry), "metric": metric, "estimate": estimate, **ends, "best": best})
        return lines

    def json(self) -> str:
        """The settings, everything that the CSV holds, and the paired differences."""
        reference = {name: self.comparison.interval(self.reference, name)._asdict() for name in self.comparison.metrics}
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
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    # -------------------------------------------------------------------------------------------------- pictures

    def figure(self) -> bytes:
        """Each metric against the parallel evaluations (above) and against all evaluations (below), as PNG."""
        metrics = self.comparison.metrics
        figure = Figure(figsize=(4.2 * len(metrics), 7.6), layout="constrained")
        axes = figure.subplots(2, len(metrics), squeeze=False)
        for column, metric in enumerate(metrics):
            for panel, (attribute, heading) in zip(
                axes[:, column], (("parallel", "parallel NFE"), ("total", "total NFE")), strict=True
            ):
                self._draw(panel, metric, attribute)
                panel.set_xlabel(heading)
                panel.set_title(METRICS[metric].heading)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8))
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()

    def _draw(self, panel: Axes, metric: str, attribute: str) -> None:
        labels = list(dict.fromkeys(row.label for row in self.comparison.rows))
        for number, label in enumerate(labels):
            rows = [row for row in self.comparison.rows if row.label == label]
            cells = [row.cells[metric].interval for row in rows]
            whiskers = np.array([[cell.estimate - cell.low, cell.high - cell.estimate] for cell in cells]).T  # [2, n]
            panel.errorbar(
                [getattr(row, attribute) for row in rows],
                [cell.estimate for cell in cells],
                yerr=whiskers.clip(min=0),
                marker=MARKERS[number % len(MARKERS)],
                markersize=9 if rows[0].sampler == "epd" else 5,
                linestyle="none" if rows[0].sampler == "epd" else "-",
                color=f"C{number % 10}",
                capsize=2,
                label=label,
            )
        if (reference := self.comparison.estimate(self.reference, metric)) > 0:
            panel.axhline(reference, color="black", linestyle=":", label=REFERENCE_LABEL)
        if not METRICS[metric].higher_is_better:
            panel.set_yscale("log")
        panel.set_xticks(sorted({getattr(row, attribute) for row in self.comparison.rows}))
        panel.grid(alpha=0.3)

    def write_sheets(self, folder: Path) -> list[Path]:
        """One sheet for each parallel NFE: rows are prompts; columns the true images, the reference, the solvers."""
        count = len(self.reference.previews)
        if count == 0:
            return []
        files = []
        for nfe in dict.fromkeys(row.parallel for row in self.comparison.rows):
            columns = {} if self.real is None else {"true image": self.real}
            columns[REFERENCE_LABEL] = self.reference.previews.numpy()
            for row in self.comparison.rows:
                if row.parallel == nfe:
                    entry = row.cells["reward"].entry
                    columns[_name(entry)] = entry.measured.previews.numpy()
            files.append(folder / f"grid-nfe{nfe:02d}.png")
            rows = [[images[index] for images in columns.values()] for index in range(count)]
            write_sheet(files[-1], rows, self.prompts[:count], list(columns))
        return files


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


def _name(entry: Entry) -> str:
    return f"{entry.solver.label}, {_setting(entry)}"


def _setting(entry: Entry) -> str:
    scale = entry.solver.guidance_scale
    return f"{entry.solver.grid_name} g{'*' if scale is None else f'{scale:g}'}"


def _with_setting(row: Row, metric: str) -> str:
    cell = row.cells[metric]
    return f"{_number(cell.interval)} {_setting(cell.entry)}"


def _number(interval: Interval) -> str:
    return f"{interval.estimate:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def _verdict(difference: Difference | None) -> str:
    if difference is None:
        return "itself"
    interval = difference.interval
    numbers = f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"
    return f"{numbers} {difference.verdict} ({_name(difference.baseline_entry)})"


def _share(measured: Measured) -> str:
    return f"{int(measured.exploded.sum())}/{len(measured.exploded)}"


def _exploded(entries: Sequence[Entry]) -> str:
    """How many images exploded, at the calmest and at the wildest schedule where they differ."""
    counts = sorted(int(entry.measured.exploded.sum()) for entry in entries)
    count = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    return f"{count}/{len(entries[0].measured.exploded)}"


def _markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
