"""One self-contained page about a run: `python -m training.ppo.report exps/<run>` writes exps/<run>/report.html."""

from __future__ import annotations

if __name__ == "__main__":
    from interrupts import end_at_once_on_signals

    end_at_once_on_signals()

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import click
import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from errors import InputError, shows_input_errors
from files import write_atomically
from models.pictures import opened_picture
from training.parameters import GRID
from training.ppo.checkpoint import Numbers, load_checkpoint, table_from_plain, table_to_plain
from training.ppo.config import build_config, group_size
from training.ppo.figures import Curve, curves_figure, entry_names, movement_figure, solver_figure
from training.ppo.ppo_trainer import METRICS
from training.ppo.training_run import preview_name
from training.runs.checkpoint import fitting, newest_checkpoint
from training.runs.configuration import to_yaml
from training.runs.run_folder import RunFolder, read_metrics, seconds_by_phase

Row = Mapping[str, Any]

NORMAL_95 = 1.96
DIAGNOSTICS = (
    "kl",
    "entropy",
    "approximate_kl",
    "clip_fraction",
    "effective_sample_share",
    "gradient_norm",
    "first_pass_ratio_error",
    "saturated_share",
    "dropped_groups",
    "learning_rate",
)

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --muted: #5f6c7b; --line: #e4e7eb; --accent: #2563a8; --warn: #b42318; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .3rem 0 .8rem; max-width: 46rem; }
.muted, figcaption, th { color: var(--muted); }
.warn { color: var(--warn); font-weight: 600; }
figure { margin: 0 0 .8rem; }
figcaption { font-size: .82rem; line-height: 1.4; margin-top: .2rem; }
img { max-width: 100%; height: auto; display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.5rem; }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(14.5rem, 1fr)); gap: 1.4rem 1.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem; margin: 1.4rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.tile span { font-size: .85rem; color: var(--muted); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; }
.images td { padding: .5rem .6rem .5rem 0; }
.images img { width: 9rem; height: 9rem; object-fit: cover; border-radius: 4px; }
.pixelated img { image-rendering: pixelated; }
.bar { height: .7rem; background: var(--accent); border-radius: 2px; min-width: 1px; }
pre { font-size: .82rem; line-height: 1.45; background: #f7f8fa; border-radius: 8px; padding: 1rem; overflow-x: auto; }
.scroll { overflow-x: auto; }
"""


class Preview(NamedTuple):
    """An image of a held-out prompt as it lies in the run's folder."""

    path: Path
    prompt: str
    seed: str


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@shows_input_errors
def main(run: Path) -> None:
    """Write RUN/report.html anew from what lies in the run's folder."""
    click.echo(write_report(RunFolder.open(run)))


def write_report(folder: RunFolder) -> Path:
    """Build the page from the metrics, the newest checkpoint and the preview images; returns its path.

    Raises:
        InputError: the run has no checkpoint or no metrics yet, or the page cannot be written.
    """
    rows = read_metrics(folder.metrics)
    checkpoint = newest_checkpoint(folder.checkpoints)
    state = load_checkpoint(checkpoint)
    with fitting(checkpoint):
        start, mean = (
            table_to_plain(table_from_plain(numbers), numbers.get(GRID))
            for numbers in (state["start"]["table"], state["table"])
        )
        notes = [str(note) for note in state["start"]["notes"]]
    config = build_config(state["config"], str(folder.config)).config
    steps = [row for row in rows if "reward_mean" in row]
    evaluations = [row for row in rows if "heldout/reward" in row]
    sections = [
        _head(folder, steps, evaluations, state),
        _rewards(steps, evaluations, group_size(config), config.ppo.rollout_batch_size),
        _images(folder, evaluations),
        _table(rows, mean, start, notes),
        _diagnostics(steps),
        _time(steps),
        f"<h2>Configuration</h2><p class=muted>SHA-256 {state['config_hash']}</p><pre>{escape(to_yaml(config))}</pre>",
    ]
    title = escape(folder.path.name)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>{''.join(sections)}</body></html>\n"
    )
    write_atomically(folder.report, page.encode())
    return folder.report


def _head(folder: RunFolder, steps: Sequence[Row], evaluations: Sequence[Row], state: Mapping[str, Any]) -> str:
    model = state["config"]["model"]
    done, planned = state["step"], state["config"]["ppo"]["steps"]
    own = state["table"].get("guidance") is not None  # a scale for each evaluation
    images = steps[-1]["images"] if steps else 0
    lines = [
        f"<h1>{escape(folder.path.name)}</h1>",
        f"<p class=muted>{escape(str(model['dataset_name']))}, {model['num_steps'] - 1} intervals x "
        f"{model['num_points']} points, {escape(model['schedule_type'] or 'own')} schedule, "
        f"guidance {'by evaluation' if own else format(model['guidance_rate'], 'g')}. "
        f"{done} of {planned} steps, {images:,} images. "
        f"Start: {escape(state['start']['file'])}.</p>",
    ]
    if evaluations:
        last = evaluations[-1]
        lines.append('<div class="tiles">')
        for judge, name in (("reward", "training reward"), ("panel", "panel (not trained on)")):
            if f"heldout/{judge}" in last:
                lines.append(_tile(last, judge, name))
        best = last["heldout/best_step"]
        lines.append(f'<div class="tile"><b>step {best}</b><span>best held-out table so far</span></div></div>')
        hacked = [row["step"] for row in evaluations if row["heldout/suspected_reward_hacking"]]
        if hacked:
            listed = ", ".join(map(str, hacked))
            lines.append(f"<p class=warn>Suspected reward hacking at step {listed}: reward up, panel down.</p>")
    return "".join(lines)


def _tile(row: Row, judge: str, name: str) -> str:
    difference, low, high = (row[f"heldout/{judge}_difference{end}"] for end in ("", "_low", "_high"))
    return (
        f'<div class="tile"><b>{difference:+.4f}</b><span>held-out {name}, against the start: '
        f"{row[f'heldout/{judge}_start']:.4f} &rarr; {row[f'heldout/{judge}']:.4f}<br>"
        f"95% interval [{low:+.4f}, {high:+.4f}], step {row['step']}</span></div>"
    )


def _rewards(steps: Sequence[Row], evaluations: Sequence[Row], group_size: int, batch_size: int) -> str:
    figures = []
    if steps:
        figures.append(
            _figure(
                curves_figure([_training_curve(steps, group_size, batch_size)], "training reward", size=(4.6, 2.8)),
                "Mean reward of each step's rollouts; band: 95% interval of the mean over the step's prompts.",
            )
        )
    for judge, name in (("reward", "held-out reward"), ("panel", "panel")):
        shown = [row for row in evaluations if f"heldout/{judge}_difference" in row]
        if shown:
            curve = _difference_curve(shown, judge)
            figures.append(
                _figure(
                    curves_figure([curve], f"{name}, difference", zero_line=True, size=(4.6, 2.8)),
                    f"{name.capitalize()} of the mean table less that of the starting table: same prompts, same noise; "
                    f"band: 95% paired bootstrap interval.",
                )
            )
    if not figures:
        return ""
    return f'<h2>Rewards</h2><div class="pair">{"".join(figures)}</div>'


def _training_curve(steps: Sequence[Row], group_size: int, batch_size: int) -> Curve:
    means = [row["reward_mean"] for row in steps]
    errors = [
        NORMAL_95 * math.sqrt(row["reward_between_variance"] / max(1, batch_size // group_size - row["dropped_groups"]))
        for row in steps
    ]
    band = ([m - e for m, e in zip(means, errors, strict=True)], [m + e for m, e in zip(means, errors, strict=True)])
    return Curve("training reward", [row["step"] for row in steps], means, band)


def _difference_curve(evaluations: Sequence[Row], judge: str) -> Curve:
    values, low, high = (
        [row[f"heldout/{judge}_difference{end}"] for row in evaluations] for end in ("", "_low", "_high")
    )
    return Curve(judge, [row["step"] for row in evaluations], values, (low, high))


def _images(folder: RunFolder, evaluations: Sequence[Row]) -> str:
    """Held-out prompts with their images by the starting table, the best one where it is another, and the last."""
    if not evaluations:
        return ""
    last, best = evaluations[-1]["step"], evaluations[-1]["heldout/best_step"]
    names = {0: "start", best: f"best (step {best})", last: f"last (step {last})"}
    names[0] = "start"
    columns = sorted(names)
    rows: list[list[Preview]] = []
    while None not in (row := [_preview(folder.samples / preview_name(step, len(rows))) for step in columns]):
        rows.append(row)
    if not rows:
        return ""
    head = "".join(f"<th>{names[step]}</th>" for step in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_picture(preview)}</td>" for preview in row)
        + f"<td>{escape(row[0].prompt)}<br><span class=muted>seed {row[0].seed}</span></td></tr>"
        for row in rows
    )  # fmt: skip
    return (
        "<h2>Before and after</h2><p class=muted>The same prompts and the same noise; only the table differs.</p>"
        f'<div class="scroll"><table class="images pixelated"><tr>{head}<th>prompt</th></tr>{body}</table></div>'
    )


def _preview(path: Path) -> Preview | None:
    """A held-out image; None where there is none, or it is damaged."""
    try:
        with opened_picture(path) as image:
            return Preview(path, image.text["prompt"], image.text["seed"])
    except InputError:
        return None


def _picture(preview: Preview) -> str:
    data = base64.b64encode(preview.path.read_bytes()).decode()
    return f'<img alt="{escape(preview.prompt)}" src="data:image/png;base64,{data}">'


def _table(rows: Sequence[Row], mean: Numbers, start: Numbers, notes: Sequence[str]) -> str:
    parts = ["<h2>The solver</h2>"]
    parts += [f"<p class=muted>{escape(note)}</p>" for note in notes]
    if GRID in start:
        now = ("now", mean.get(GRID, start[GRID]), table_from_plain(mean))
        caption = "At which noise levels the solver asks the network, with what weight, and what it combines."
        parts.append(_figure(solver_figure(now, beside=("start", start[GRID], table_from_plain(start))), caption))
    moved = {
        name: [_by_interval(row["table"][name]) for row in rows] for name in mean if rows and name in rows[0]["table"]
    }
    moved = {name: tables for name, tables in moved.items() if any(table != tables[0] for table in tables)}
    if moved:
        caption = "The policy's mean over the steps; what does not move is left out."
        parts.append(_figure(movement_figure([row["step"] for row in rows], moved), caption))
    parts += [_numbers(name, start[name], after) for name, after in mean.items() if after.numel()]
    return "".join(parts)


def _by_interval(entries: list) -> list[list[float]]:
    """A column's entries [S][n]; noise levels [S + 1] as what each interval ends at, [S][1]."""
    return entries if isinstance(entries[0], list) else [[level] for level in entries[1:]]


def _numbers(name: str, before: Tensor, after: Tensor) -> str:
    """A part of the solver in numbers, before and after: a row for each interval."""
    earlier, later = (_by_interval(entries.tolist()) for entries in (before, after))
    head = "".join(f'<th class="number">{entry}</th>' for entry in entry_names(name, len(later[0])))
    body = "".join(
        f"<tr><td>{interval}</td>"
        + "".join(f'<td class="number">{a:.4f} &rarr; {b:.4f}</td>' for a, b in zip(*entries, strict=True))
        + "</tr>"
        for interval, entries in enumerate(zip(earlier, later, strict=True), start=1)
    )
    title = f"<tr><th>{name.replace('_', ' ')}, interval</th>{head}</tr>"
    return f'<div class="scroll"><table>{title}{body}</table></div>'


def _diagnostics(steps: Sequence[Row]) -> str:
    if not steps:
        return ""
    numbers = [row["step"] for row in steps]
    figures = [
        _figure(
            curves_figure(
                [Curve(name, numbers, [row[name] for row in steps])], name.replace("_", " "), size=(3.0, 2.0)
            ),
            METRICS[name],
        )
        for name in DIAGNOSTICS
        if name in steps[0]
    ]
    spread = [
        Curve(label, numbers, [row[f"reward_{label}_variance"] for row in steps]) for label in ("within", "between")
    ]
    figures.append(
        _figure(
            curves_figure(spread, "reward variance", size=(3.0, 2.0)),
            "Variance of the reward inside the groups and between their means.",
        )
    )
    return f'<h2>Diagnostics</h2><div class="small">{"".join(figures)}</div>'


def _time(steps: Sequence[Row]) -> str:
    if not steps:
        return ""
    spent = seconds_by_phase(steps)
    whole = sum(spent.values())
    body = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{seconds:.3f} s</td>'
        f'<td class="number">{seconds / whole:.1%}</td>'
        f'<td style="width:24rem"><div class="bar" style="width:{100 * seconds / whole:.1f}%"></div></td></tr>'
        for name, seconds in spent.items()
    )
    return (
        f"<h2>Where a step's time goes</h2><p class=muted>{whole:.2f} s a step, evaluations not included.</p>"
        f'<div class="scroll"><table>{body}</table></div>'
    )


def _figure(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


if __name__ == "__main__":
    main()
