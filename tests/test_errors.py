"""What a person sees of what goes wrong: a message and a status for what can be mended, otherwise a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from errors import InputError, shows_input_errors


def outcome(body: Callable[[], object]) -> Result:
    @click.command()
    @shows_input_errors
    def command() -> None:
        body()

    return CliRunner().invoke(command)


def fail(error: Exception) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


def test_a_wrong_input_is_a_message_and_a_status():
    result = outcome(fail(InputError("model.ckpt is empty")))
    assert result.exit_code == 2
    assert result.output == "Error: model.ckpt is empty\n"


@pytest.mark.parametrize(
    "arguments", [("--text", "a \udcff"), ("--file", "a\udcff.csv"), ("--text", "a", "--text", "\udcff")]
)
def test_an_argument_that_is_not_utf_8_is_refused_before_anything_is_done(arguments):
    @click.command()
    @click.option("--text", multiple=True)
    @click.option("--file", type=click.Path(path_type=Path))
    @shows_input_errors
    def command(text: tuple[str, ...], file: Path | None) -> None:
        pytest.fail("it ran")

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert "\\udcff" in result.output
    assert "bytes that are not UTF-8" in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    "body",
    [
        lambda: torch.empty(10**15),  # as a CPU says it
        fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...\nmore")),
        fail(MemoryError()),
    ],
)
def test_too_little_memory_is_explained(body):
    result = outcome(body)
    assert result.exit_code == 2
    assert "There is too little memory" in result.output
    assert "a smaller batch" in result.output
    assert result.output.count("\n") == 1


def test_the_end_of_another_process_is_one_line():
    said = (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [::1]:1: Connection reset by peer.\nmore"
    )
    result = outcome(fail(RuntimeError(said)))
    assert result.exit_code == 2
    assert result.output.startswith("Error: another of the processes that work on this has ended")
    assert result.output.count("\n") == 1


def test_what_the_system_says_of_a_file_is_a_message():
    result = outcome(lambda: Path("x" * 300).stat())
    assert result.exit_code == 2
    assert result.output == f"Error: {'x' * 300}: File name too long\n"
    assert outcome(fail(OSError(28, "No space left on device"))).output == "Error: a file: No space left on device\n"


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("ours"), KeyError("ours")])
def test_faults_of_our_own_keep_their_traceback(error):
    assert outcome(fail(error)).exception is error
