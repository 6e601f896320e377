"""The figures of the main job: runs of several arms, seeds and starts, scored on held-out prompts, as tables.

    python -m benchmarks.tuning_study benchmarks/studies/shapes.yaml --output outputs/studies/shapes

The runs are made one after another, each by the command that anybody would use. What is there already is kept: run the
same command again to go on after an interrupt. Writes study.md, study.json and study.png to the output folder; the
runs lie in runs/, what they printed in logs/. Needs the package cma, which the extra `test` brings.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import click
from click.core import ParameterSource
from lightning.fabric import Fabric
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.tuning_results import (
    METRICS,
    OVER_BOTH,
    TABLES,
    Finished,
    Group,
    Learning,
    Line,
    Scorer,
    finish,
    heldout_prompts,
    learning_of,
    lines_of,
    measure,
    watched,
)
from benchmarks.tuning_runs import (
    SCHEMA,
    Outcome,
    PlannedRun,
    Study,
    begun,
    carry_out,
    outcome_of,
    plan_runs,
    require_alike,
)
from errors import InputError, shows_input_errors
from files import write_atomically
from interrupts import goes_on_by
from training.measuring.evaluation import Store
from training.measuring.statistics import Interval
from training.ppo.figures import COLOURS, GRID
from training.runs.command_line import require_one_process
from training.runs.configuration import to_plain
from training.runs.fabric import fabric_of

NOT_REACHED = "not reached"
EXPLAINED = """\
Every difference is paired: the same prompts and the same noise. In brackets 95% bootstrap intervals: of a single seed
and of "all seeds, over prompts" over prompts; "over seeds and prompts" draws both, independently of each other (with
few seeds such an interval is too narrow rather than too wide). Bold: the interval excludes 0. Evaluations are
counted before guidance, which doubles them. Each classical solver stands at the schedule and the guidance (g) that are
best for the metric on these very prompts, which favours the classical solvers. Guidance scales tried: {guidances}."""
LEARNED = """\
By the watch of the runs, on its own prompts. Gain: the mean paired difference of the held-out reward to the starting
table. Plateau: its mean over the last {plateau} evaluations. Images: until an evaluation first shows {share:.0%} of the
highest plateau of all arms from the same start, at the resolution of logging.eval_interval."""


@dataclass(frozen=True)
class StudyReport:
    """What a study found.

    Attributes:
        study: its file.
        title: for people.
        command: that makes it again.
        outcomes: of all runs.
        groups, lines, learning: what was measured; empty where no run is finished.
    """

    study: Study
    title: str
    command: str
    outcomes: Sequence[Outcome]
    groups: Sequence[Group]
    lines: Sequence[Line]
    learning: Sequence[Learning]

    def markdown(self) -> str:
        """The whole report as Markdown."""
        study = self.study
        last = study.heldout_seed + study.heldout_count - 1
        parts = [
            f"# {self.title}",
            f"    {self.command}",
            f"{study.heldout_count} held-out images: the first prompts of `{study.heldout_prompts}`, one image each, "
            f"seeds {study.heldout_seed} to {last}, the same noise for all.",
            *self.failures(),
            *self.tables(),
        ]
        return "\n\n".join(parts) + "\n"

    def failures(self) -> list[str]:
        """A line for each run that failed."""
        return [f"FAILED: {outcome.failure}" for outcome in self.outcomes if outcome.failure is not None]

    def tables(self) -> list[str]:
        """The tables with their headings and explanations; none where no run is finished."""
        if not self.groups:
            return []
        scales = ", ".join(f"{scale:g}" for scale in self.study.guidances) or "the runs' own alone"
        found = [EXPLAINED.format(guidances=scales)]
        for table, meaning in TABLES.items():
            found += [
                f"## Against the starting table: {meaning}",
                _table(*self._against_start(table)),
                f"## Against the best classical solver: {meaning}",
                _table(*self._against_classical(table)),
            ]
        learned = LEARNED.format(plateau=self.study.plateau, share=self.study.gain_share)
        return [*found, "## Learning", learned, _table(*self._learned())]

    def _metrics(self) -> list[str]:
        return [name for name in METRICS if any(line.metric == name for line in self.lines)]

    def _against_start(self, table: str) -> tuple[list[str], list[list[str]]]:
        metrics = self._metrics()
        headings = ["arm", "start", "NFE parallel / all", "seed"]
        for name in metrics:
            headings += [f"{METRICS[name]}: start", "tuned", "difference"]
        rows: dict[tuple[str, ...], list[str]] = {}
        for line in self.lines:
            if line.table == table and line.budget is None:
                key = (line.arm, line.start, f"{line.parallel} / {line.total}", _seed(line))
                rows.setdefault(key, [*key])
                rows[key] += [f"{line.baseline_value:.3f}", f"{line.value:.3f}", _difference(line.difference)]
        return headings, list(rows.values())

    def _against_classical(self, table: str) -> tuple[list[str], list[list[str]]]:
        headings = [
            "arm",
            "start",
            "NFE parallel / all",
            "seed",
            "metric",
            "the classical solver has",
            "best classical",
        ]
        rows = [
            [
                *(line.arm, line.start, f"{line.parallel} / {line.total}", _seed(line), METRICS[line.metric]),
                *(f"{line.budget}: {line.baseline_total}", line.baseline, f"{line.baseline_value:.3f}"),
                _difference(line.difference),
            ]
            for line in self.lines
            if line.table == table and line.budget is not None
        ]
        return [*headings, "its value", "difference"], rows

    def _learned(self) -> tuple[list[str], list[list[str]]]:
        headings = [
            *("arm", "start", "images in all", "gain waited for", "images to it, by seed", "median"),
            *("times fewer than the first arm", "plateau", "scatter in a run", "scatter between seeds"),
            *("reward variance within groups", "between groups"),
        ]
        return headings, [_learning_row(item, self._first(item.start)) for item in self.learning]

    def _first(self, start: str) -> Learning:
        return next(item for item in self.learning if item.start == start)

    def json(self) -> str:
        """Everything that the Markdown says, in plain numbers."""
        content = {
            "study": to_plain(self.study),
            "command": self.command,
            "runs": [_described(outcome) for outcome in self.outcomes],
            "differences": [
                {**dataclasses.asdict(line), "difference": line.difference._asdict()} for line in self.lines
            ],
            "learning": [dataclasses.asdict(item) for item in self.learning],
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def figure(self) -> bytes:
        """The watch's held-out reward against images, one panel for each start: thin the seeds, thick their mean."""
        starts = list(dict.fromkeys(group.start_name for group in self.groups))
        arms = dict(zip(dict.fromkeys(group.arm for group in self.groups), cycle(COLOURS), strict=False))
        figure = Figure(figsize=(5.2 * len(starts), 3.8), layout="constrained")
        panels = figure.subplots(1, len(starts), squeeze=False)[0]
        for start, panel in zip(starts, panels, strict=True):
            for group in (group for group in self.groups if group.start_name == start):
                views = [watched(one) for one in group.runs]
                for view in views:
                    panel.plot(view.images, view.reward, color=arms[group.arm], linewidth=0.8, alpha=0.45)
                means = [sum(rewards) / len(views) for rewards in zip(*(view.reward for view in views), strict=True)]
                panel.plot(views[0].images, means, color=arms[group.arm], linewidth=2.2, label=group.arm)
            panel.set_title(f"from {start}")
            panel.set_xlabel("training images")
            panel.grid(color=GRID)
            panel.legend(frameon=False, fontsize=8)
        panels[0].set_ylabel("held-out reward (the watch's prompts)")
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()

    def write(self, folder: Path) -> list[Path]:
        """Write study.md and study.json, and study.png where a run is finished; returns their paths."""
        contents = {"study.md": self.markdown().encode(), "study.json": self.json().encode()}
        if self.groups:
            contents["study.png"] = self.figure()
        for name, content in contents.items():
            write_atomically(folder / name, content)
        return [folder / name for name in contents]


def _seed(line: Line) -> str:
    if line.seed is not None:
        return str(line.seed)
    return f"all seeds, over {OVER_BOTH}" if line.over == OVER_BOTH else "all seeds, over prompts"


def _difference(interval: Interval) -> str:
    text = f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
    return f"**{text}**" if interval.excludes_zero else text


def _learning_row(item: Learning, first: Learning) -> list[str]:
    reached = [NOT_REACHED if count is None else f"{count:,}" for count in item.images_to_target]
    median, reference = item.median_images, first.median_images
    both = max(median, reference) < float("inf")
    return [
        item.arm,
        item.start,
        f"{item.images:,}",
        "no arm gained" if item.target is None else f"{item.target:+.3f}",
        ", ".join(reached),
        f"{median:,.0f}" if median < float("inf") else NOT_REACHED,
        f"{reference / median:.1f}" if both else "",
        f"{item.plateau:+.3f}",
        f"{item.scatter:.4f}",
        "" if item.between_seeds is None else f"{item.between_seeds:.4f}",
        f"{item.within:.4f}",
        f"{item.between:.4f}",
    ]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _described(outcome: Outcome) -> dict[str, Any]:
    run = outcome.run
    return {
        "name": run.name,
        "arm": run.arm,
        "start": str(run.start.snapshot.where),
        "seed": run.seed,
        "images": run.images,
        "folder": None if outcome.folder is None else str(outcome.folder.path),
        "failure": outcome.failure,
    }


def carry_out_all(runs: Sequence[PlannedRun], output: Path, device: str | None) -> Iterator[Outcome]:
    """Make the runs one after another, and say how each ended."""
    for number, run in enumerate(runs, start=1):
        log = output / "logs" / f"{run.name}.log"
        click.echo(f"run {number} of {len(runs)}: {run.name}, {run.images:,} images; what it prints: {log}")
        start = perf_counter()
        outcome = carry_out(run, output / "runs", device, log)
        click.echo(f"  {outcome.failure or outcome.folder.path}  ({perf_counter() - start:.0f} s)")
        yield outcome


def settle(outcome: Outcome) -> tuple[Outcome, Finished | None]:
    """Export a run's tables; one of which that is impossible has failed."""
    if outcome.folder is None:
        return outcome, None
    try:
        return outcome, finish(outcome.run, outcome.folder)
    except InputError as error:
        return dataclasses.replace(outcome, folder=None, failure=f"{outcome.run.name}: {error}"), None


def score(study: Study, finished: Sequence[Finished], fabric: Fabric, cache: Path) -> list[Group]:
    """Measure the finished runs' tables on the held-out prompts, with a progress bar."""
    with tqdm(unit="evaluation", disable=not fabric.is_global_zero) as bar:
        return measure(finished, Scorer(study, [one.run for one in finished], fabric, Store(cache, click.echo), bar))


def _again(study_file: Path, output: Path) -> str:
    """The command that goes on with a study, or makes it again, with the options that were typed."""
    context = click.get_current_context()
    typed = [
        word
        for name, value in context.params.items()
        if name not in ("study_file", "output") and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    return shlex.join(["python", "-m", "benchmarks.tuning_study", str(study_file), "--output", str(output), *typed])


@click.command(context_settings={"max_content_width": 110, "show_default": True})
@click.argument("study_file", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Folder.  [default: outputs/studies/<the file's name>]")
@click.option("--device", help="auto, cpu, cuda, cuda:N or mps.  [default: the runs' own]")
@click.option(
    "--num-devices",
    type=click.IntRange(min=1),
    default=1,
    help="Devices, each with a process of its own, that share out the held-out images; runs have run.num_devices.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("outputs/evaluation-cache"),
    help="Where measurements are kept; that of evaluate.py.",
)
@shows_input_errors
def main(study_file: Path, output: Path | None, device: str | None, num_devices: int, cache: Path) -> None:
    """Make the runs of a study, score their tables on held-out prompts, and print and write what was found.

    \b
    python -m benchmarks.tuning_study benchmarks/studies/shapes.yaml --device cuda
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    study = SCHEMA.load(study_file).config
    output = output or Path("outputs/studies") / study_file.stem
    runs = plan_runs(study, output / "runs")
    require_alike(runs)
    heldout_prompts(study, runs)
    for run in runs:
        begun(run, output / "runs")
    fabric = fabric_of(device or runs[0].start.config.run.device, num_devices)
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # the others are started for the scores, when all runs are made
    command = _again(study_file, output)
    if first:
        require_one_process()
        with goes_on_by(command):
            settled = [settle(outcome) for outcome in carry_out_all(runs, output, device)]
    else:
        settled = [settle(outcome_of(run, output / "runs")) for run in runs]
    outcomes, finished = [outcome for outcome, _ in settled], [one for _, one in settled if one is not None]
    fabric.launch()
    groups = score(study, finished, fabric, cache) if finished else []
    if not first:
        return
    lines = [line for group in groups for line in lines_of(group)]
    report = StudyReport(study, study_file.stem, command, outcomes, groups, lines, learning_of(groups, study))
    files = report.write(output)
    click.echo("\n\n".join(["", *report.failures(), *report.tables(), ""]))
    click.echo("wrote " + ", ".join(map(str, files)))
    if len(finished) < len(runs):
        raise InputError(f"{len(runs) - len(finished)} of {len(runs)} runs failed: {output / 'study.md'} names them")


if __name__ == "__main__":
    main()
