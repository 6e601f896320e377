"""Whether a step of RL takes time in proportion to what is asked of it: a line through each sweep, and what is off it.

    python -m benchmarks.linearity

A line that bends upwards, or memory that grows along a sweep of intervals, is a fault of ours: the network's calls are
the same ones, only more of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple

import click
import numpy as np
import torch

from benchmarks.gpu_hour import SIZES, World, trainer_of
from errors import shows_input_errors
from models.devices import resolve_device

BASE = {"images": 16, "intervals": 4, "points": 1}
SWEEPS: Mapping[str, tuple[int, ...]] = {"images": (8, 16, 24, 32), "intervals": (2, 4, 6, 8), "points": (1, 2, 3, 4)}


class Line(NamedTuple):
    """Least squares through times: seconds at 0, seconds for one more, and the largest relative residual."""

    start: float
    slope: float
    residual: float

    @classmethod
    def through(cls, amounts: tuple[int, ...], seconds: list[float]) -> Line:
        """The line through seconds [n] at amounts [n], n at least 2 (at 2 nothing is off it)."""
        slope, start = np.polyfit(amounts, seconds, 1)
        fitted = start + slope * np.array(amounts)
        return cls(float(start), float(slope), float(np.abs(fitted / np.array(seconds) - 1).max()))


def step_seconds(world: World, repeats: int, *, images: int, intervals: int, points: int) -> float:
    """The median of `repeats` steps of PPO, after one that does not count."""
    world.size = world.size._replace(images=images)
    world.forget_memory()
    trainer = trainer_of(world, intervals, points, compiled=False)
    trainer.step()
    return statistics.median(trainer.step()["seconds/step"] for _ in range(repeats))


@click.command(
    epilog="Example:  OMP_NUM_THREADS=1 python -m benchmarks.linearity --repeats 5",
    context_settings={"show_default": True},
)
@click.option("--model", default="shapes", help="As in benchmarks.gpu_hour.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, help="Steps at each place.")
@shows_input_errors
def main(model: str, device: str, repeats: int) -> None:
    """Print the time of a step against images, intervals and points (each with the others fixed), and a line."""
    on = resolve_device(device)
    world = World(model, on, torch.float32, SIZES["cpu"]._replace(group=4))
    step_seconds(world, 1, **BASE)  # what is loaded and made once
    for name, amounts in SWEEPS.items():
        fixed = ", ".join(f"{other} {value}" for other, value in BASE.items() if other != name)
        click.echo(f"\n{name} ({fixed})   seconds a step   memory")
        seconds = []
        for amount in amounts:
            seconds.append(step_seconds(world, repeats, **{**BASE, name: amount}))
            click.echo(f"{amount:>6}   {seconds[-1]:.3f}   {world.memory()}")
        line = Line.through(amounts, seconds)
        click.echo(f"  {line.start:.3f} s + {line.slope:.3f} s each; at most {line.residual:.1%} off the line")


if __name__ == "__main__":
    main()
