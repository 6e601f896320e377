"""What the three commands share: their options, and from these to a configuration or a run to go on with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from errors import InputError
from training.ddpm.config import SCHEMA, DDPMConfig
from training.ddpm.run import Resumed, open_run
from training.runs.command_line import RESUME, require_one_process, takes_overrides, with_options

Command = TypeVar("Command", bound=Callable[..., None])


def common_options(command: Command) -> Command:
    """Add --cfg, --override and --device."""
    command = click.option("--device", help="auto, cpu, cuda or cuda:N (device).")(command)
    command = takes_overrides("the file")(command)
    return click.option("--cfg", type=click.Path(path_type=Path), help="Configuration, YAML; see configs/.")(command)


def training_options(command: Command) -> Command:
    """Add the common options, --resume and --overwrite."""
    command = click.option("--overwrite", is_flag=True, help="Replace an output that exists.")(command)
    return common_options(RESUME(command))


def load_config(cfg: Path | None, overrides: tuple[str, ...], device: str | None) -> DDPMConfig:
    """The configuration that the options ask for.

    Raises:
        InputError: there is none, or it has faults.
    """
    _begin()
    if cfg is None:
        raise InputError("--cfg is missing: name a configuration, for example configs/smoke.yaml")
    return SCHEMA.load(cfg, with_options(overrides, {"device": device})).config


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
    resumed = open_run(resume, name, with_options(overrides, {"device": device}))
    return resumed.config, resumed


def _begin() -> None:
    require_one_process()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
