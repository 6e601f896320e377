"""How many times as fast two processes are as one, of a thread each: a step of RL, an evaluation, a study's scores.

    python -m benchmarks.scaling

Runs the commands that anybody would run, on the CPU, with one process and with two, one after the other; on a machine
that does something else at the same time it says little. What does not scale (loading, reports) is not counted.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click
import yaml

from errors import InputError, shows_input_errors
from models.asset_table import ROOT
from training.runs.run_folder import read_metrics

CONFIG = "training/ppo/cfgs/shapes.yaml"
STEPS, PROMPTS = 8, 96
PROCESSES = (1, 2)


def said(*command: object) -> str:
    """What `python` with these arguments prints; its processes have a thread each.

    Raises:
        InputError: it fails.
    """
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise InputError(
            f"{' '.join(map(str, command))} ended with {done.returncode}: {(done.stdout + done.stderr)[-1000:]}"
        )
    return done.stdout


def step_seconds(folder: Path, number: int) -> float:
    """Of a step of RL, the median; the first is not counted."""
    told = [f"ppo.steps={STEPS + 1}", "logging.eval_interval=0", f"run.num_devices={number}"]
    told.append(f"run.output_root={folder}")
    said("-m", "training.ppo.launch", "--config", CONFIG, "--device", "cpu", "--override", *told)
    (metrics,) = folder.glob("*/logs/metrics.jsonl")
    return median(row["seconds/step"] for row in read_metrics(metrics)[1:])


def evaluation_seconds(folder: Path, number: int) -> float:
    """Of drawing and judging two solvers."""
    told = ["--solvers", "ddim,dpmpp:2", "--nfe", 8, "--schedules", "discrete", "--reference-steps", 20]
    told += ["--number", PROMPTS, "--num-devices", number, "--device", "cpu"]
    places = ["--outdir", folder / "out", "--cache", folder / "cache"]
    return _drawn(said("evaluate.py", *told, *places))


def study_seconds(folder: Path, number: int) -> float:
    """Of drawing and judging a study's tables; its run, of two steps, is not counted."""
    short = ["ppo.steps=2", "logging.eval_interval=1", "logging.eval_count=8", "logging.preview_prompts=0"]
    arm = {"config": CONFIG, "overrides": short, "seeds": [0], "starts": ["0"]}
    study = {"arms": {"ppo": arm}, "heldout_prompts": "src/prompts/shapes_heldout.csv", "heldout_count": PROMPTS}
    folder.mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump({**study, "solvers": ["ddim"], "schedules": ["discrete"]}))
    told = ["--output", folder / "out", "--cache", folder / "cache", "--num-devices", number, "--device", "cpu"]
    return _drawn(said("-m", "benchmarks.tuning_study", folder / "study.yaml", *told))


def _drawn(text: str) -> float:
    return float(re.findall(r"drawn and judged in ([\d.]+) s", text)[-1])


MEASURED = {"a step of RL": step_seconds, "an evaluation": evaluation_seconds, "a study's scores": study_seconds}


@click.command()
@shows_input_errors
def main() -> None:
    """Print how many times as fast two processes are as one."""
    with TemporaryDirectory() as folder:
        for row, (name, measure) in enumerate(MEASURED.items()):
            alone, shared = (measure(Path(folder) / f"{row}-{number}", number) for number in PROCESSES)
            click.echo(
                f"{name}: {alone:.2f} s by one process, {shared:.2f} s by two: {alone / shared:.2f} times as fast"
            )


if __name__ == "__main__":
    main()
