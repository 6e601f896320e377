"""The first hour on a GPU in one command: how fast everything is there, in shares of what the machine can do.

    python -m benchmarks.gpu_hour --model sd15

Where a model's weights or its reward's are not there, random ones of their size take the same time. Each part is kept
as it ends, and the same command goes on with what is left. On a CPU the same parts run smaller.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import click
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.budget import KNOWN, loaded
from benchmarks.evaluation_cost import Cost, configuration_of
from benchmarks.rehearse_sd15 import forget_peak, own_peak
from errors import InputError, first_line, shows_input_errors
from files import write_atomically
from models import clip, load_denoiser
from models.asset_table import HPS, ROOT
from models.denoiser import Denoiser
from models.devices import DTYPES, check_compiler, gigabytes, resolve_device
from models.generate import conditioned, decode
from models.loading import quiet_and_repeatable, read_json
from models.options import AS_IT_IS
from models.pictures import to_pixels
from models.registry import SHAPES_WORLD
from training.image_folder import DECODED_AT_ONCE
from training.ppo.cold_start import TRAINED, prepare_table
from training.ppo.config import Config, PPOConfig
from training.ppo.rewards import RewardHPS, WeightedMix
from training.ppo.rewards.clip_scorer import FeatureScorer
from training.ppo.rl_runner import RLRunner
from training.ppo.rollout import PromptStream
from training.ppo.search import Search, method_called
from training.solver import Solver, classical_solver, parse_schedule
from training.starts import NEAR_EULER, start_table

SCHEDULE = parse_schedule("polynomial")
REWARDS = dict.fromkeys(SHAPES_WORLD, ROOT / "weights" / "shapes_reward.pt")
DRAWN_STEPS = 11  # grid points of the images that sample.py draws beside diffusers
STOCK = "ldm"  # the family of diffusers' StableDiffusionPipeline

Figures = dict[str, Any]
"""What a part found: numbers by what they are, and for a phase its shares of the time and of the peak."""


class Size(NamedTuple):
    """How much is done: images a step and of a prompt, repeats, number types, batches, side of the matrices."""

    images: int
    group: int
    repeats: int
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    matrix: int


SIZES = {
    "cuda": Size(32, 4, 2, ("float16", "bfloat16"), (1, 4, 16), 8192),
    "cpu": Size(4, 2, 1, ("float32",), (1, 4), 1024),
}


class NoWords(NamedTuple):
    """A tokenizer to which every text is its end alone."""

    eos_token_id: int

    def __call__(self, texts: Sequence[str], **_options: object) -> dict[str, list[list[int]]]:
        """Tokens of each text."""
        return {"input_ids": [[self.eos_token_id]] * len(texts)}


class RandomHPS(RewardHPS):
    """A CLIP of HPS v2.1's size that was never trained."""

    def __init__(self, device: torch.device, amp_dtype: torch.dtype | None) -> None:
        """On the device from the start."""
        with device:
            model = clip.new_clip(read_json(clip.VIT_H_14))
        tokenizer = NoWords(model.config.text_config.vocab_size - 1)
        FeatureScorer.__init__(self, "random", model, tokenizer, device=device, amp_dtype=amp_dtype)


@dataclass
class World:
    """A model and a reward in one number type, and what their calls are worth in operations."""

    model: str
    device: torch.device
    dtype: torch.dtype
    size: Size
    peak: float = torch.nan
    """Operations a second of a large matrix product."""

    @cached_property
    def denoiser(self) -> Denoiser:
        """The model, with random weights where its own are not there."""
        try:
            return load_denoiser(self.model, device=self.device, dtype=self.dtype)
        except InputError as error:
            if self.model not in KNOWN:
                raise
            click.echo(f"random weights in place of {self.model}'s: {first_line(error)}")
            return loaded(configuration_of(self.model), AS_IT_IS, self.dtype, self.device)[0]

    @cached_property
    def reward(self) -> RewardHPS:
        """The usual one of the model, likewise; in half precision where the model is."""
        amp = None if self.dtype == torch.float32 else self.dtype
        file = REWARDS.get(self.model, ROOT / HPS["v2.1"].path)
        if self.model in REWARDS or file.is_file():
            return RewardHPS(file, device=self.device, amp_dtype=amp)
        click.echo(f"random weights in place of {file.name}, which is not there")
        return RandomHPS(self.device, amp)

    @cached_property
    def cost(self) -> Cost:
        """Operations of a row of the network, of a decoding and of a text."""
        return Cost.of(self.model, AS_IT_IS, self.dtype)

    @cached_property
    def scoring(self) -> int:
        """Operations of the reward of an image."""
        height, width = self.denoiser.image_size
        image = torch.rand(1, 3, height, width, device=self.device)
        self.reward.score(image, ["a"])  # reads the prompt
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.reward.score(image, ["a"])
        return counter.get_total_flops()

    def seconds(self, action: Callable[[], object]) -> float:
        """Until the device is done."""
        self.wait()
        start = perf_counter()
        action()
        self.wait()
        return perf_counter() - start

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget_memory(self) -> None:
        """Let `memory` count from here on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            forget_peak()

    def memory(self) -> str:
        """Most bytes held since `forget_memory`: on a GPU by torch, on a CPU by this process."""
        on_gpu = self.device.type == "cuda"
        return gigabytes(torch.cuda.max_memory_allocated(self.device) if on_gpu else own_peak())

    def share(self, operations: float, seconds: float) -> float:
        """Of the peak."""
        return operations / seconds / self.peak if seconds > 0 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def peak(world: World) -> Figures:
    """What a large matrix product reaches."""
    side = world.size.matrix
    left, right = (torch.randn(side, side, device=world.device).to(world.dtype) for _ in range(2))
    spent = min(world.seconds(lambda: torch.mm(left, right)) for _ in range(7))
    return {"TFLOP/s": 2 * side**3 / spent / 1e12}


@torch.no_grad()
def network(
    world: World, *, layout: torch.memory_format = torch.channels_last, tried: bool = False, compiled: bool = False
) -> Figures:
    """The network alone, at as many rows as at an interval's start of a step: two an image.

    tried: cuDNN tries its algorithms on the first call, and takes the fastest.
    """
    denoiser, rows = world.denoiser, 2 * world.size.images
    nn.Module.to(denoiser.network, memory_format=layout)
    try:
        if compiled:
            denoiser.compile_network([rows])
        ask = conditioned(denoiser, denoiser.encode([f"picture {row}" for row in range(rows)], 1.0))
        x = torch.randn(rows, *denoiser.latent_shape, device=world.device)
        level = torch.tensor(denoiser.sigma_max, dtype=torch.float64)
        with torch.backends.cudnn.flags(enabled=True, benchmark=tried):  # off unless said
            first, *spent = [world.seconds(lambda: ask(x, level)) for _ in range(1 + 2 * world.size.repeats)]
    finally:
        nn.Module.to(denoiser.network, memory_format=torch.channels_last)
    seconds = statistics.median(spent)
    share = world.share(rows * world.cost.row, seconds)
    return {"ms a row": 1000 * seconds / rows, "of peak": share, "first s": first, "memory": world.memory()}


def trainer_of(world: World, intervals: int, points: int, *, compiled: bool) -> Search:
    """PPO of an untrained table, or without points of iPNDM's history and grid."""
    denoiser, size = world.denoiser, world.size
    sigmas = SCHEDULE.sigmas(intervals + 1, denoiser)
    train = [*TRAINED] if points else ["grid", "history"]
    table = prepare_table(start_table(NEAR_EULER if points else "ipndm", sigmas, points), train).table
    solver = Solver("epd", "epd", intervals + 1, table=table, schedule=SCHEDULE).on(denoiser)
    config = Config(
        ppo=PPOConfig(rollout_batch_size=size.images, minibatch_size=size.images, rloo_k=size.group, train=train)
    )
    runner = RLRunner(
        denoiser,
        solver,
        WeightedMix({"reward": (world.reward, 1.0)}),
        group_size=size.group,
        shared_noise=True,
        seed=0,
    )
    if compiled:
        runner.compile_network(size.images)
    ppo = method_called("ppo")
    stream = PromptStream([f"picture {number}" for number in range(10_000)], shuffle=False, seed=0)
    return ppo.make_search(ppo.make_policy(solver, config), runner, stream, config)


def step(world: World, intervals: int, points: int, *, compiled: bool) -> Figures:
    """A whole step of RL, and its phases: the time that each takes of it, and its share of the peak meanwhile."""
    trainer = trainer_of(world, intervals, points, compiled=compiled)
    first, *rows = [trainer.step() for _ in range(1 + world.size.repeats)]
    taken = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name.startswith("seconds/")}
    images, cost, whole = world.size.images, world.cost, taken["seconds/step"]
    solver = trainer.source.solver
    shared = (images - images // world.size.group) * solver.first_rows  # a prompt's images begin alike
    operations = {
        "network": (images * solver.evaluations.rows - shared) * cost.row,
        "decode": images * cost.decoding,
        "reward": images * world.scoring,
        "text": images / world.size.group * cost.text,
    }
    phases = {
        phase: {
            "of the time": taken[f"seconds/{phase}"] / whole,
            "of peak": world.share(done, taken[f"seconds/{phase}"]),
        }
        for phase, done in operations.items()
    }
    return {
        "s": whole,
        "images/s": images / whole,
        "of peak": world.share(sum(operations.values()), whole),
        **phases,
        "rest": {"of the time": 1 - sum(shares["of the time"] for shares in phases.values()), "of peak": 0.0},
        "first s": first["seconds/step"],
        "memory": world.memory(),
    }


@torch.no_grad()
def sampling(world: World, batch: int, *, compiled: bool) -> Figures:
    """Images a second by the road of sample.py, and by diffusers' own pipeline as it comes, in turn.

    Both are given their texts encoded.
    """
    denoiser = world.denoiser
    solver = classical_solver("ddim", DRAWN_STEPS, SCHEDULE).on(denoiser)
    prompts, seeds = [f"picture {row}" for row in range(batch)], range(batch)
    pipe = stock(denoiser) if denoiser.backend == STOCK else None
    text = denoiser.encode(prompts, solver.guidance_scale)
    if compiled:
        denoiser.compile_network([batch * solver.rows_at_start])

    def ours() -> None:
        to_pixels(decode(denoiser, solver.latents(denoiser, prompts, seeds), DECODED_AT_ONCE).images)

    def theirs() -> None:
        (without,), (with_text,) = text.unconditional.values(), text.text.values()
        with torch.compiler.set_stance("force_eager"):
            pipe(
                prompt_embeds=with_text,
                negative_prompt_embeds=without.expand_as(with_text),
                num_inference_steps=DRAWN_STEPS - 1,
                guidance_scale=solver.guidance_scale,
                output_type="np",
            )

    figures: Figures = {"first s": world.seconds(ours)}
    if pipe is None:
        figures["images/s"] = batch / statistics.median(world.seconds(ours) for _ in range(1 + world.size.repeats))
        return figures
    theirs()
    pairs = [(world.seconds(ours), world.seconds(theirs)) for _ in range(1 + world.size.repeats)]
    mine, stocks = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(stock_time / own for own, stock_time in pairs)
    return figures | {"images/s": batch / mine, "diffusers images/s": batch / stocks, "times as fast": ratio}


def stock(denoiser: Denoiser) -> DiffusionPipeline:
    """Diffusers' own pipeline of the same modules."""
    with quiet_and_repeatable():
        from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline(
        vae=denoiser.vae,
        text_encoder=denoiser.text_encoders[0].module,
        tokenizer=None,
        unet=denoiser.network,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts_of(size: Size, dtype: str) -> dict[str, Callable[[World], Figures]]:
    """By name and in their order: what is compiled stays so, and comes last."""
    first = dtype == size.dtypes[0]
    steps = list(itertools.product((10, 3), (2, 0)))
    parts: dict[str, Callable[[World], Figures]] = {"peak": peak}
    for mode, compiled in (("eager", False), ("compiled", True)):
        parts[f"network/{mode}"] = partial(network, compiled=compiled)
        if first and not compiled:
            parts["network/contiguous"] = partial(network, layout=torch.contiguous_format)
            parts["network/tried"] = partial(network, tried=True)
        for intervals, points in steps:
            name = f"step/{mode}/{intervals} intervals, K={points}"
            parts[name] = partial(step, intervals=intervals, points=points, compiled=compiled)
        for batch in size.batches[: 2 if compiled else None] if first else ():  # few images are replayed as graphs
            parts[f"sample/{mode}/{batch}"] = partial(sampling, batch=batch, compiled=compiled)
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# The command


def measured(model: str, device: torch.device, size: Size, file: Path, ends: float) -> Iterator[tuple[str, Figures]]:
    """Every part that is kept in the file, or is run until the clock says `ends`, and its figures.

    Raises InputError where the file is of another model or machine.
    """
    setting = {"model": model, "device": _named(device), "torch": torch.__version__, "size": list(size)}
    setting = json.loads(json.dumps(setting))
    kept = read_json(file) if file.is_file() else {"setting": setting, "parts": {}}
    if kept.get("setting") != setting:
        raise InputError(f"{file}: holds figures of {kept.get('setting')}, not of {setting}: name another --output")
    for dtype in size.dtypes:
        world = World(model, device, DTYPES[dtype], size)
        for name, part in parts_of(size, dtype).items():
            place = f"{dtype}/{name}"
            if place not in kept["parts"]:
                if perf_counter() > ends:
                    return
                world.forget_memory()
                click.echo(f"{place} ...")
                try:
                    kept["parts"][place] = part(world)
                except RuntimeError as error:  # of the memory or the compiler: other parts may do
                    if name == "peak":
                        raise
                    click.echo(f"{place} failed: {first_line(error)}")
                    continue
                write_atomically(file, (json.dumps(kept, indent=1) + "\n").encode())
            if name == "peak":
                world.peak = 1e12 * kept["parts"][place]["TFLOP/s"]
            yield place, kept["parts"][place]


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"


def table(found: Mapping[str, Figures]) -> Iterator[str]:
    """A table for each kind of part; of a phase of a step, its share of the time, and of the peak meanwhile."""
    kinds = sorted({name.split("/")[1] for name in found}, key=["peak", "network", "step", "sample"].index)
    for kind in kinds:
        rows = {name: figures for name, figures in found.items() if name.split("/")[1] == kind}
        columns = list(next(iter(rows.values())))
        yield f"\n{kind:<42}" + "".join(f"{column:>20}" for column in columns)
        for name, figures in rows.items():
            yield f"{name:<42}" + "".join(f"{_shown(column, figures[column]):>20}" for column in columns)


def _shown(column: str, value: object) -> str:
    if isinstance(value, dict):
        return f"{value['of the time']:.1%}, {value['of peak']:.1%}"
    if isinstance(value, str):
        return value
    return f"{value:.1%}" if column == "of peak" else f"{value:.3g}"


@click.command(epilog="Example:  python -m benchmarks.gpu_hour --model sd15")
@click.option("--model", default="sd15", show_default=True, help=f"{', '.join(KNOWN)}, shapes, or a pipeline's folder.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--minutes", type=click.FloatRange(min=0), default=8, show_default=True, help="After so many no part is begun."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("outputs/gpu_hour.json"),
    show_default=True,
    help="Where the figures are kept; name another file to measure again.",
)
@shows_input_errors
def main(model: str, device: str, minutes: float, output: Path) -> None:
    """Time the peak, the network, whole steps of RL and sample.py's road; the same command goes on where it stopped."""
    on = resolve_device(device)
    if on.type not in SIZES:
        raise InputError(f"--device {device}: cuda or cpu are measured")
    check_compiler(on)
    output.parent.mkdir(parents=True, exist_ok=True)
    size = SIZES[on.type]
    found = dict(measured(model, on, size, output, perf_counter() + 60 * minutes))
    click.echo(f"{model} on {_named(on)}, torch {torch.__version__}")
    for line in table(found):
        click.echo(line)
    left = sum(len(parts_of(size, dtype)) for dtype in size.dtypes) - len(found)
    click.echo(f"\n{f'{left} parts are left: the same command goes on' if left else 'all parts'}; {output}")


if __name__ == "__main__":
    main()
