"""What the command lines that take `--override` share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click


class Finite(click.FloatRange):
    """A range of numbers that holds neither NaN nor infinity, whatever its ends."""

    name = "finite number"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        """A number of the range, or click's own error."""
        number = super().convert(value, param, context)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, context)
        return number


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
