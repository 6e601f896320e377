"""A long run of small steps, watched from outside: does its memory grow, do files stay open, do its steps slow down?

    python -m benchmarks.soak --minutes 60

Starts the main job as anybody would, with small steps and frequent checkpoints and evaluations, ends it by SIGTERM, and
prints what it took, minute by minute. Ends with status 1 where a promise is not kept. Reads /proc: Linux only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click

from errors import InputError, shows_input_errors
from models.asset_table import ROOT
from models.prompts import read_prompts
from training.ppo.config import load_config
from training.runs.run_folder import read_metrics

SMALL = ("ppo.steps=1000000", "ppo.rollout_batch_size=4", "ppo.minibatch_size=4", "run.run_name=soak")
OFTEN = ("logging.save_interval=10", "logging.eval_interval=25", "logging.eval_count=6", "logging.log_interval=100")
PROMPTS = 32  # trained on: texts are kept (at most 128 MiB of them), so that new ones for an hour would hide a leak
SETTLED = 5  # minutes until memory, caches and all kinds of step were there
MOST_GROWTH, MOST_SLOWING = 0.02, 0.10


@dataclass(frozen=True)
class Sample:
    """The process at one time: seconds since its first row of metrics, resident bytes, open files, processor seconds,
    rows.
    """

    seconds: float
    memory: int
    files: int
    processor: float
    rows: int


def watch(command: Sequence[str], root: Path, minutes: float) -> tuple[list[Sample], list[float]]:
    """Run a command for so long after its first step; samples of each second, and the seconds of its steps.

    Raises:
        InputError: it ended by itself, or not as SIGTERM lets a run end.
    """
    with (root / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        samples, first = [], None
        try:
            while first is None or time.monotonic() < first + 60 * minutes:
                time.sleep(1)
                if process.poll() is not None:
                    raise InputError(f"the run ended with {process.returncode}: {(root / 'log').read_text()[-500:]}")
                for metrics in root.glob("*/logs/metrics.jsonl"):
                    first = first or time.monotonic()
                    samples.append(sample(process.pid, time.monotonic() - first, metrics))
            process.send_signal(signal.SIGTERM)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
    if status != 128 + signal.SIGTERM:
        raise InputError(f"the run ended with {status} after SIGTERM: {(root / 'log').read_text()[-500:]}")
    return samples, [row["seconds/step"] for row in read_metrics(metrics) if "seconds/step" in row]


def sample(process: int, seconds: float, metrics: Path) -> Sample:
    """What /proc says of a process, and how far it has come."""
    folder = Path(f"/proc/{process}")
    pages = int((folder / "statm").read_text().split()[1])
    user, system = map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:13])
    files = len(list((folder / "fd").iterdir()))
    processor = (user + system) / os.sysconf("SC_CLK_TCK")
    return Sample(seconds, pages * os.sysconf("SC_PAGE_SIZE"), files, processor, metrics.read_bytes().count(b"\n"))


def cost(part: Sequence[Sample]) -> float:
    """Processor seconds a step, evaluations and checkpoints included."""
    return (part[-1].processor - part[0].processor) / max(1, part[-1].rows - part[0].rows)


def faults(samples: Sequence[Sample], steps: Sequence[float], settled: float) -> list[str]:
    """Print the figures after `settled` minutes; which promises are not kept.

    Memory and open files are compared between the first and the last minute then, files by the fewest: some are open
    for a moment while a checkpoint is written. The time of a step is the processor's, in the last quarter against the
    first: by the clock it tells what else the machine does, too.
    """
    end, begin = samples[-1].seconds, 60 * settled
    early = [one for one in samples if begin <= one.seconds < begin + 60]
    late = [one for one in samples if one.seconds > end - 60]
    quarter, part = max(1, len(steps) // 4), len(samples) // 4
    growth = median(one.memory for one in late) / median(one.memory for one in early) - 1
    opened = [min(one.files for one in part) for part in (early, late)]
    clock = median(steps[-quarter:]) / median(steps[:quarter]) - 1
    slowing = cost(samples[-part:]) / cost(samples[:part]) - 1
    click.echo(f"{len(steps)} steps, median {median(steps):.2f} s")
    click.echo(f"memory after the first {settled:g} minutes: {growth:+.2%} (at most {MOST_GROWTH:+.0%})")
    click.echo(f"open files: {opened[0]}, at the end {opened[1]}")
    click.echo(f"processor time a step, last quarter against first: {slowing:+.1%} (at most {MOST_SLOWING:+.0%})")
    click.echo(f"by the clock: {clock:+.1%}")
    kept = {"memory": growth < MOST_GROWTH, "open files": opened[0] == opened[1], "time": slowing < MOST_SLOWING}
    return [name for name, holds in kept.items() if not holds]


@click.command(context_settings={"max_content_width": 110, "show_default": True})
@click.option("--minutes", type=click.FloatRange(2, 10_000), default=60, help="After its first step.")
@click.option(
    "--config", type=click.Path(path_type=Path), default=Path("training/ppo/cfgs/shapes.yaml"), help="Of the run."
)
@shows_input_errors
def main(minutes: float, config: Path) -> None:
    """Run the main job for a while and print whether memory, open files and the time of a step stay as they are.

    \b
    python -m benchmarks.soak --minutes 60
    """
    with TemporaryDirectory() as folder:
        root = Path(folder)
        prompts = read_prompts(load_config(config).config.data.prompt_csv)[:PROMPTS]
        (root / "prompts.txt").write_text("\n".join(prompts))
        own = (f"run.output_root={root}", f"data.prompt_csv={root / 'prompts.txt'}")
        told = ["--config", str(config), "--override", *SMALL, *OFTEN, *own]
        samples, steps = watch([sys.executable, "-m", "training.ppo.launch", *told], root, minutes)
    click.echo("minute  memory (MB)  open files")
    for minute in range(int(minutes)):
        part = [one for one in samples if 60 * minute <= one.seconds < 60 * (minute + 1)]
        if part:
            click.echo(
                f"{minute:6}  {median(one.memory for one in part) / 1e6:11.1f}  {min(one.files for one in part):10}"
            )
    if broken := faults(samples, steps, min(SETTLED, minutes / 2)):
        raise click.ClickException(f"not as promised: {', '.join(broken)}")


if __name__ == "__main__":
    main()
