"""Draw images with an EPD predictor or a classical solver."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from errors import InputError, shows_input_errors
from models import Denoiser, load_denoiser
from models.devices import DTYPES, resolve_device, resolve_dtype
from models.prompts import parse_seeds, read_prompts
from training.command_line import Finite
from training.image_folder import LOG_NAME, SHEET_NAME, Job, draw
from training.sampling import (
    CLASSICAL,
    Grid,
    Plan,
    Predictor,
    classical_plan,
    load_predictor,
    parse_classical,
    parse_grid,
    predictor_plan,
)

USUAL_GRID = "discrete"
LARGEST_SHEET = 400  # images

EXAMPLES = """
\b
Examples:
  python sample.py --model_path shapes --solver dpmpp:2 --num-steps 11 --prompt "a large red star on a white background"
  python sample.py --predictor_path 2 --prompt-file src/prompts/shapes_heldout.csv --seeds 0-3,7 --outdir outputs/epd
"""


@click.command(epilog=EXAMPLES)
@click.option("--predictor_path", help="EPD table: a .pkl or .json, a run or export folder, or an experiment's number.")
@click.option("--solver", help=f"epd (needs a predictor), {', '.join(CLASSICAL)}; an order after a colon: dpmpp:2.")
@click.option("--num-steps", type=click.IntRange(min=2), help="Grid points of a classical solver (intervals + 1).")
@click.option("--schedule", help=f"Grid, NAME or NAME:RHO. [classical solvers: {USUAL_GRID}; epd: the predictor's]")
@click.option("--afs", is_flag=True, help="Classical solvers: estimate the first evaluation instead of making it.")
@click.option("--prompt", "prompts", multiple=True, help="What to draw; may be repeated.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A .txt (one a line) or .csv (column `text`).")
@click.option("--seeds", default="0-3", show_default=True, help="Numbers and ranges; each is used with each prompt.")
@click.option(
    "--guidance",
    type=Finite(min=0),
    help="Guidance scale, a choice: what is best differs by model and by solver. [the predictor's, or the model's own]",
)
@click.option("--model_path", help="Registered name, pipeline folder or single file. [what the predictor was made for]")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Images at once.")
@click.option(
    "--outdir", type=click.Path(file_okay=False, path_type=Path), default=Path("outputs/samples"), show_default=True
)
@click.option("--grid", is_flag=True, help=f"Also write {SHEET_NAME}: a row for each prompt, a column for each seed.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Of the network.")
@shows_input_errors
def main(
    predictor_path: str | None,
    solver: str | None,
    num_steps: int | None,
    schedule: str | None,
    afs: bool,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    seeds: str,
    guidance: float | None,
    model_path: str | None,
    batch: int,
    outdir: Path,
    grid: bool,
    device: str,
    dtype: str,
) -> None:
    """Draw one PNG for each prompt and seed, and a line for each in images.jsonl.

    A predictor fixes its number of grid points and AFS. Its schedule, guidance and model are used unless the options
    name others, which is said in a line. An image depends on its prompt, its seed and the solver, never on --batch.
    """
    wanted = [*prompts, *(read_prompts(prompt_file) if prompt_file else [])]
    numbers = parse_seeds(seeds)
    if not wanted:
        raise InputError("nothing to draw: give --prompt or --prompt-file")
    if grid and len(wanted) * len(numbers) > LARGEST_SHEET:
        raise InputError(f"--grid shows at most {LARGEST_SHEET} images, not {len(wanted) * len(numbers)}; leave it out")
    chosen_grid = parse_grid(schedule) if schedule else None
    predictor = _predictor(predictor_path, solver, num_steps, afs=afs)
    spec = _model(model_path, predictor)
    number_type = resolve_dtype(dtype)
    denoiser = load_denoiser(spec, device=resolve_device(device), dtype=number_type)
    denoiser.validate_prompts(wanted)
    if predictor is not None:
        plan = _replayed(predictor, chosen_grid, denoiser)
    else:
        plan = classical_plan(solver, num_steps, chosen_grid or parse_grid(USUAL_GRID), denoiser, afs=afs)
    job = Job(
        prompts=wanted,
        seeds=numbers,
        plan=plan,
        model=spec,
        predictor=predictor,
        guidance_scale=_guidance(guidance, predictor, denoiser),
        batch_size=batch,
        dtype=torch.promote_types(number_type, torch.float32),
    )
    doubled = "" if job.guidance_scale == 1 else "; guidance doubles both"
    click.echo(
        f"{plan.label} on {spec}: {len(plan.sigmas)} grid points ({plan.grid}), guidance {job.guidance_scale:g}, "
        f"an image takes {plan.evaluations.parallel} evaluations in sequence, {plan.evaluations.total} in all{doubled}"
    )
    records = draw(job, denoiser, outdir, sheet=grid, note=click.echo)
    click.echo(f"wrote {len(records)} images and {LOG_NAME}{f' and {SHEET_NAME}' if grid else ''} to {outdir}")


def _predictor(path: str | None, solver: str | None, num_steps: int | None, *, afs: bool) -> Predictor | None:
    """The predictor that was asked for, if any, with what it fixes checked against the options."""
    if path is None:
        if solver in (None, "epd"):
            raise InputError(f"--predictor_path is missing; or choose a classical --solver: {', '.join(CLASSICAL)}")
        parse_classical(solver)
        if num_steps is None:
            raise InputError(f"--num-steps is missing: how many grid points may {solver} use?")
        return None
    if solver not in (None, "epd"):
        raise InputError(f"--solver {solver} takes no predictor: leave out --predictor_path or --solver")
    predictor = load_predictor(path)
    if num_steps not in (None, predictor.table.num_steps):
        raise InputError(
            f"--num-steps {num_steps} contradicts {predictor.file}, whose table has {predictor.table.num_steps} grid "
            "points: leave --num-steps out"
        )
    if afs and not predictor.afs:
        raise InputError(f"--afs contradicts {predictor.file}, whose table was made without it: leave --afs out")
    return predictor


def _model(path: str | None, predictor: Predictor | None) -> str:
    if predictor is None:
        if path is None:
            raise InputError("--model_path is missing: a registered name (shapes, sd15), a folder or a file")
        return path
    if path is None:
        if predictor.model is None:
            raise InputError(f"{predictor.file}: does not say its dataset_name; name the model with --model_path")
        return predictor.model
    if path != predictor.model:
        click.echo(f"--model_path {path} overrides the predictor's model, {predictor.model}")
    return path


def _replayed(predictor: Predictor, grid: Grid | None, denoiser: Denoiser) -> Plan:
    if grid not in (None, predictor.grid):
        click.echo(f"--schedule {grid} overrides the predictor's schedule, {predictor.grid}")
    return predictor_plan(predictor, denoiser, grid)


def _guidance(wanted: float | None, predictor: Predictor | None, denoiser: Denoiser) -> float:
    usual = None if predictor is None else predictor.guidance_scale
    if wanted is not None and usual not in (None, wanted):
        click.echo(f"--guidance {wanted:g} overrides the predictor's guidance, {usual:g}")
    if wanted is not None:
        return wanted
    return denoiser.default_guidance_scale if usual is None else usual


if __name__ == "__main__":
    main()
