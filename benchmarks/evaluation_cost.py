"""What an evaluation would cost, counted from configurations alone: `python evaluate.py --dry-run`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.budget import CONFIGURATIONS, budget_of, loaded
from models.denoiser import Denoiser
from models.options import ModelOptions
from models.registry import REGISTERED, SOURCE, locate
from training.measuring.evaluation import PART
from training.solver import Solver

PEAK, PEAK_OF = 989e12, "an H100 SXM in bfloat16, 989 TFLOP/s dense by its data sheet"
SHARE = 0.4
FEATURES = 4 * 2048  # bytes an image for each kind of features that is kept, at most


def configuration_of(model: str) -> Path:
    """The folder with a model's configurations, whether its weights are there or not.

    Raises InputError where nothing describes it.
    """
    if model in REGISTERED:
        own = SOURCE / model
        return own if (own / "model_index.json").is_file() else CONFIGURATIONS / model
    found = locate(model)
    return found if found.is_dir() else CONFIGURATIONS / "sd15"  # single files are Stable Diffusion 1.x


class Drawn(NamedTuple):
    """Solvers on prompts; `purpose` for people."""

    purpose: str
    prompts: int
    solvers: Sequence[Solver]


@dataclass(frozen=True)
class Cost:
    """A model without weights, and the operations of a row of its network, of a decoding and of a text."""

    denoiser: Denoiser
    row: float
    decoding: float
    text: float

    @classmethod
    def of(cls, model: str, options: ModelOptions, dtype: torch.dtype) -> Cost:
        """Counted on the meta device. Raises InputError where nothing describes the model."""
        denoiser, modules = loaded(configuration_of(model), options, dtype)
        budget = budget_of(denoiser, modules)
        return cls(denoiser, *(float(work.operations) for work in (budget.row, budget.decoding, budget.text)))

    def lines(self, drawn: Sequence[Drawn], *, features: int, images: bool, devices: int) -> Iterator[str]:
        """For people, one fact a line. features: kinds of features that are kept of every image.

        Raises InputError where a solver does not suit the model.
        """
        rows = operations = count = 0.0
        for purpose, prompts, solvers in drawn:
            settled = [solver.on(self.denoiser) for solver in solvers]
            now = prompts * sum(solver.evaluations.rows for solver in settled)
            yield f"{purpose}: solvers and settings, {len(settled)} x {prompts:,} prompts: {now:,} network rows"
            rows, count = rows + now, count + prompts * len(settled)
            operations += now * self.row + prompts * len(settled) * (self.decoding + self.text)
        hours = operations / (SHARE * PEAK) / 3600
        yield f"in all {rows:,.0f} network rows, {operations / 1e12:,.0f} TFLOP (judges not counted)"
        each = f"; {hours / devices:,.3g} on each of {devices}" if devices > 1 else ""
        yield f"{hours:,.3g} GPU hours at {SHARE:.0%} of the peak of {PEAK_OF}{each}"
        numbers = math.prod(self.denoiser.latent_shape)
        latents = count * numbers * torch.promote_types(self.denoiser.dtype, torch.float32).itemsize
        height, width = self.denoiser.image_size
        written = f"; images at most {count * 3 * height * width / 1e9:,.3g} GB in --outdir" if images else ""
        yield (
            f"disk: {latents / 1e9:,.3g} GB of latents, at most {count * features * FEATURES / 1e9:,.3g} GB of "
            f"features, in --cache{written}"
        )
        yield f"kept every {PART} prompts of a solver: the same command goes on after a stop"
