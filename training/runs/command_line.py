"""What the command lines share: kinds of options, and what they check at their start."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from errors import InputError
from models.options import ModelOptions
from training.parameters import named_parts

Result = TypeVar("Result")

LAUNCHERS = {"WORLD_SIZE": "torchrun", "SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun"}
"""Where those that start a command several times write how many times."""


def started_processes() -> tuple[int, str]:
    """How many processes of this command were started together, and by what; 1 by nothing."""
    for variable, launcher in LAUNCHERS.items():
        number = os.environ.get(variable, "")
        if number.isdecimal() and int(number) > 1:
            return int(number), launcher
    return 1, ""


def require_one_process() -> None:
    """Raise InputError in one of several processes: each would do the whole work, and write to the same files."""
    number, launcher = started_processes()
    if number > 1:
        raise InputError(f"{launcher} started {number} processes of this command, which runs in one: start it once")


def require_processes(num_devices: int) -> None:
    """Raise InputError where other processes were started than `--num-devices` says: each would do the whole work."""
    number, launcher = started_processes()
    if number not in (1, num_devices):
        raise InputError(f"{launcher} started {number} processes of this command: add --num-devices {number}")


def takes_model_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a click command: it takes the options of model loading, and gets them as `model_options`."""

    @wraps(command)
    def wrapped(*args: Any, lora: tuple[str, ...], **kwargs: Any) -> Result:
        told = {field.name: kwargs.pop(field.name) for field in fields(ModelOptions) if field.name != "lora"}
        return command(*args, model_options=ModelOptions(lora=",".join(lora) or None, **told), **kwargs)

    pixels = click.IntRange(1, 2**14)
    for option in (
        click.option("--text-on-cpu", is_flag=True, help="Run the text encoders on the CPU: slower, less GPU memory."),
        click.option("--without-t5", is_flag=True, help="Leave T5 out, where the model can do without it (SD3)."),
        click.option("--negative-prompt", help="What guidance leads away from. [the empty prompt]"),
        click.option("--width", type=pixels, help="Of the images, in pixels. [the model's own]"),
        click.option("--height", type=pixels, help="Of the images, in pixels. [the model's own]"),
        click.option("--vae", help="A folder with another VAE, or a pipeline's whose VAE is to be used."),
        click.option("--lora", multiple=True, metavar="FILE[:SCALE]", help="Add LoRA weights; may be repeated."),
    ):
        wrapped = option(wrapped)
    return wrapped


class Finite(click.FloatRange):
    """A range of numbers that holds neither NaN nor infinity, whatever its ends."""

    name = "finite number"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        """A number of the range, or click's own error."""
        number = super().convert(value, param, context)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, context)
        return number


class Parts(click.ParamType):
    """Names of what can be learned of a solver, separated by commas."""

    name = "columns"

    def convert(self, value: str, param: click.Parameter | None, context: click.Context | None) -> str:
        """The same names in their usual order, or click's own error."""
        try:
            return ",".join(named_parts(value))
        except InputError as error:
            self.fail(str(error), param, context)


class EitherDash(click.Command):
    """A command whose options may be typed with `_` or `-`; some have the public code's names."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Spell each option as it was declared."""
        declared = {name.replace("_", "-"): name for parameter in self.params for name in parameter.opts}
        words = [word.partition("=") for word in args]
        spelled = [declared.get(name.replace("_", "-"), name) + equals + value for name, equals, value in words]
        return super().parse_args(context, spelled)


RESUME = click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Go on with a run of this command, from its newest checkpoint, or from the checkpoint given.",
)


def takes_overrides(over: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """The option `--override` of a `SeveralPairs` command, which gets `overrides`; `over`: what they win over."""
    told = f"Has the last word over {over}; takes several pairs, may be repeated."
    return click.option("--override", "overrides", multiple=True, metavar="SECTION.KEY=VALUE ...", help=told)


def with_options(overrides: Sequence[str], options: Mapping[str, str | None]) -> tuple[str, ...]:
    """The overrides, and after them what options of their own say of dotted keys."""
    told = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value)
    return (*overrides, *told)


class SeveralPairs(click.Command):
    """A command whose option `--override` takes all values up to the next option."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Spell the option out before each of its values."""
        return super().parse_args(context, spread(args))


def spread(args: Sequence[str]) -> list[str]:
    """Repeat `--override` before every further value that follows it directly."""
    spelled: list[str] = []
    inside = False
    for arg in args:
        if arg.startswith("-"):
            inside = arg == "--override" or arg.startswith("--override=")
        elif inside and spelled[-1] != "--override":
            spelled.append("--override")
        spelled.append(arg)
    return spelled
