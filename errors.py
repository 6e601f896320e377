"""The one exception for what a person at the keyboard can mend, and how command lines show it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import click

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class InputError(ValueError):
    """Something that was handed in is wrong: the message says what, where (file, key, value), and what to do."""


def shows_input_errors(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a click command's body: an `InputError` becomes one clear message and exit status 2, no traceback."""

    @wraps(command)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except InputError as error:
            failure = click.ClickException(str(error))
            failure.exit_code = 2
            raise failure from None

    return wrapped
