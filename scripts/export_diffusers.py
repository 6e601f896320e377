"""Write a solver as a folder that diffusers plays, anywhere and from the Hub, without this repository."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from errors import InputError, shows_input_errors
from models.registry import load_denoiser, pipeline_of
from training.diffusers_export import write_diffusers
from training.solver import load_solver

EXAMPLES = """
\b
Examples:
  python -m scripts.export_diffusers 4 --outdir outputs/solver
  python -m scripts.export_diffusers exps/<timestamp>-sd15 --outdir outputs/solver --base OWNER/NAME
"""


@click.command(epilog=EXAMPLES)
@click.argument("solver")
@click.option("--outdir", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder to write.")
@click.option("--model_path", help="Registered name, pipeline folder or single file. [what the solver was made for]")
@click.option("--base", help="What diffusers loads that model by: a folder, or OWNER/NAME. [that of --model_path]")
@shows_input_errors
def main(solver: str, outdir: Path, model_path: str | None, base: str | None) -> None:
    """Write SOLVER (a file, a folder, or an experiment's number) with its noise levels settled for its model.

    The folder's README.md shows how it is used.
    """
    read = load_solver(solver)
    spec = model_path or read.model
    if spec is None:
        raise InputError(f"{read.where}: does not say its dataset_name; name the model with --model_path")
    named = base or pipeline_of(spec)
    denoiser = load_denoiser(spec, device=torch.device("cpu"), dtype=torch.float32, options=read.options_for(spec))
    for path in write_diffusers(outdir, read, denoiser, named):
        click.echo(path)


if __name__ == "__main__":
    main()
