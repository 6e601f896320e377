"""Say and draw what a solver does: noise levels, points and weights, guidance and history, from its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
from torch import Tensor

from errors import InputError, shows_input_errors
from files import replacing
from schedules import FlowTime, get_schedule
from training.parameters import neutral_entries
from training.ppo.figures import solver_figure
from training.snapshot import private_parts
from training.solver import FLOW_MATCHING, Solver, load_solver

# Of Stable Diffusion 1.x, for files that do not say the range of their model.
USUAL_RANGE = (0.0292, 14.6146)
# Of Stable Diffusion 3, for files of flow matching that do not say theirs.
USUAL_FLOW = FlowTime(shift=3.0, time_min=0.002994)
RESOLUTION = 150  # dots an inch

EXAMPLES = """
\b
Examples:
  python -m scripts.show_solver 4
  python -m scripts.show_solver exps/<timestamp>-shapes --beside 1 --output solver.png
"""


def levels_of(solver: Solver) -> tuple[Tensor, str]:
    """Noise levels, float64 [num_steps], as far as the file alone tells them, and how they came about.

    Schedules of a model's own time are drawn as the variance-preserving time of its range, which they are near.
    """
    if solver.sigmas is not None:
        return solver.sigmas, "its own noise levels"
    if solver.schedule is None:
        raise InputError(f"{solver.where}: does not say its schedule_type")
    name, rho, _ = solver.schedule
    if name == FLOW_MATCHING:
        least, shift = solver.sigma_range[0] or USUAL_FLOW.time_min, solver.flow_shift
        clock = USUAL_FLOW if shift is None else FlowTime(shift, least)
        return solver.schedule.sigmas(solver.num_steps, clock), f"schedule {solver.schedule}, shift {clock.shift:.4g}"
    low, high = (told or usual for told, usual in zip(solver.sigma_range, USUAL_RANGE, strict=True))
    known = name if name in ("polynomial", "logsnr", "time_uniform") else "time_uniform"
    text = str(solver.schedule) if known == name else f"{solver.schedule}, drawn as {known}"
    try:
        return get_schedule(known, solver.num_steps, low, high, rho=rho), f"schedule {text}"
    except ValueError as error:
        raise InputError(f"{solver.where}: {error}") from None


def description(solver: Solver, sigmas: Tensor, schedule: str) -> str:
    """The solver in lines: what it is for, what it costs, and a row for each interval."""
    table, cost = solver.table, solver.evaluations
    guidance = "by evaluation" if solver.has_guidance_column else solver.guidance_scale or "the model's"
    lines = [
        solver.where,
        f"made for {solver.model or 'no model in particular'}, guidance {guidance}, {schedule}"
        f"{', AFS' if solver.afs else ''}",
        f"{table.num_steps - 1} intervals of {table.num_points} points: {cost.parallel} evaluations in sequence, "
        f"{cost.total} in all, {cost.rows} network rows",
    ]
    private = private_parts(table, solver.origin.metadata)
    if private:
        lines.append(f"no .pkl for the public EPD code, which has no place for {', '.join(private)}")
    lines.append("")
    for i in range(table.num_intervals):
        row = {name: entries[i] for name, entries in table.columns().items() if entries[i].numel()}
        columns = ", ".join(f"{name} {_numbers(entries)}" for name, entries in row.items())
        lines.append(f"{i + 1:3d}  sigma {sigmas[i]:8.4f} to {sigmas[i + 1]:8.4f}  {columns}")
    return "\n".join(lines)


def _numbers(row: Tensor) -> str:
    return "[" + " ".join(f"{value + 0.0:.3g}" for value in row.tolist()) + "]"


@click.command(epilog=EXAMPLES, context_settings={"show_default": True})
@click.argument("solver")
@click.option("--beside", help="Another solver, drawn hollow: the one before tuning.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="PNG to draw into. [text only]")
@click.option("--exps", type=click.Path(path_type=Path), default=Path("exps"), help="Experiments.")
@shows_input_errors
def main(solver: str, beside: str | None, output: Path | None, exps: Path) -> None:
    """Describe SOLVER (a file, a folder, or an experiment's number), and draw it. Needs no model."""
    drawn = []
    solvers = [load_solver(source, exps) for source in (solver, beside) if source is not None]
    for shown in solvers:
        sigmas, schedule = levels_of(shown)
        table, scale = shown.table, shown.guidance_scale
        if scale is not None and any(other.has_guidance_column for other in solvers):
            table = replace(table, guidance=neutral_entries("guidance", table, scale))
        drawn.append((shown.label, sigmas, table))
        click.echo(description(shown, sigmas, schedule) + "\n")
    if output is not None:
        with replacing(output) as temporary:
            solver_figure(drawn[0], drawn[1] if beside else None).savefig(temporary, format="png", dpi=RESOLUTION)
        click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
