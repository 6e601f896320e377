"""Small exact implementations of what the RL core meets only through protocols: denoiser, reward, rollout source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.denoiser import Conditioning, GuidanceKind
from solvers import EPDTable
from training.ppo.cold_start import prepare_table
from training.ppo.rewards.mix import WeightedMix
from training.ppo.rl_runner import Shard
from training.ppo.rollout import Scores

T = TypeVar("T")
PROMPTS = ("red", "green", "blue", "dark grey", "white", "a long list of colours")


class GaussianDenoiser:
    """Latents ~ N(mean(prompt), 0.5^2 I), so that D(x, sigma) = (0.25 x + sigma^2 mean) / (0.25 + sigma^2) is exact.

    Guidance g moves the mean: g * mean(prompt). Pixels are the logistic function of the latent's first three channels,
    taken in float64: torch rounds float32's otherwise at the end of a batch, and pixels must not depend on theirs.
    """

    name = "gaussian"
    latent_shape = (4, 2, 2)
    image_size = (2, 2)
    sigma_min, sigma_max = 0.05, 10.0
    time_min = 0.001
    guidance = GuidanceKind.CLASSIFIER_FREE
    takes_prompts = True
    default_guidance_scale = 2.0
    device = torch.device("cpu")
    dtype = torch.float32
    code = (Path(__file__),)

    def __init__(self, memory: int | None = None) -> None:
        """`memory`: rows that one call can hold; more of them raise what a full GPU raises."""
        self.memory = memory
        self.rows: list[int] = []  # of each call

    def sigma_of_time(self, time: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** time

    def validate_prompts(self, prompts: Sequence[str]) -> None:
        assert all(prompts)

    def too_long(self, prompt: str) -> bool:
        return False

    def check_guidance(self, scales: float | Tensor) -> None:
        """Any is taken."""

    def encode(self, prompts: Sequence[str], guidance_scale: float | None = None) -> Conditioning:
        seeds = [sum(prompt.encode()) for prompt in prompts]
        means = [torch.randn(1, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        return Conditioning(len(means), {"mean": torch.cat(means)}, None, scale)

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        if self.memory is not None and len(x) > self.memory:
            raise torch.OutOfMemoryError("out of memory")
        scale = conditioning.guidance_scale if guidance is None else guidance.to(x)[:, None, None, None]
        mean = scale * conditioning.rows(len(x))["mean"].to(x)[:, :, None, None]
        variance = (sigma.to(x) ** 2).expand(len(x))[:, None, None, None]
        return (0.25 * x + variance * mean) / (0.25 + variance)

    def decode(self, latents: Tensor, chunk_size: int = 16) -> Tensor:
        return torch.cat([part[:, :3].double().sigmoid().float() for part in latents.split(chunk_size)])


class Brightness:
    """Mean of the pixels, plus the length of the prompt in hundreds, so that a prompt in the wrong row is seen."""

    name = "brightness"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(images) == len(prompts)
        return images.mean((1, 2, 3)) + torch.tensor([len(prompt) / 100 for prompt in prompts])

    def say_what_is_cut(self, prompts: Sequence[str]) -> None:
        """Nothing is."""


def brightness() -> WeightedMix:
    return WeightedMix({"brightness": (Brightness(), 1.0)})


def cold_start_table(intervals: int = 2, points: int = 2) -> EPDTable:
    """Evenly spaced positions, equal weights."""
    row = torch.arange(1, points + 1, dtype=torch.float64) / (points + 1)
    return prepare_table(
        EPDTable(row.expand(intervals, points), torch.full((intervals, points), 1 / points).double())
    ).table


class QuadraticSource:
    """A `RolloutSource` without images: reward = 3 * prompt index - |positions - target|^2 - |weights - target|^2."""

    def __init__(self, target: EPDTable, group_size: int) -> None:
        self.target = target
        self.group_size = group_size

    def roll_out(
        self, tables: EPDTable, prompts: Sequence[str], step: int, sigmas: Tensor | None = None
    ) -> tuple[EPDTable, Sequence[str]]:
        assert tables.batch_size == len(prompts) * self.group_size
        return tables, prompts

    def score(self, outcome: tuple[EPDTable, Sequence[str]]) -> Scores:
        tables, prompts = outcome
        distance = (tables.positions - self.target.positions) ** 2 + (tables.weights - self.target.weights) ** 2
        offsets = torch.tensor([PROMPTS.index(prompt) for prompt in prompts]).repeat_interleave(self.group_size)
        return Scores(3.0 * offsets - distance.sum((1, 2)), {"distance": distance.sum((1, 2))})

    def take_seconds(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state


def in_two_processes(work: Callable[[Shard], T]) -> list[T]:
    """What each of two threads finds that stand for two processes: the exchange between them is real."""
    barrier, exchanged = Barrier(2, timeout=60), [torch.empty(0)] * 2

    def process(rank: int) -> T:
        def gather(local: Tensor) -> Tensor:
            exchanged[rank] = local
            barrier.wait()
            together = torch.cat(exchanged)
            barrier.wait()
            return together

        return work(Shard(rank, 2, gather))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, range(2)))
