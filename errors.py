"""The one exception for what a person at the keyboard can mend, and how command lines show it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

import click

from interrupts import exit_status, signals_raise

# How torch says on each kind of device that an allocation failed; where it is no MemoryError it is a RuntimeError.
TOO_LITTLE_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory|STATUS_ALLOC_FAILED")

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# How torch's libraries for several processes say that one of them is gone.
LOST_PROCESS = re.compile(r"gloo/transport|NCCL|TCPStore")


class InputError(ValueError):
    """Something that was handed in is wrong: the message says what, where (file, key, value), and what to do."""


def is_too_little_memory(error: Exception) -> bool:
    """Whether an allocation failed, on whatever kind of device."""
    return isinstance(error, MemoryError) or TOO_LITTLE_MEMORY.search(str(error)) is not None


def first_line(error: Exception) -> str:
    """What a library's error says, in one line; its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def shows_input_errors(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a click command's body: an `InputError` becomes one clear message and exit status 2, no traceback.

    So do arguments that are not UTF-8, before anything is done, what the system says of files (no right, no room, too
    long a name), too little memory, wherever it shows, and the end of another process that worked on the same. A signal
    that nobody took ends the process with 130 or 143.
    """

    @wraps(command)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            _check_encoding(kwargs)
            with signals_raise():
                return command(*args, **kwargs)
        except InputError as error:
            raise _failure(str(error)) from None
        except KeyboardInterrupt as error:
            click.echo("; ".join(filter(None, ("interrupted", str(error)))), err=True)
            raise click.exceptions.Exit(exit_status(error)) from None
        except OSError as error:
            raise _failure(f"{error.filename or 'a file'}: {error.strerror or error}") from None
        except (MemoryError, RuntimeError) as error:
            if LOST_PROCESS.search(str(error)):
                raise _failure(
                    "another of the processes that work on this has ended (it may have said why): what is saved stays, "
                    f"and can be gone on with. ({first_line(error)})"
                ) from None
            if not is_too_little_memory(error):
                raise
            raise _failure(
                "There is too little memory: end what else runs on the device, do less at once (a smaller batch), or "
                f"use half precision. ({first_line(error)})"
            ) from None

    return wrapped


def _check_encoding(arguments: Mapping[str, object]) -> None:
    """Python hands on bytes that it cannot decode as halves of surrogate pairs, which no file and no model takes."""
    for value in arguments.values():
        for text in map(str, value if isinstance(value, tuple) else [value]):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"{text!r}: holds bytes that are not UTF-8; write it in UTF-8, or rename the file"
                ) from None


def _failure(message: str) -> click.ClickException:
    failure = click.ClickException(message)
    failure.exit_code = 2
    return failure
