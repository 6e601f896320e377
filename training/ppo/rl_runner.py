"""The rollout source of the RL job: a frozen diffusion model sampled with many solver tables at once, then rewarded.

It hands the same `training.solver.Solver` that replays a finished table another table for each sample, nothing else.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import InputError
from models.denoiser import Denoiser
from models.generate import decode, in_parts_that_fit
from models.randomness import derived_seed
from models.recent import RecentTensors
from solvers import EPDTable
from training.ppo.phase_clock import PhaseClock, timer_of
from training.ppo.rewards.mix import WeightedMix
from training.ppo.rollout import Scores
from training.solver import Solver

log = logging.getLogger(__name__)

DEFAULT_MAX_ROWS = 64
"""Network rows per call where no limit is set and the device does not report that its memory is full."""
MOST_POSITIONS = 128 * 64 * 64
"""Positions of all rows of a call on CUDA where no limit is set: 128 rows of Stable Diffusion 1.x at 512 x 512, whose
widest layer then holds 1.3 of the 2.1 thousand million numbers that 32 bits count; beyond them kernels are slower."""


@dataclass(frozen=True)
class Images:
    """N images with what made them.

    Attributes:
        pixels: [N, 3, H, W] float32 in [0, 1], all finite.
        prompts: N texts.
        finite: [N] bool; False where the solver exploded or the decoder gave no numbers.
    """

    pixels: Tensor
    prompts: tuple[str, ...]
    finite: Tensor


@dataclass(frozen=True)
class Shard:
    """Which part of a step's prompts this process rolls out.

    Every process draws the same tables and prompts, rolls out its own consecutive part of the groups, and gathers the
    raw scores of all; so all compute the same update and no gradient travels.

    Attributes:
        rank, count: this process and the number of processes.
        gather: [n, ...] of this process to [count * n, ...] of all, in the order of their ranks.
    """

    rank: int = 0
    count: int = 1
    gather: Callable[[Tensor], Tensor] = lambda local: local

    def gathered(self, scores: Tensor | None, finite: Tensor) -> Tensor:
        """Scores of the finite images of this process to those of all images of all [N], on the CPU; else NaN.

        `finite`: bool [n], which of this process's images the scores are of; None where there is none.
        """
        local = torch.full(finite.shape, torch.nan, device=finite.device)
        if scores is not None:
            local[finite] = scores.to(local)
        return self.gather(local).cpu()


class RLRunner:
    """Samples and rewards images; a `RolloutSource` whose outcomes are `Images`.

    An image depends on its prompt, its seed and its table, never on the batch or the micro-batch it came in.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        solver: Solver,
        reward: WeightedMix,
        *,
        group_size: int,
        shared_noise: bool,
        seed: int,
        max_rows: int | None = None,
        decode_chunk_size: int = 8,
        dtype: torch.dtype = torch.float32,
        shard: Shard | None = None,
    ) -> None:
        """Bind all that stays the same over a run.

        Args:
            denoiser: the frozen model.
            solver: all of it but what is drawn, settled for the denoiser (`Solver.on`).
            reward: scores images of prompts.
            group_size: k, samples per prompt.
            shared_noise: the samples of a prompt start from the same noise, so that their rewards differ by the table
                alone; otherwise each has its own.
            seed: of the initial noise.
            max_rows: most rows (images x points x guidance halves) in one network call. None: see `usual_rows`. Halved
                whenever the device's memory does not suffice.
            decode_chunk_size: latents decoded at once.
            dtype: of the solver's state.
            shard: this process's part of the work; None: all of it.
        """
        self.denoiser = denoiser
        self.solver = solver
        self.reward = reward
        self.group_size = group_size
        self.shared_noise = shared_noise
        self.seed = seed
        self.decode_chunk_size = decode_chunk_size
        self.dtype = dtype
        self.shard = shard or Shard()
        self.clock = PhaseClock(timer_of(denoiser.device))
        self.max_rows = max_rows or usual_rows(denoiser.device, denoiser.latent_shape)
        self._configured_max_rows = max_rows
        self._starts: RecentTensors[Tensor] = RecentTensors()
        self._compiled_for: int | None = None

    def compile_network(self, images: int) -> None:
        """Have the network compiled for steps of `images` in this process, at one number of rows.

        That is what an interval's start takes of a micro-batch: its points are a multiple, and what else is drawn, held
        out or left over at the end, is filled up to it.
        """
        self._compiled_for = images
        at_once = min(images, self._micro_batch(self.solver))
        self.denoiser.compile_network([at_once * self.solver.rows_at_start])

    def roll_out(self, tables: EPDTable, prompts: Sequence[str], step: int, sigmas: Tensor | None = None) -> Images:
        """This process's part of the images of tables [B * k, S, K] on B prompts, k for each, prompt-major.

        `sigmas`: noise levels of each [B * k, S + 1], or None for the solver's.

        Raises:
            InputError: the prompts cannot be split evenly among the processes, or one image is too much for the memory.
        """
        if len(prompts) % self.shard.count:
            raise InputError(f"{len(prompts)} prompts cannot be split evenly among {self.shard.count} processes")
        prompts_here = len(prompts) // self.shard.count
        first = self.shard.rank * prompts_here
        groups = range(first, first + prompts_here)
        samples = slice(groups.start * self.group_size, groups.stop * self.group_size)
        return self._images(
            tables.select(samples),
            [prompts[group] for group in groups for _ in range(self.group_size)],
            [self.noise_seed(step, group, member) for group in groups for member in range(self.group_size)],
            None if sigmas is None else sigmas[samples],
        )

    def score(self, outcome: Images) -> Scores:
        """Reward the images of all processes; images that are not finite are not shown to the reward and get NaN.

        Differentiable in pixels that require a gradient, in a run of one process.
        """
        with torch.set_grad_enabled(outcome.pixels.requires_grad), self.clock.measure("reward"):
            parts = self.raw_scores(outcome, self.reward)
            self.reward.observe(parts)
            return Scores(self.reward.combine(parts).double(), parts)

    def raw_scores(self, images: Images, rewards: WeightedMix) -> dict[str, Tensor]:
        """Raw scores of the images of all processes by each of the rewards; see `score`."""
        finite = images.finite.to(images.pixels.device)
        prompts = [text for text, keep in zip(images.prompts, finite.tolist(), strict=True) if keep]
        raw = rewards.raw_scores(images.pixels[finite], prompts) if prompts else {}
        return {name: self.shard.gathered(raw.get(name), finite) for name in rewards.state_dict()}

    def sample_images(
        self, table: EPDTable, prompts: Sequence[str], seeds: Sequence[int], sigmas: Tensor | None = None
    ) -> Images:
        """One image for each pair of a prompt and a seed, with one table [S, K] or with one for each [N, S, K].

        `sigmas`: noise levels for all [S + 1] or for each [N, S + 1], or None for the solver's.

        Runs in micro-batches of at most `max_rows` network rows; where the device's memory does not suffice they are
        halved, for this and all later calls. What the network says of their starts is kept for calls with another
        table. Differentiable in the numbers that require a gradient.

        Raises:
            InputError: the memory does not suffice for one image.
        """
        return self._images(table, prompts, seeds, sigmas, self._starts)

    def _images(
        self,
        table: EPDTable,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sigmas: Tensor | None,
        known: RecentTensors[Tensor] | None = None,
    ) -> Images:
        """See `sample_images`; `known` as `Solver.latents` takes it."""
        solver = self.solver.with_numbers(table, sigmas)
        numbers = (*table.columns().values(), *(() if sigmas is None else (sigmas,)))
        differentiable = torch.is_grad_enabled() and any(part.requires_grad for part in numbers)

        def sample(rows: slice) -> tuple[Tensor, Tensor]:
            with torch.set_grad_enabled(differentiable):
                return self._sample(solver.select(rows), prompts[rows], seeds[rows], known)

        parts = in_parts_that_fit(
            len(prompts), lambda: self._micro_batch(solver), sample, lambda images: self._halve(images, solver)
        )
        pixels, finite = zip(*parts, strict=True)
        return Images(torch.cat(pixels), tuple(prompts), torch.cat(finite).cpu())

    def noise_seed(self, step: int, prompt: int, member: int) -> int:
        """Seed of the initial noise of sample `member` of the step's prompt number `prompt`."""
        return derived_seed("initial noise", self.seed, step, prompt, 0 if self.shared_noise else member)

    def take_seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call: text, network, solver (without the network), decode, reward."""
        return self.clock.take()

    def state_dict(self) -> dict[str, Any]:
        """The reward's running statistics, and the limit of rows: the configured one and the one found to fit."""
        return {
            "reward": self.reward.state_dict(),
            "configured_max_rows": self._configured_max_rows,
            "max_rows": self.max_rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; a limit of rows that was configured anew since then wins over it."""
        self.reward.load_state_dict(state["reward"])
        if state["configured_max_rows"] == self._configured_max_rows and state["max_rows"] is not None:
            self._limit(operator.index(state["max_rows"]))

    def _sample(
        self, solver: Solver, prompts: Sequence[str], seeds: Sequence[int], known: RecentTensors[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """One micro-batch: images [n, 3, H, W], and which of them are finite [n]."""
        latents = solver.latents(
            self.denoiser, prompts, seeds, dtype=self.dtype, measure=self.clock.measure, known=known
        )
        with self.clock.measure("decode"):
            decoded = decode(self.denoiser, latents, self.decode_chunk_size)
            return decoded.images, decoded.fine

    def _micro_batch(self, solver: Solver) -> int:
        """Images that go through the solver together."""
        return max(1, self.max_rows // solver.rows_at_once)

    def _limit(self, rows: int) -> None:
        """From now on at most so many rows at once."""
        if rows < 1:
            raise ValueError(f"the limit of rows is {rows}")
        self.max_rows = rows
        if self._compiled_for is not None:
            self.compile_network(self._compiled_for)

    def _halve(self, images: int, solver: Solver) -> None:
        """Remember that `images` at once were too many."""
        if images == 1:
            raise InputError(
                f"the memory of {self.denoiser.device} does not suffice for one image: "
                f"free it, use a smaller model.dtype, or another device"
            )
        self._limit((images // 2) * solver.rows_at_once)
        log.warning(
            "out of memory with %d images at once: from now on %d (max_rows %d)", images, images // 2, self.max_rows
        )
        if self.denoiser.device.type == "cuda":
            torch.cuda.empty_cache()


def usual_rows(device: torch.device, latent_shape: tuple[int, int, int]) -> int:
    """Most rows of a network call where nobody says."""
    _, height, width = latent_shape
    return max(1, MOST_POSITIONS // (height * width)) if device.type == "cuda" else DEFAULT_MAX_ROWS
