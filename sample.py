"""Draw images with an EPD predictor or a classical solver."""

from __future__ import annotations

if __name__ == "__main__":
    from interrupts import end_at_once_on_signals

    end_at_once_on_signals()

from dataclasses import replace
from pathlib import Path

import click
import torch

from errors import InputError, shows_input_errors
from files import only_writer
from models import load_denoiser
from models.devices import DTYPES, check_compiler, resolve_device
from models.options import ModelOptions
from models.prompts import parse_seeds, read_prompts
from models.registry import check_assets, traits_of
from training.image_folder import LOG_NAME, SHEET_NAME, ImageRequest, draw, unused_folder
from training.runs.command_line import EitherDash, Finite, require_one_process, takes_model_options
from training.solver import (
    CLASSICAL,
    Schedule,
    Solver,
    classical_solver,
    load_solver,
    network_dtype,
    parse_classical,
    parse_schedule,
)

USUAL_SCHEDULE = "discrete"
LARGEST_SHEET = 400  # images

EXAMPLES = """
\b
Examples:
  python sample.py --model_path shapes --solver dpmpp:2 --num-steps 11 --prompt "a large red star on a white background"
  python sample.py --predictor_path 2 --prompt-file src/prompts/shapes_heldout.csv --seeds 0-3,7 --outdir outputs/epd
"""


@click.command(epilog=EXAMPLES, cls=EitherDash, context_settings={"show_default": True})
@click.option(
    "--predictor_path",
    help="EPD table: a .pkl or .json, a run or export folder, an experiment's number, or OWNER/NAME on the Hub.",
)
@click.option("--solver", help=f"epd (needs a predictor), {', '.join(CLASSICAL)}; an order after a colon: dpmpp:2.")
@click.option("--num-steps", type=click.IntRange(min=2), help="Grid points of a classical solver (intervals + 1).")
@click.option(
    "--schedule",
    help=f"Grid, NAME, NAME:RHO, or either with @LEVEL for the noise level that it begins at. [classical solvers: "
    f"{USUAL_SCHEDULE}; epd: the predictor's]",
)
@click.option("--afs", is_flag=True, help="Classical solvers: estimate the first evaluation instead of making it.")
@click.option("--prompt", "prompts", multiple=True, help="What to draw; may be repeated.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A .txt (one a line) or .csv (column `text`).")
@click.option("--seeds", default="0-3", help="Numbers and ranges; each is used with each prompt.")
@click.option("--pair", is_flag=True, help="Prompt i with seed i only; as many seeds as prompts.")
@click.option(
    "--guidance",
    type=Finite(min=0),
    help="Guidance scale, a choice: what is best differs by model and by solver. [the predictor's, or the model's own]",
)
@click.option(
    "--model_path", "--model", help="Registered name, pipeline folder or single file. [what the predictor was made for]"
)
@click.option("--batch", type=click.IntRange(min=1), default=16, help="Images at once.")
@click.option(
    "--outdir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("outputs/samples"),
    help="A folder for these images alone: where it holds some already, FOLDER-2 is taken, or the next that is free.",
)
@click.option("--grid", is_flag=True, help=f"Also write {SHEET_NAME}: a row for each prompt, a column for each seed.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the network. [float32; on CUDA half precision]")
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Have the network compiled first, on CUDA few images at once as a CUDA graph: minutes, repaid by many images.",
)
@shows_input_errors
@takes_model_options
def main(
    predictor_path: str | None,
    solver: str | None,
    num_steps: int | None,
    schedule: str | None,
    afs: bool,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    seeds: str,
    pair: bool,
    guidance: float | None,
    model_path: str | None,
    batch: int,
    outdir: Path,
    grid: bool,
    device: str,
    dtype: str | None,
    compiled: bool,
    model_options: ModelOptions,
) -> None:
    """Draw one PNG for each prompt and seed, and a line for each in images.jsonl.

    A predictor fixes its number of grid points and AFS. Its schedule, guidance and model are used unless the options
    name others, which is said in a line. An image depends on its prompt, its seed and the solver, never on --batch.
    """
    require_one_process()
    wanted = [*prompts, *(read_prompts(prompt_file) if prompt_file else [])]
    numbers = parse_seeds(seeds)
    chosen = parse_schedule(schedule) if schedule else None
    if predictor_path is None:
        asked = _classical(solver, num_steps, chosen, afs=afs)
        asked = asked if guidance is None else asked.guided(guidance)
    else:
        asked = _replayed(predictor_path, solver, num_steps, chosen, guidance, afs=afs)
    spec = _model(model_path, asked)
    if not wanted:
        if traits_of(spec).takes_prompts:
            raise InputError("nothing to draw: give --prompt or --prompt-file")
        wanted = [""]
    if pair and len(numbers) != len(wanted):
        raise InputError(f"--pair: {len(wanted)} prompts and {len(numbers)} seeds; give --seeds 0-{len(wanted) - 1}")
    count = len(wanted) * (1 if pair else len(numbers))
    if grid and count > LARGEST_SHEET:
        raise InputError(f"--grid shows at most {LARGEST_SHEET} images, not {count}; leave it out")
    options, on = _options(model_options, asked, spec), resolve_device(device)
    if compiled:
        check_compiler(on)
    described = check_assets(spec, options)  # without weights: what does not fit is said before they are read
    described.validate_prompts(wanted)
    settled = asked.on(described)
    number_type = network_dtype(dtype, spec, on, [asked], click.echo)
    denoiser = load_denoiser(spec, device=on, dtype=number_type, options=options)
    if compiled:
        at_once = min(batch, count)
        denoiser.compile_network({at_once * settled.rows_at_start, at_once * settled.rows_at_once})
    request = ImageRequest(
        prompts=wanted,
        seeds=numbers,
        solver=settled,
        model=spec,
        model_options=options,
        batch_size=batch,
        dtype=torch.promote_types(number_type, torch.float32),
        paired=pair,
    )
    scale, cost = settled.guidance_scale, settled.evaluations
    click.echo(
        f"{settled.label} on {spec}: {settled.num_steps} grid points ({settled.grid_name}), guidance "
        f"{'its own' if scale is None else f'{scale:g}'}, an image takes {cost.parallel} evaluations in sequence, "
        f"{cost.total} in all, {cost.rows} network rows"
    )
    outdir = unused_folder(outdir)
    click.get_current_context().with_resource(only_writer(outdir))
    records = draw(request, denoiser, outdir, sheet=grid, note=click.echo)
    number = f"{len(records)} image{'s' if len(records) > 1 else ''}"
    click.echo(f"wrote {number}{f', {SHEET_NAME}' if grid else ''} and {LOG_NAME} to {outdir}")


def _classical(name: str | None, num_steps: int | None, schedule: Schedule | None, *, afs: bool) -> Solver:
    if name in (None, "epd"):
        raise InputError(
            f"--predictor_path is missing; or choose a classical --solver: {', '.join(CLASSICAL)}; "
            "python sample.py --help shows commands that run"
        )
    parse_classical(name)
    if num_steps is None:
        raise InputError(f"--num-steps is missing: the grid points of {name}, one more than its intervals")
    return classical_solver(name, num_steps, schedule or parse_schedule(USUAL_SCHEDULE), afs=afs)


def _replayed(
    path: str,
    name: str | None,
    num_steps: int | None,
    schedule: Schedule | None,
    guidance: float | None,
    *,
    afs: bool,
) -> Solver:
    """The solver of a file; what it fixes is checked against the options, and what they change is said."""
    if name not in (None, "epd"):
        raise InputError(f"--solver {name} takes no predictor: leave out --predictor_path or --solver")
    solver = load_solver(path, guidance=guidance)
    if num_steps not in (None, solver.num_steps):
        raise InputError(
            f"--num-steps {num_steps} contradicts {solver.where}, whose table has {solver.num_steps} grid points: "
            "leave --num-steps out"
        )
    if afs and not solver.afs:
        raise InputError(f"--afs contradicts {solver.where}, whose table was made without it: leave --afs out")
    usual = solver.origin.metadata.get("guidance_rate")
    if guidance is not None and usual not in (None, guidance):
        click.echo(f"--guidance {guidance:g} overrides the predictor's guidance, {usual:g}")
    if schedule not in (None, solver.schedule):
        click.echo(f"--schedule {schedule} overrides the predictor's schedule, {solver.grid_name}")
    return solver if schedule is None else solver.on_schedule(schedule)


def _model(path: str | None, solver: Solver) -> str:
    if path is not None and solver.origin is not None and path != solver.model:
        click.echo(f"--model_path {path} overrides the predictor's model, {solver.model}")
    if path is None and solver.origin is None:
        raise InputError("--model_path is missing: a registered name (shapes, sd15), a folder or a file")
    if path is None and solver.model is None:
        raise InputError(f"{solver.where}: does not say its dataset_name; name the model with --model_path")
    return path or solver.model


def _options(asked: ModelOptions, solver: Solver, spec: str) -> ModelOptions:
    """How the model is to be loaded: as the options say, else as the solver's was."""
    if not asked.changes():
        own = solver.options_for(spec)
        if own != solver.model_options:
            click.echo(f"{spec} draws images of its own size; the predictor was made at {solver.model_options}")
        return replace(own, text_on_cpu=asked.text_on_cpu)
    if solver.origin is not None and asked.changes() != solver.model_options.changes():
        click.echo(f"{asked} overrides how the predictor's model was loaded, {solver.model_options}")
    return asked


if __name__ == "__main__":
    main()
