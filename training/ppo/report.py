"""One self-contained page about a run: `python -m training.ppo.report exps/<run>` writes exps/<run>/report.html."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import click
from torch import Tensor

from errors import InputError, shows_input_errors
from files import write_atomically
from models.pictures import opened_picture
from models.registry import SHAPES_WORLD, is_unconditional, pipeline_of, traits_of
from training.diffusers_export import lines_for_diffusers
from training.measuring.page import StripRow, commands, figure, folded, page, strip, verdict
from training.measuring.statistics import Interval
from training.parameters import GRID
from training.ppo.checkpoint import Numbers, load_checkpoint, table_from_plain, table_to_plain
from training.ppo.config import Config, build_config, group_size, model_spec
from training.ppo.export_epd_predictor import DIFFUSERS
from training.ppo.figures import Curve, curves_figure, entry_names, movement_figure, solver_figure
from training.ppo.ppo_trainer import METRICS
from training.ppo.reward_names import reward_name
from training.ppo.training_run import CLASSICAL, REFERENCE, preview_name
from training.runs.checkpoint import fitting, newest_checkpoint
from training.runs.configuration import to_yaml
from training.runs.run_folder import RunFolder, read_metrics, seconds_by_phase
from training.solver import Origin, solver_of

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


class Preview(NamedTuple):
    """An image of a held-out prompt as it lies in the run's folder."""

    path: Path
    prompt: str
    seed: str
    size: tuple[int, int]


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
    solver = solver_of(table_from_plain(state["start"]["table"]), Origin(checkpoint, "", state["start"]["metadata"]))
    cost = solver.evaluations
    sections = [
        _head(folder, steps, state),
        _verdict(rows, evaluations, state, cost.total),
        _images(folder, evaluations, state, cost.total),
        _table(rows, mean, start, notes),
        _next(folder, evaluations, config, cost.parallel),
        _rewards(steps, evaluations, group_size(config), config.ppo.rollout_batch_size),
        folded(
            "Details",
            [
                *(_numbers(name, start[name], after) for name, after in mean.items() if after.numel()),
                _diagnostics(steps),
                _time(steps),
                f"<h2>Configuration</h2><p class=muted>SHA-256 {state['config_hash']}</p>"
                f"<pre>{escape(to_yaml(config))}</pre>",
            ],
        ),
    ]
    write_atomically(folder.report, page(folder.path.name, sections))
    return folder.report


def _head(folder: RunFolder, steps: Sequence[Row], state: Mapping[str, Any]) -> str:
    model = state["config"]["model"]
    own = state["table"].get("guidance") is not None  # a scale for each evaluation
    return (
        f"<h1>{escape(folder.path.name)}</h1>"
        f"<p class=muted>{escape(str(model['dataset_name'] or model['model_path']))}, {model['num_steps'] - 1} "
        f"intervals x {model['num_points']} points, {escape(model['schedule_type'] or 'own')} schedule, "
        f"guidance {'by evaluation' if own else format(model['guidance_rate'], 'g')}. "
        f"{state['step']} of {state['config']['ppo']['steps']} steps. Start: {escape(state['start']['file'])}.</p>"
    )


def _chosen(evaluations: Sequence[Row]) -> Row:
    """The evaluation of the best table, or of the last where none has beaten the start."""
    best = evaluations[-1]["heldout/best_step"]
    return next((row for row in evaluations if row["step"] == best and best), evaluations[-1])


def _verdict(rows: Sequence[Row], evaluations: Sequence[Row], state: Mapping[str, Any], total: int) -> str:
    """What came out, whether it can be told from chance, and what it cost."""
    cost = _cost(rows, total)
    if not evaluations:
        said = "Name held-out prompts with logging.eval_prompts, and the run says what it gained."
        return verdict("open", "Nothing was measured.", [said, *cost])
    row, logging = _chosen(evaluations), state["config"]["logging"]
    kind, headline = _headline(row)
    dropped = int(row["heldout/dropped"])
    left_out = f" ({dropped} more have a score that is not finite, and are left out)" if dropped else ""
    sentences = [
        f"On {logging['eval_count'] - dropped} held-out prompts{left_out}, after step {row['step']}, the "
        f"training reward is {row['heldout/reward']:.4f}, {row['heldout/reward_start']:.4f} at the start: "
        f"{_shown(row, 'reward')}.",
        *_selected(row, evaluations),
        *_panel(row, logging["panel"]),
        *_classical(row, state["watch"], total),
        *cost,
    ]
    hacked = [seen["step"] for seen in evaluations if seen["heldout/suspected_reward_hacking"]]
    listed = ", ".join(map(str, hacked))
    warning = f"<p class=warn>Suspected reward hacking at step {listed}: reward up, panel down.</p>" if hacked else ""
    return verdict(kind, headline, sentences) + warning


def _selected(row: Row, evaluations: Sequence[Row]) -> Iterator[str]:
    """What the choice of the step does to its numbers, where there was one."""
    tuned = sum(seen["step"] > 0 for seen in evaluations)
    if row["step"] == evaluations[-1]["heldout/best_step"] and tuned > 1:
        yield (
            f"That step is the best of {tuned} by these same prompts, which flatters it: the gain on others is likely "
            f"smaller, and below stands how to measure it."
        )


def _headline(row: Row) -> tuple[str, str]:
    """The kind of a verdict, and the verdict in a few words; it is good where no classical solver is better."""
    if row["step"] == 0:
        return "open", "Nothing is tuned yet."
    gain, word = f"reward {row['heldout/reward_difference']:+.4f}", _compared(row, "reward")
    kind = word if word in ("better", "worse") else "open"
    headline = {
        "better": f"Better than its start: {gain}",
        "worse": f"Worse than its start: {gain}",
        "open": f"No gain that can be told from chance: {gain}",
    }[kind]
    if "heldout/classical_difference" not in row:
        return kind, headline
    beside = _compared(row, "classical")
    than = "from" if beside == "not told apart" else "than"
    headline += f"; {beside.removesuffix(' apart')} {than} the best classical solver"
    return ("open" if beside == "worse" and kind == "better" else kind), headline


def _difference(row: Row, judge: str) -> Interval:
    return Interval.from_metrics(row, f"heldout/{judge}_difference")


def _shown(row: Row, judge: str) -> str:
    difference, low, high = _difference(row, judge)
    return f"{difference:+.4f}, 95% interval [{low:+.4f}, {high:+.4f}]"


def _compared(row: Row, judge: str) -> str:
    _, low, high = _difference(row, judge)
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


def _panel(row: Row, panel: str | None) -> Iterator[str]:
    if "heldout/panel_difference" not in row:
        yield "Nobody else judged it: logging.panel is null."
        return
    verdict_of_panel = f"{_compared(row, 'panel')}, {_shown(row, 'panel')}"
    yield f"The panel ({reward_name(panel)}), which is never trained on: {verdict_of_panel}."


def _classical(row: Row, watch: Mapping[str, Any], total: int) -> Iterator[str]:
    if "heldout/classical_difference" in row:
        yield (
            f"Beside the best classical solver at as many evaluations in all ({watch['classical_name']}, {total} "
            f"evaluations, reward {row['heldout/classical']:.4f}): {_compared(row, 'classical')}, "
            f"{_shown(row, 'classical')}."
        )
    if "heldout/classical_panel_difference" in row:
        yield f"By the panel: {_compared(row, 'classical_panel')}, {_shown(row, 'classical_panel')}."


def _cost(rows: Sequence[Row], total: int) -> Iterator[str]:
    images = max((row["images"] for row in rows if "images" in row), default=0)
    seconds = sum(row.get("seconds/step", 0.0) for row in rows)
    yield (
        f"The tuning took {images:,} images, {images * total:,} network evaluations and {_duration(seconds)}, "
        f"held-out evaluations not counted."
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _next(folder: RunFolder, evaluations: Sequence[Row], config: Config, parallel: int) -> str:
    """What can be done with the run now, to be copied."""
    best = " --best" if evaluations and evaluations[-1]["heldout/best_step"] else ""
    model = model_spec(config)
    run, typed = folder.path, shlex.quote(str(folder.path))
    asked, prompts = ' --prompt "..."', "" if model in SHAPES_WORLD else " --prompt-file PROMPTS.csv"
    if is_unconditional(model):
        asked, prompts = "", f" --reward {config.reward.weights_path}"
    exported = f"{run}/export/{DIFFUSERS}"
    wanted = {
        "Export the solver": f"python -m training.ppo.export_epd_predictor {typed}{best}",
        "Draw with it": f"python sample.py --predictor_path {typed}{asked} --seeds 0-3 --grid",
        "Measure it beside classical solvers, on prompts that the run never saw (--dry-run says what that costs)": (
            f"python evaluate.py --model {model} --solvers epd,ddim,dpmpp,ipndm --predictor_path {typed} "
            f"--nfe {parallel}{prompts}"
        ),
        f"Use it in diffusers, without this repository ({exported}/README.md says more)": (
            lines_for_diffusers(exported, *_pipeline(model))
        ),
        "Show it to others": f"python -m scripts.push_to_hub {typed} --repo OWNER/NAME",
    }
    return f"<h2>What next</h2>{commands(wanted)}"


def _pipeline(model: str | None) -> tuple[str, str]:
    """What diffusers loads the model by, and its backend; stand-ins where nothing says it."""
    try:
        return ("MODEL", "ldm") if model is None else (pipeline_of(model), traits_of(model).backend)
    except InputError:
        return "MODEL", "ldm"


def _rewards(steps: Sequence[Row], evaluations: Sequence[Row], group_size: int, batch_size: int) -> str:
    figures = []
    if steps:
        plot = curves_figure([_training_curve(steps, group_size, batch_size)], "training reward", size=(4.6, 2.8))
        caption = "Mean reward of each step's rollouts; band: 95% interval of the mean over the step's prompts."
        figures.append(figure(plot, caption))
    for judge, name in (("reward", "held-out reward"), ("panel", "panel")):
        shown = [row for row in evaluations if f"heldout/{judge}_difference" in row]
        if shown:
            curve = _difference_curve(shown, judge)
            plot = curves_figure([curve], f"{name}, difference", zero_line=True, size=(4.6, 2.8))
            caption = (
                f"{name.capitalize()} of the mean table less that of the starting table: same prompts, same noise; "
                f"band: 95% paired bootstrap interval."
            )
            figures.append(figure(plot, caption))
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
    values, low, high = zip(*(_difference(row, judge) for row in evaluations), strict=True)
    return Curve(judge, [row["step"] for row in evaluations], values, (low, high))


def _images(folder: RunFolder, evaluations: Sequence[Row], state: Mapping[str, Any], total: int) -> str:
    """Held-out prompts: by the start, tuned, by the best classical solver, and as a fine solution has them."""
    if not evaluations:
        return ""
    tuned = _chosen(evaluations)["step"]
    name = (state["watch"] or {}).get("classical_name")
    sources: dict[int | str, str] = {0: "start", **({tuned: f"tuned (step {tuned})"} if tuned else {})}
    sources |= {CLASSICAL: f"best classical ({name}, {total} evaluations)", REFERENCE: "reference (50 evaluations)"}
    rows, side = [], 0
    while previews := _previews(folder, len(rows), sources):
        first = next(iter(previews.values()))
        side = max(side, *first.size)
        pictures = {label: preview.path.read_bytes() for label, preview in previews.items()}
        rows.append(StripRow(first.prompt or f"image {len(rows)}", f"seed {first.seed}", pictures))
    if not rows:
        return ""
    shared = [label for label in rows[0].pictures if all(label in row.pictures for row in rows)]
    rows = [row._replace(pictures={label: row.pictures[label] for label in shared}) for row in rows]
    return (
        "<h2>Before and after</h2><p class=muted>The same prompts and the same noise; only the solver differs.</p>"
        + strip(rows, side=side)
    )


def _previews(folder: RunFolder, number: int, sources: Mapping[int | str, str]) -> dict[str, Preview]:
    """The images of a prompt by what drew them; empty where the start's or the tuned one's is missing or damaged."""
    found = {key: _preview(folder.samples / preview_name(key, number)) for key in sources}
    if any(found[key] is None for key in sources if isinstance(key, int)):
        return {}
    return {sources[key]: preview for key, preview in found.items() if preview is not None}


def _preview(path: Path) -> Preview | None:
    """A held-out image; None where there is none, or it is damaged."""
    try:
        with opened_picture(path) as image:
            return Preview(path, image.text["prompt"], image.text["seed"], image.size)
    except InputError:
        return None


def _table(rows: Sequence[Row], mean: Numbers, start: Numbers, notes: Sequence[str]) -> str:
    parts = ["<h2>The solver</h2>"]
    parts += [f"<p class=muted>{escape(note)}</p>" for note in notes]
    if GRID in start:
        now = ("now", mean.get(GRID, start[GRID]), table_from_plain(mean))
        caption = "At which noise levels the solver asks the network, with what weight, and what it combines."
        parts.append(figure(solver_figure(now, beside=("start", start[GRID], table_from_plain(start))), caption))
    moved = {
        name: [_by_interval(row["table"][name]) for row in rows] for name in mean if rows and name in rows[0]["table"]
    }
    moved = {name: tables for name, tables in moved.items() if any(table != tables[0] for table in tables)}
    if moved:
        caption = "The policy's mean over the steps; what does not move is left out."
        parts.append(figure(movement_figure([row["step"] for row in rows], moved), caption))
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

    def curve(name: str, label: str) -> Curve:
        return Curve(label, numbers, [row[name] for row in steps])

    figures = [
        figure(curves_figure([curve(name, name)], name.replace("_", " "), size=(3.0, 2.0)), METRICS[name])
        for name in DIAGNOSTICS
        if name in steps[0]
    ]
    spread = [curve(f"reward_{label}_variance", label) for label in ("within", "between")]
    caption = "Variance of the reward inside the groups and between their means."
    figures.append(figure(curves_figure(spread, "reward variance", size=(3.0, 2.0)), caption))
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


if __name__ == "__main__":
    main()
