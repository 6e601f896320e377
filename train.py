"""Distil a few-step solver from a teacher solver, for a frozen model."""

from __future__ import annotations

if __name__ == "__main__":
    from interrupts import end_at_once_on_signals

    end_at_once_on_signals()

import json
import re
import shlex
from dataclasses import asdict, fields, replace
from pathlib import Path

import click
import torch
from click.core import ParameterSource

from errors import InputError, shows_input_errors
from interrupts import goes_on_by
from models import Denoiser, load_denoiser
from models.devices import resolve_device
from models.options import CHANGING, ModelOptions
from models.prompts import read_prompts
from models.registry import REGISTERED, is_unconditional, usual_prompts
from schedules import SCHEDULES
from solvers import SAMPLERS
from training.distillation import SEARCHED_POSITIONS
from training.distillation_options import DISTILLABLE, OPTIONS, Options, load_options, settled
from training.distillation_run import (
    START,
    claim_folder,
    distil,
    is_finished,
    next_folder,
    prepare,
    untrained_table,
)
from training.runs.command_line import EitherDash, Finite, Parts, require_one_process, takes_model_options
from training.snapshot import find_run, save_snapshot
from training.solver import MODEL_OF_DATASET, USUAL_RHO
from training.starts import needs_grid

EXAMPLES = """
\b
Examples:
  python train.py --dataset_name shapes --num_steps 3 --num_points 2
  python train.py --dataset_name shapes --num_steps 7 --num_points 0 --train grid,history
  python train.py --dataset_name shapes --num_steps 4 --init-only
  python train.py --dataset_name shapes --num_steps 7 --num_points 0 --init-only --start dpmpp:2
  python train.py --resume 3
"""


@click.command(epilog=EXAMPLES, cls=EitherDash, context_settings={"show_default": True})
@click.option("--dataset_name", help="The model's world: shapes, ms_coco (Stable Diffusion 1.5), or a name of yours.")
@click.option(
    "--model_path", "--model", help="Registered name, pipeline folder or file. [what dataset_name stands for]"
)
@click.option(
    "--prompt-file",
    help="A .txt (one a line) or .csv (column `text`); none of an unconditional model. [the model's usual ones]",
)
@click.option("--num_steps", type=click.IntRange(2, 1000), default=4, help="Grid points.")
@click.option(
    "--num_points",
    type=click.IntRange(0, SEARCHED_POSITIONS),
    default=2,
    help="Points an interval, K; 0 for a multistep solver, one evaluation an interval.",
)
@click.option("--sampler_stu", type=click.Choice(["epd"]), default="epd", help="The student.")
@click.option(
    "--sampler_tea",
    type=click.Choice([name for name in SAMPLERS if name != "epd"]),
    default="dpm2",
    help="The teacher.",
)
@click.option("--M", "M", type=click.IntRange(1, 1000), default=9, help="Extra steps of the teacher in each interval.")
@click.option("--afs", type=bool, default=False, help="The student's first direction needs no evaluation.")
@click.option(
    "--scale_dir",
    type=Finite(0, 1, max_open=True),
    default=0.0,
    help="Factors on directions may be learned within 1 +- this.",
)
@click.option("--scale_time", type=Finite(0, 1, max_open=True), default=0.0, help="Those on noise levels likewise.")
@click.option("--guidance_rate", "--guidance", type=Finite(0), help="Guidance scale; 1 for none. [the model's own]")
@click.option("--schedule_type", type=click.Choice(list(SCHEDULES)), default="discrete")
@click.option("--schedule_rho", type=Finite(0, min_open=True), help="Exponent of the grid. [7 polynomial, otherwise 1]")
@click.option(
    "--sigma_max",
    type=Finite(0, min_open=True),
    help="Noise level to begin at, with --init-only. [the model's largest]",
)
@click.option(
    "--trajectories",
    type=click.IntRange(2, 10**9),
    default=128,
    help="The teacher is followed on so many; a quarter is held out.",
)
@click.option("--batch", type=click.IntRange(1, 10**9), default=16, help="Trajectories an update.")
@click.option("--batch-gpu", type=click.IntRange(1, 10**9), default=16, help="Trajectories at once.")
@click.option("--total_kimg", type=Finite(0), default=1.6, help="Thousands of trajectories in all.")
@click.option("--lr", type=Finite(0, 1e30, min_open=True), default=0.1, help="Adam's step size.")
@click.option("--coslr/--no-coslr", default=True, help="Let it decay to 0 along a cosine.")
@click.option(
    "--target",
    type=click.Choice(["latent", "image"]),
    default="latent",
    help="Compare the final states of student and teacher as latents, or decoded.",
)
@click.option("--recompute", is_flag=True, help="Less memory for a third more time: for large models.")
@click.option(
    "--train",
    type=Parts(),
    help=f"What is learned, of {', '.join(DISTILLABLE)}. [positions,weights; history,grid without points]",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0)
@click.option("--init-only", is_flag=True, help="Write a table to start from; train nothing.")
@click.option(
    "--start",
    help="What learning starts from: search (found from the teacher; not with --init-only), near_euler, or a classical "
    "sampler as a table: ddim, ipndm, dpmpp:2 (no points), dpm2 (one point); ipndm with points is EPD's plug-in. "
    "[search where it can; with --init-only near_euler, without points ddim]",
)
@click.option("--outdir", type=click.Path(file_okay=False, path_type=Path), default=Path("exps"))
@click.option("--resume", help="Go on with an interrupted run: its folder or its number in --outdir.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("-n", "--dry-run", is_flag=True, help="Print the options and the cost, do nothing.")
@click.pass_context
@shows_input_errors
@takes_model_options
def main(
    context: click.Context,
    outdir: Path,
    resume: str | None,
    device: str,
    dry_run: bool,
    model_options: ModelOptions,
    **told: object,
) -> None:
    """Distil a solver into a new folder of --outdir: snapshots (.pkl, .json), training_options.json, stats.jsonl.

    Interrupt it at will: --resume goes on and ends in the same table.
    """
    require_one_process()
    told |= {name: getattr(model_options, name) for name in CHANGING}
    folder = None
    if resume is None:
        options = _options(told)
    else:
        folder = find_run(resume, outdir)
        loaded = load_options(folder)
        _refuse_out_of_range(context, loaded, folder)
        options = _options(asdict(loaded))
        _refuse_contradictions(context, options, told, folder)
        if is_finished(folder, options):
            raise InputError(f"{folder}: this run is finished; nothing to resume")
    click.echo(json.dumps(asdict(options), indent=2))
    click.echo(
        f"{folder or next_folder(outdir, options)}: {options.nfe} evaluations in sequence an image, before guidance"
    )
    if options.init_only:
        if not dry_run:
            _require_known(options)
            grid_counts = needs_grid(options.start, options.num_points)
            denoiser = _denoiser(options, device, model_options) if grid_counts else None
            table = untrained_table(options, denoiser)
            folder = folder or claim_folder(outdir, options)
            click.echo(f"wrote {save_snapshot(folder / START, table, options.metadata(denoiser))}")
        return
    prompts = [""] if options.prompt_file is None else read_prompts(options.prompt_file)
    costs = options.evaluations()
    parts = ", ".join(f"{name} {count:,}" for name, count in costs.items())
    click.echo(f"network evaluations, before guidance and gradients: {sum(costs.values()):,} ({parts})")
    if dry_run:
        return
    denoiser = _denoiser(options, device, model_options)
    lesson = prepare(options, denoiser, prompts)  # before there is a folder: what cannot be taught leaves none behind
    folder = folder or claim_folder(outdir, options)
    click.echo(f"run: {folder}")
    with goes_on_by(f"python train.py --resume {shlex.quote(str(folder))}"):
        click.echo(f"wrote {distil(folder, options, denoiser, lesson)}")


def _options(told: dict[str, object]) -> Options:
    """The run's options: `told` names every field of Options, and what was left open follows from the others."""
    name, rho = told["dataset_name"], told["schedule_rho"]
    if name is None:
        raise InputError("--dataset_name is missing: shapes, ms_coco, or a name of yours with --model_path")
    if not re.fullmatch(r"\w+", name):
        raise InputError(f"--dataset_name {name!r}: use letters, digits and _ only, it becomes part of a folder's name")
    model = MODEL_OF_DATASET.get(name, name)
    prompt_file = told["prompt_file"] or usual_prompts(told["model_path"], model)
    if prompt_file is None and not told["init_only"] and not is_unconditional(told["model_path"] or model):
        raise InputError(f"--prompt-file is missing: {name} has no prompts of its own")
    rho = USUAL_RHO.get(told["schedule_type"], 1.0) if rho is None else rho
    return Options(**{**told, **settled(told), "schedule_rho": rho, "prompt_file": prompt_file})


def _require_known(options: Options) -> None:
    """Raise `InputError` where a start, for which no model is loaded, would be of none."""
    if options.model_path is None and not (options.model in REGISTERED or Path(options.model).exists()):
        known = ", ".join([*MODEL_OF_DATASET, *REGISTERED])
        raise InputError(
            f"--dataset_name {options.dataset_name!r} stands for no model; known are {known}, others need --model_path"
        )


def _denoiser(options: Options, device: str, asked: ModelOptions) -> Denoiser:
    how = replace(options.model_options, text_on_cpu=asked.text_on_cpu)
    return load_denoiser(options.model, device=resolve_device(device), dtype=torch.float32, options=how)


def _refuse_out_of_range(context: click.Context, options: Options, folder: Path) -> None:
    """What a run's file says must be what could have been typed."""
    for option in context.command.params:
        value = getattr(options, option.name, None)
        if value is not None:
            try:
                option.type.convert(value, option, context)
            except click.BadParameter as error:
                raise InputError(f"{folder / OPTIONS}: {option.name}: {error.message}") from None


def _refuse_contradictions(context: click.Context, options: Options, told: dict[str, object], folder: Path) -> None:
    """A resumed run keeps its options; what is given beside --resume must be the same."""
    for field in fields(Options):
        given = context.get_parameter_source(field.name) is ParameterSource.COMMANDLINE
        if given and told[field.name] != getattr(options, field.name):
            raise InputError(
                f"{field.name}={told[field.name]!r} contradicts {folder}, which was started with "
                f"{getattr(options, field.name)!r}: leave it out, or start another run"
            )


if __name__ == "__main__":
    main()
