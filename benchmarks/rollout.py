"""How fast a run's images come: the run's own path against a plain one, in one process, measured in pairs.

    python -m benchmarks.rollout --config training/ppo/cfgs/shapes.yaml

The plain path is what one writes first: float32 weights (under autocast where the run computes in half precision), the
K points of an interval one after another, texts encoded anew each time, images handed to the reward through Pillow.
"""

from __future__ import annotations

if __name__ == "__main__":
    from interrupts import end_at_once_on_signals

    end_at_once_on_signals()

import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from errors import shows_input_errors
from models import clip
from models.denoiser import Conditioning
from models.devices import gigabytes, resolve_dtype
from models.generate import initial_noise
from models.latent_diffusion import LatentDiffusion
from models.pictures import to_pixels
from models.registry import load_denoiser
from solvers import EPDTable, epd_sampler
from training.ppo.assembly import Parts, Start, build, costs, make_fabric, model_spec, prepare
from training.ppo.config import load_config, model_options
from training.ppo.rewards import RewardHPS
from training.ppo.rl_runner import RLRunner
from training.ppo.rollout import PromptBatch
from training.solver import Solver

PEAK_SIZE = {"cuda": 8192, "cpu": 1024}  # side of the square matrices whose product is timed
PEAK_REPEATS = 7


@dataclass(frozen=True)
class Work:
    """What both paths do: tables [N, S, K] on prompts, k tables for each, prompt-major.

    sigmas: noise levels of each [N, S + 1]; None where the run does not train them.
    """

    tables: EPDTable
    sigmas: Tensor | None
    prompts: PromptBatch


@dataclass(frozen=True)
class Timings:
    """Seconds of each repeat, paired, and how far apart the images of the last were."""

    fast: list[float]
    plain: list[float]
    largest_difference: float

    @property
    def ratio(self) -> float:
        """Median over the pairs of the plain path's time over the fast one's."""
        return statistics.median(plain / fast for plain, fast in zip(self.plain, self.fast, strict=True))


class PlainPath:
    """The plain path, for the same work; the scores are those of the first reward."""

    def __init__(self, runner: RLRunner, denoiser: LatentDiffusion, reward: RewardHPS, autocast: torch.dtype) -> None:
        """Sample as `runner` does, with a denoiser and a reward in float32 of its own, at `autocast` precision."""
        self.runner = runner
        self.denoiser = denoiser
        self.reward = reward
        self.autocast = autocast

    @torch.no_grad()
    def __call__(self, work: Work, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [N, 3, H, W] and their scores [N]."""
        size = self.runner.group_size
        texts = [text for text in work.prompts.texts for _ in range(size)]
        solver = self.runner.solver.with_numbers(work.tables, work.sigmas)
        images = []
        with self._precision():
            for start in range(0, len(texts), size):
                rows = slice(start, start + size)
                images.append(self._sample(solver.select(rows), texts[rows], seeds[rows]))
            pixels = torch.cat(images)
            return pixels, self._score(pixels, texts)

    def _precision(self) -> torch.autocast:
        enabled = self.autocast != torch.float32
        return torch.autocast(self.denoiser.device.type, self.autocast if enabled else None, enabled=enabled)

    def _sample(self, solver: Solver, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        device = self.denoiser.device
        conditioning = encode_anew(self.denoiser, prompts, solver.guidance_scale)
        noise = initial_noise(seeds, self.denoiser.latent_shape, device=device, dtype=torch.float32)
        latents = epd_sampler(
            lambda x, sigma, *guidance: self.denoiser.denoise(x, sigma, conditioning, *guidance),
            noise * solver.sigmas[..., 0].to(noise).view(-1, 1, 1, 1),
            solver.sigmas,
            solver.table.to(device=device),
            afs=solver.afs,
            parallel=False,
        )
        return self.denoiser.decode(latents, len(latents))

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score one image after another, through Pillow."""
        model, device = self.reward.model, self.reward.device
        size, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
        scores = []
        for picture, prompt in zip(to_pixels(pixels), prompts, strict=True):
            inputs = through_pillow(picture, size).to(device)
            tokens = clip.tokenize(self.reward.tokenizer, [prompt], length).to(device)
            features = clip.image_features(model, inputs[None]), clip.text_features(model, tokens)
            scores.append(functional.cosine_similarity(*features))
        return torch.cat(scores).float()


def encode_anew(denoiser: LatentDiffusion, prompts: Sequence[str], guidance_scale: float) -> Conditioning:
    """Every prompt and the empty one through the text encoder, whatever was encoded before."""
    (encoder,) = denoiser.text_encoders
    tokens = encoder.tokenizer([*prompts, ""], padding="max_length", max_length=encoder.limit, return_tensors="pt")
    hidden = encoder.module(tokens.input_ids.to(denoiser.device)).last_hidden_state
    text, without = ({"encoder_hidden_states": part} for part in (hidden[:-1], hidden[-1:]))
    return Conditioning(len(prompts), text, None if guidance_scale == 1.0 else without, guidance_scale)


def through_pillow(picture: np.ndarray, size: int) -> Tensor:
    """A picture, uint8 [H, W, 3], as CLIP's input [3, size, size]: resized and cropped by Pillow."""
    image = Image.fromarray(picture)
    factor = size / min(image.size)
    if factor != 1:
        width, height = (max(size, int(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    cropped = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    normalised = (cropped - np.float32(clip.IMAGE_MEAN)) / np.float32(clip.IMAGE_STD)
    return torch.from_numpy(normalised).movedim(-1, 0)


def network_flops(denoiser: LatentDiffusion, guidance_scale: float) -> int:
    """Floating-point operations of one evaluation of one image, both halves of the guidance; a multiply-add is two."""
    conditioning = denoiser.encode(["a"], guidance_scale)
    x = torch.zeros(1, *denoiser.latent_shape, device=denoiser.device)
    # The plain attention is counted: the fused kernels of some devices are unknown to the counter.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoiser.denoise(x, torch.tensor(1.0, dtype=torch.float64), conditioning)
    return counter.get_total_flops()


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product on this machine: the best of a few."""
    size = PEAK_SIZE.get(device.type, PEAK_SIZE["cpu"])
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(left, right)
    seconds = [timed(lambda: torch.mm(left, right), device)[0] for _ in range(PEAK_REPEATS)]
    return 2 * size**3 / min(seconds)


def timed(action: Callable[[], object], device: torch.device) -> tuple[float, object]:
    """Seconds until the device has finished, and what the action returned."""
    _wait(device)
    start = perf_counter()
    result = action()
    _wait(device)
    return perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on the GPU by torch, on the CPU by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_work(parts: Parts, images: int) -> Work:
    """Tables drawn from the run's policy, on the first of its prompts."""
    runner: RLRunner = parts.trainer.source
    with torch.no_grad():
        sample = parts.trainer.policy().sample(images, torch.Generator().manual_seed(0))
    return Work(sample.table(), sample.sigmas(), parts.trainer.prompts.take(images // runner.group_size))


def compare(runner: RLRunner, plain: PlainPath, work: Work, repeats: int) -> Timings:
    """Both paths in turn, once to warm up and then `repeats` times."""
    device = runner.denoiser.device
    groups = range(len(work.prompts))
    seeds = [runner.noise_seed(0, group, member) for group in groups for member in range(runner.group_size)]

    def fast() -> Tensor:
        images = runner.roll_out(work.tables, work.prompts, 0, work.sigmas)
        runner.score(images)
        return images.pixels

    fast(), plain(work, seeds)
    fast_seconds, plain_seconds, difference = [], [], 0.0
    for _ in range(repeats):
        seconds, pixels = timed(fast, device)
        fast_seconds.append(seconds)
        seconds, (plain_pixels, _) = timed(lambda: plain(work, seeds), device)
        plain_seconds.append(seconds)
        difference = (pixels - plain_pixels).abs().max().item()
    return Timings(fast_seconds, plain_seconds, difference)


def whole_steps(parts: Parts, repeats: int) -> dict[str, float]:
    """Seconds of a whole step of the run, by phase and under `step` in all: medians of a few steps, after a first."""
    rows = [parts.trainer.step() for _ in range(repeats + 1)][1:]
    names = [name for name in rows[0] if name.startswith("seconds/")]
    return {name.removeprefix("seconds/"): statistics.median(row[name] for row in rows) for name in names}


def report(start: Start, plain: PlainPath, timings: Timings, step: dict[str, float], fast_peak: int) -> list[str]:
    """The figures, one a line."""
    device, dtype = plain.denoiser.device, resolve_dtype(start.config.model.dtype)
    images, precision = start.config.ppo.rollout_batch_size, start.config.model.dtype
    fast_seconds, plain_seconds = statistics.median(timings.fast), statistics.median(timings.plain)
    # Counted where nothing is compiled.
    cost = costs(start)
    flops = network_flops(plain.denoiser, plain.runner.solver.guidance_scale) * cost.evaluations.total
    peak = matrix_peak(device, dtype)
    whole = step.pop("step")
    achieved = flops * (images - cost.spared_rows(start.config) / cost.evaluations.rows) / whole
    return [
        f"device {device}, {torch.get_num_threads()} threads, network in {precision}, {images} images a step",
        f"fast path: {fast_seconds:.3f} s, {images / fast_seconds:.2f} images/s (median of {len(timings.fast)})",
        f"plain path: {plain_seconds:.3f} s, {images / plain_seconds:.2f} images/s",
        f"plain over fast, median of the pairs: {timings.ratio:.2f}",
        f"largest difference of a pixel between the two: {timings.largest_difference:.2g}",
        f"a whole RL step: {whole:.3f} s: " + ", ".join(f"{name} {spent / whole:.1%}" for name, spent in step.items()),
        f"network: {flops / 1e9:.2f} GFLOP an image",
        f"achieved over the whole step: {achieved / 1e9:.1f} GFLOP/s",
        f"matrix products in {precision} reach {peak / 1e9:.1f} GFLOP/s here: the network's work is "
        f"{achieved / peak:.1%} of that",
        f"peak memory: {gigabytes(fast_peak)} before the plain path was loaded",
    ]


@click.command(epilog="Example:  python -m benchmarks.rollout --config training/ppo/cfgs/shapes.yaml --images 16")
@click.option("--config", "config_path", type=click.Path(path_type=Path), required=True, help="A run's configuration.")
@click.option("--override", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="May be repeated.")
@click.option("--images", type=click.IntRange(min=2), help="Of a step, updated at once. [ppo.rollout_batch_size]")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Pairs, and whole steps.")
@shows_input_errors
def main(config_path: Path, overrides: tuple[str, ...], images: int | None, repeats: int) -> None:
    """Time the rollout of a run's configuration, fast path against plain path, and whole steps of the run."""
    number = () if images is None else (f"ppo.rollout_batch_size={images}", f"ppo.minibatch_size={images}")
    start = prepare(load_config(config_path, [*overrides, *number, "logging.eval_interval=0"]))
    config = start.config
    fabric = make_fabric(config)
    parts = build(start, fabric)
    runner: RLRunner = parts.trainer.source
    step = whole_steps(parts, repeats)
    fast_peak = peak_memory(fabric.device)
    denoiser = load_denoiser(
        model_spec(config), device=fabric.device, dtype=torch.float32, options=model_options(config)
    )
    reward = RewardHPS(config.reward.weights_path, device=fabric.device, tokenizer_folder=config.reward.cache_dir)
    plain = PlainPath(runner, denoiser, reward, resolve_dtype(config.model.dtype))
    timings = compare(runner, plain, make_work(parts, config.ppo.rollout_batch_size), repeats)
    for line in report(start, plain, timings, step, fast_peak):
        click.echo(line)


if __name__ == "__main__":
    main()
