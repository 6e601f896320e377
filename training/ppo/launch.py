"""The command that runs the RL job: `python -m training.ppo.launch --config training/ppo/cfgs/shapes.yaml`."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from lightning.fabric import Fabric

from errors import InputError, shows_input_errors
from files import only_writer, write_atomically
from interrupts import Interrupted
from training.ppo.algorithm import learning_rate
from training.ppo.assembly import (
    Start,
    build,
    cost_lines,
    from_plain,
    make_fabric,
    path_faults,
    policy_of,
    prepare,
    refuse,
    require_processes,
    start_from_snapshot,
)
from training.ppo.checkpoint import load_checkpoint
from training.ppo.config import FIXED, FIXED_FILES, KNOBS, Config, build_config, load_config
from training.ppo.report import write_report
from training.ppo.training_run import INTERRUPTED, TrainingRun
from training.runs.checkpoint import fitting, newest_checkpoint
from training.runs.command_line import RESUME, SeveralPairs, takes_overrides, with_options
from training.runs.configuration import LoadedConfig, refuse_changes, to_plain, to_yaml, value_of
from training.runs.run_folder import RunFolder, read_metrics, seconds_by_phase

DEFAULT_CONFIG = Path(__file__).resolve().parent / "cfgs" / "sd15_base.yaml"


@dataclass(frozen=True)
class Launch:
    """What to train: a new run (`folder` and `state` are None) or one to go on with."""

    start: Start
    folder: RunFolder | None
    state: dict[str, Any] | None


@click.command(cls=SeveralPairs, context_settings={"max_content_width": 110})
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help=f"[default: training/ppo/cfgs/{DEFAULT_CONFIG.name}]",
)
@takes_overrides("file and snapshot")
@click.option("--run-name", help="Last part of the run folder's name (run.run_name).")
@RESUME
@click.option("--dry-run", is_flag=True, help="Print the merged configuration, check every path, count; train nothing.")
@click.option("--device", help="auto, cpu, cuda, cuda:N or mps (run.device).")
@shows_input_errors
def main(
    config_path: Path | None,
    overrides: tuple[str, ...],
    run_name: str | None,
    resume: Path | None,
    dry_run: bool,
    device: str | None,
) -> None:
    """Tune a solver by rewards: by reinforcement learning, or another search (search.method).

    \b
    python -m training.ppo.launch --config training/ppo/cfgs/shapes.yaml --dry-run
    python -m training.ppo.launch --config training/ppo/cfgs/shapes.yaml --override ppo.steps=20 run.seed=1
    python -m training.ppo.launch --resume exps/<timestamp>-shapes

    Every key that a configuration and --override take, with its unit and default: training/ppo/config.py.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    pairs = with_options(overrides, {"run.run_name": run_name, "run.device": device})
    if resume is None:
        loaded = load_config(config_path or DEFAULT_CONFIG, pairs)
        require_processes(loaded.config)
        if dry_run:
            preview(loaded)
        job = Launch(prepare(loaded), None, None)
    elif config_path is not None or run_name is not None:
        raise InputError("--resume goes on with a run's own configuration and name: change it by --override only")
    else:
        job = resumed_job(resume, pairs)
    if dry_run:
        if resume is not None:
            click.echo(to_yaml(job.start.config))
            describe(job)
        click.echo("dry run: every path is there; nothing was trained")
        return
    train(job)


def preview(loaded: LoadedConfig) -> None:
    """Print the merged configuration and what a run would cost, as far as the predictor can be read: needs no asset."""
    try:
        start = start_from_snapshot(loaded)
    except InputError:  # `prepare` says so, beside all else that is missing
        click.echo(to_yaml(loaded.config))
        return
    click.echo(to_yaml(start.config))
    describe(Launch(start, None, None))


def resumed_job(source: Path, overrides: Sequence[str]) -> Launch:
    """A run to go on with: its folder's configuration, the overrides, and a checkpoint.

    Raises:
        InputError: there is no such run, its checkpoint is corrupt (the one before is offered), it is complete, or a
            file that it needs is gone, or an override changes what the run is made of (`FIXED`).
    """
    folder = RunFolder.open(source)
    checkpoint = source if source.suffix == ".pt" else newest_checkpoint(folder.checkpoints)
    state = load_checkpoint(checkpoint)
    with fitting(checkpoint):
        before = build_config(state["config"], str(folder.path)).config
    config = load_config(folder.config, overrides, before=to_plain(before)).config  # it may have been cut off
    require_processes(config)
    refuse_changes(before, config, FIXED, FIXED_FILES, folder.path)
    with fitting(checkpoint):
        start = from_plain(state["start"], config, checkpoint)
    shape = (start.table.num_steps, start.table.num_points)
    if (config.model.num_steps, config.model.num_points) != shape:
        raise InputError(
            f"model.num_steps={config.model.num_steps}, model.num_points={config.model.num_points}: "
            f"the run's table has {shape[0]} and {shape[1]}, which cannot be changed"
        )
    with fitting(checkpoint):
        policy_of(start, state, checkpoint)
    if state["step"] >= config.ppo.steps:
        raise InputError(
            f"{folder.path}: complete, {state['step']} of {config.ppo.steps} steps; for more of them: "
            f"--override ppo.steps={2 * state['step']}"
        )
    refuse(list(path_faults(config)), config)
    return Launch(start, folder, state)


def describe(job: Launch) -> None:
    """Print what a run costs, what it starts from, and what was changed on the way to it."""
    start = job.start
    for line in cost_lines(start):
        click.echo(line)
    click.echo(f"start: {start.snapshot.where}")
    for line in (*start.notes, *changes(job)):
        click.echo(f"note: {line}")


def changes(job: Launch) -> list[str]:
    """What differs from the configuration that the checkpoint was made with, one line a key."""
    if job.state is None:
        return []
    step, now = job.state["step"], job.start.config
    before = build_config(job.state["config"], "checkpoint").config
    lines = [f"goes on after step {step}"]
    for key in KNOBS:
        old, new = value_of(before, key), value_of(now, key)
        if old != new:
            lines.append(f"{key}={new!r}; it was {old!r} up to step {step}")
    planned, coming = _learning_rate(step, before), _learning_rate(step, now)
    if step and planned != coming:  # more steps are another schedule
        last = _learning_rate(step - 1, before)
        lines.append(f"the learning rate of step {step + 1} is {coming:.2g}; that of step {step} was {last:.2g}")
    return lines


def _learning_rate(step: int, config: Config) -> float:
    """Of the configuration's search; 0 where it has none."""
    ppo, search = config.ppo, config.search
    rate, schedule = {
        "ppo": (ppo.learning_rate, ppo.learning_rate_schedule),
        "cma_es": (0.0, "constant"),
        "reward_gradient": (search.learning_rate, "cosine"),
    }[search.method]
    return learning_rate(step, ppo.steps, rate, schedule)


def train(job: Launch) -> None:
    """Run the job.

    Raises:
        InputError: something that it needs cannot be used, or training diverged.
        Interrupted: a signal ended it before its last step; there is a checkpoint.
    """
    config = job.start.config
    fabric = make_fabric(config)
    fabric.launch()
    if fabric.is_global_zero:
        describe(job)
    assembled = build(job.start, fabric)  # before there is a folder: what cannot be loaded leaves none behind
    with _held_folder(job, config, fabric) as folder:
        run = TrainingRun(assembled, folder, fabric)
        if job.state is not None:
            run.load(job.state)
        ending = run.run()
        if fabric.is_global_zero:
            _conclude(run, folder, ending)
    if ending == INTERRUPTED:
        raise Interrupted(run.interrupted_by)


def _conclude(run: TrainingRun, folder: RunFolder, ending: str) -> None:
    """Write the report; say how the run ended, where its time went, and what can be done next."""
    steps, typed = run.config.ppo.steps, shlex.quote(str(folder.path))
    click.echo(f"{ending} after step {run.step} of {steps}: {folder.path}")
    spent = seconds_by_phase(read_metrics(folder.metrics))
    whole = sum(spent.values())
    click.echo("time: " + ", ".join(f"{phase} {seconds / whole:.1%}" for phase, seconds in spent.items()))
    try:
        click.echo(f"report: {write_report(folder)}")
    except InputError as error:  # the run is whole without it
        click.echo(f"no report: {error}; to write it later: python -m training.ppo.report {typed}")
    if run.step < steps:
        click.echo(f"go on: python -m training.ppo.launch --resume {typed}")
    click.echo(f"export: python -m training.ppo.export_epd_predictor {typed}")


@contextmanager
def _held_folder(job: Launch, config: Config, fabric: Fabric) -> Iterator[RunFolder]:
    """The run's folder, with the configuration in it; the first process makes it, and holds it against other runs."""
    if not fabric.is_global_zero:
        yield RunFolder(Path(fabric.broadcast("")))
        return
    folder = job.folder or RunFolder.create(config.run.output_root, config.run.run_name, to_yaml(config))
    with only_writer(folder.path):
        if job.folder is not None:
            write_atomically(folder.config, to_yaml(config).encode())
        click.echo(f"run: {folder.path}")
        fabric.broadcast(str(folder.path))
        yield folder


if __name__ == "__main__":
    main()
