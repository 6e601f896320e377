"""Whether a solver of its own for each prompt would pay: what the best choice by prompt gains on other noise.

    python -m benchmarks.per_prompt

Every prompt is drawn from several noises by one solver at several schedules and guidance scales. The pair of both that
is best for each prompt is guessed by half of its noises and scored on the other half, and the other way round; beside
it the one pair that is best for all prompts, chosen in the same way. What the first is ahead is what a table
conditioned on the prompt could learn of these choices, had it seen the very prompts. Last the best pair for each image,
which is no choice that can be made: it has seen the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from errors import shows_input_errors
from models.denoiser import Denoiser
from models.generate import decode
from models.prompts import first_prompts
from models.randomness import generator_of
from models.registry import load_denoiser
from training.measuring.statistics import bootstrap_indices, mean_interval
from training.ppo.rewards import Reward, load_reward
from training.solver import Schedule, Solver, classical_solvers

WORLD, REWARD = "shapes", "weights/shapes_reward.pt"
PROMPTS = Path("src/prompts/shapes_heldout.csv")
SCHEDULES = [Schedule("discrete", 1.0, first) for first in (None, 7.0, 5.0)]
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.5)
BATCH = 32


def chosen(scores: Tensor) -> tuple[dict[str, Tensor], float]:
    """What each choice scores, by scores [options, prompts, noises], an even number of noises.

    What a half of the noises shows of the interaction of prompt and option is shrunk by its split-half reliability, the
    best linear guess of what it is, and the other half scores what is chosen by it.

    Returns:
        Scores [prompts] by choice, and the reliability: of the variance of what a half shows, the share that the other
        half shows too, at least 0.
    """
    halves = scores.unflatten(-1, (2, -1)).mean(-1)  # [options, prompts, 2]
    means = halves.mean(1, keepdim=True)
    interaction = halves - means
    interaction = interaction - interaction.mean(0)
    reliability = (interaction.prod(-1).mean() / interaction.square().mean()).clamp_min(0)

    def score(guessed: Tensor) -> Tensor:
        best = guessed.argmax(0, keepdim=True).expand(1, *halves.shape[1:])
        return halves.flip(-1).gather(0, best)[0].mean(-1)

    choices = {"for all": score(means), "by prompt": score(means + reliability * interaction)}
    return choices | {"by image": scores.amax(0).mean(-1)}, reliability.item()


@torch.no_grad()
def reward_scores(
    denoiser: Denoiser, reward: Reward, solvers: Sequence[Solver], prompts: Sequence[str], noises: int
) -> Tensor:
    """What the reward says of every solver's images, float64 [solvers, prompts, noises]; all from the same noises."""
    told = [prompt for prompt in prompts for _ in range(noises)]
    parts = [slice(start, start + BATCH) for start in range(0, len(told), BATCH)]

    def scored(solver: Solver, part: slice) -> Tensor:
        latents = solver.latents(denoiser, told[part], range(len(told))[part])
        return reward.score(decode(denoiser, latents).images, told[part]).double().cpu()

    rows = [torch.cat([scored(solver, part) for part in parts]) for solver in tqdm(solvers, desc="solvers")]
    return torch.stack(rows).unflatten(1, (len(prompts), noises))


@click.command(
    epilog="Example:  OMP_NUM_THREADS=1 python -m benchmarks.per_prompt --nfe 4",
    context_settings={"show_default": True},
)
@click.option("--nfe", type=click.IntRange(min=1), default=3, help="Evaluations.")
@click.option("--number", type=click.IntRange(min=2), default=48, help="Prompts.")
@click.option("--pairs", type=click.IntRange(min=1), default=4, help="Of noises, for each prompt.")
@shows_input_errors
def main(nfe: int, number: int, pairs: int) -> None:
    """Say whether a schedule and guidance of its own for each prompt pay: scores, and differences to one for all."""
    denoiser = load_denoiser(WORLD, device="cpu", dtype=torch.float32)
    reward = load_reward(REWARD, device="cpu", batch_size=BATCH)
    classical = classical_solvers(["dpmpp:2"], [nfe], SCHEDULES, note=click.echo)
    solvers = [solver.guided(scale).on(denoiser) for solver in classical for scale in GUIDANCES]
    scores = reward_scores(denoiser, reward, solvers, first_prompts(PROMPTS, number), 2 * pairs)
    choices, reliability = chosen(scores)
    indices = bootstrap_indices(number, generator_of(0))
    click.echo(f"reliability of what prompts differ in: {reliability:.2f}")
    for name, found in choices.items():
        gain = mean_interval(found - choices["for all"], indices)
        click.echo(f"{name:<10} {found.mean():.4f}  {gain.estimate:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]")


if __name__ == "__main__":
    main()
