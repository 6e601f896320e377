"""Signals at any time: while modules load, inside a command, inside a run, and where they are not wanted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
from click.testing import CliRunner

import train

REPOSITORY = Path(__file__).resolve().parents[1]
SIGNALS = [signal.SIGINT, signal.SIGTERM]
COMMANDS = [
    ["train.py"],
    ["sample.py"],
    ["evaluate.py"],
    ["-m", "training.ppo.launch"],
    ["-m", "training.ppo.export_epd_predictor"],
    ["-m", "training.ppo.report"],
    ["-m", "scripts.train_reward_model"],
    ["-m", "scripts.finetune"],
    ["-m", "scripts.eval"],
    ["-m", "scripts.verify_images"],
    ["-m", "scripts.image_statistics"],
    ["-m", "scripts.show_solver"],
    ["-m", "scripts.push_to_hub"],
    ["-m", "scripts.export_diffusers"],
    ["download_hpsv2_weights.py"],
    ["-m", "models.assets"],
    ["-m", "models.shapes.train_diffusion"],
    ["-m", "benchmarks.tuning_study"],
    ["-m", "benchmarks.gpu_hour"],
    ["-m", "benchmarks.ddpm_study"],
    ["-m", "benchmarks.budget"],
    ["-m", "benchmarks.estimators"],
    ["-m", "benchmarks.rehearse_sd15"],
    ["-m", "benchmarks.rehearse_evaluation"],
]
POLICY = "import os, interrupts; interrupts.end_at_once_on_signals(); print(os.environ['OMP_WAIT_POLICY'])"
COMMAND = """
import gc, os, signal, sys, time
import click
from errors import shows_input_errors
from interrupts import Interrupted, Interrupts, goes_on_by

def wait():
    print("here", flush=True)
    time.sleep(60)

class Destructor:
    def __del__(self):
        wait()

@click.command()
@shows_input_errors
def main():
{body}

main()
"""


def ended(arguments: list[str], number: int, *, path: Path = REPOSITORY, signals: int = 1, **options: object) -> tuple:
    """Exit status and output of a process that was sent a signal each time that it said where it was."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (path, REPOSITORY)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    said = ""
    for _ in range(signals):
        said += process.stdout.readline()
        process.send_signal(number)
    said += process.communicate(timeout=60)[0]
    return process.returncode, said


def ended_command(body: str, number: int, **options: object) -> tuple[int, str]:
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    return ended(["-c", COMMAND.format(body=indented)], number, **options)


@pytest.mark.parametrize(("said", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_sleep_unless_the_environment_says_otherwise(said: str | None, policy: str):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if said is None else {"OMP_WAIT_POLICY": said}
    command = [sys.executable, "-c", POLICY]
    found = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == policy


@pytest.mark.parametrize(("command", "number"), zip(COMMANDS, cycle(SIGNALS), strict=False), ids=str)
def test_a_command_ends_in_a_line_while_its_modules_load(command: list[str], number: int, tmp_path: Path):
    for name in ("torch", "numpy"):  # whichever the command loads first
        (tmp_path / f"{name}.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    assert ended(command, number, path=tmp_path) == (128 + number, "here\ninterrupted\n")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "body",
    [
        "wait()",
        "Destructor(); wait()",  # where Python would print the exception and drop it
        "try:\n    wait()\nexcept BaseException as error:\n    raise RuntimeError('wrapped') from error",
    ],
)
def test_a_command_ends_in_a_line(body: str, number: int):
    assert ended_command(body, number) == (128 + number, "here\ninterrupted\n")


def test_how_to_go_on_is_said():
    body = "with goes_on_by('python train.py --resume 3'):\n    wait()"
    assert ended_command(body, signal.SIGTERM) == (143, "here\ninterrupted; go on: python train.py --resume 3\n")


PATIENT = """
with Interrupts() as interrupts:
    print("here", flush=True)
    while not interrupts.received: time.sleep(0.01)
"""


def test_a_run_ends_between_steps():
    status, said = ended_command(f"{PATIENT}\nraise Interrupted(interrupts.received)", signal.SIGTERM)
    assert (status, said.splitlines()[-1]) == (143, "interrupted")
    assert "SIGTERM: the step is finished and a checkpoint saved" in said


def test_a_run_that_is_asked_again_ends_at_once():
    status, said = ended_command(f"{PATIENT}    wait()", signal.SIGINT, signals=2)
    assert (status, said.splitlines()[-1]) == (130, "interrupted")


def test_what_the_caller_had_ignored_stays_ignored():
    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    body = """
from interrupts import end_at_once_on_signals
end_at_once_on_signals()
with Interrupts():
    print("here", flush=True)
    time.sleep(0.5)
print("done")
"""
    assert ended_command(body, signal.SIGINT, preexec_fn=ignore) == (0, "here\ndone\n")


def test_signals_are_given_back():
    def handlers():
        return [signal.getsignal(number) for number in SIGNALS], sys.unraisablehook

    before = handlers()
    CliRunner().invoke(train.main, ["--dry-run"])
    assert handlers() == before


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
