"""What the three commands share: their options, and from these to a configuration or a run to go on with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from errors import InputError
from training.ddpm.config import SCHEMA, DDPMConfig
from training.ddpm.run import Resumed, open_run
from training.runs.command_line import require_one_process

Command = TypeVar("Command", bound=Callable[..., None])


def common_options(command: Command) -> Command:
    """Add --cfg, --override and --device."""
    command = click.option("--device", help="auto, cpu, cuda or cuda:N (device).")(command)
    command = click.option(
        "--override",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE ...",
        help="Has the last word over the file; takes several pairs, may be repeated.",
    )(command)
    return click.option("--cfg", type=click.Path(path_type=Path), help="Configuration, YAML; see configs/.")(command)


def training_options(command: Command) -> Command:
    """Add the common options, --resume and --overwrite."""
    command = click.option("--overwrite", is_flag=True, help="Replace an output that exists.")(command)
    command = click.option(
        "--resume",
        type=click.Path(path_type=Path),
        metavar="RUN",
        help="Go on with a run of this command, from its newest checkpoint, or from the checkpoint given.",
    )(command)
    return common_options(command)


def load_config(cfg: Path | None, overrides: tuple[str, ...], device: str | None) -> DDPMConfig:
    """The configuration that the options ask for.

    Raises:
        InputError: there is none, or it has faults.
    """
    _begin()
    if cfg is None:
        raise InputError("--cfg is missing: name a configuration, for example configs/smoke.yaml")
    return SCHEMA.load(cfg, _pairs(overrides, device)).config


def load_job(
    name: str, cfg: Path | None, overrides: tuple[str, ...], device: str | None, resume: Path | None
) -> tuple[DDPMConfig, Resumed | None]:
    """The configuration of a new run, or of one to go on with, and then that run.

    Raises:
        InputError: the configuration has faults, or there is no such run of the command `name`.
    """
    if resume is None:
        return load_config(cfg, overrides, device), None
    _begin()
    if cfg is not None:
        raise InputError("--resume goes on with a run's own configuration: change it by --override only")
    resumed = open_run(resume, name, _pairs(overrides, device))
    return resumed.config, resumed


def _pairs(overrides: tuple[str, ...], device: str | None) -> tuple[str, ...]:
    return (*overrides, *([f"device={json.dumps(device)}"] if device else []))


def _begin() -> None:
    require_one_process()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
