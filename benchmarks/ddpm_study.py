"""Does fine-tuning a DDPM make it better? The second job for several seeds, judged by what was never trained on.

    python -m benchmarks.ddpm_study --cfg configs/shapes.yaml --seeds 3 --output outputs/ddpm_study

Every seed has a reward model, a judge, real images and a fine-tuning of its own. Beside the steps that it was
fine-tuned in, each DDPM is measured in five times as many: what else the same images could have been had for. Writes
table.md and before_after.png to the output folder. What is there already is kept: run the same command again to go on
after an interrupt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional

from errors import InputError, shows_input_errors
from files import write_atomically
from interrupts import goes_on_by
from models.asset_table import ROOT
from models.pictures import as_png, contact_sheet, to_pixels
from models.shapes import verify
from models.shapes.scenes import IMAGE_SIZE, MOST_OBJECTS
from scripts.preference import preference_reward
from training.ddpm.comparison import Judged, distances_to
from training.ddpm.config import RENDERED, SCHEMA, DDPMConfig, judge_file, reward_file
from training.ddpm.jobs import FINETUNE, TRAIN_REWARD_MODEL, compare, finetune, load_start, train_reward_model
from training.ddpm.run import Resumed, open_run
from training.measuring.statistics import Interval, bootstrap_indices
from training.ppo.rewards import RewardHPS
from training.runs.checkpoint import list_checkpoints, read_tensors, write_tensors
from training.runs.command_line import SeveralPairs
from training.runs.configuration import to_yaml

SHAPES_CLIP = ROOT / "weights" / "shapes_reward.pt"
VERIFIED = 128  # images of each kind that the verifier looks at
# Of an object in an enlarged image, root mean square in 0..255: of 40 scenes halved and enlarged again 95% stay below,
# of averages of two of them 2%.
LARGEST_MISFIT = 45.0
MORE_STEPS = 5  # times the steps of the fine-tuning


@dataclass(frozen=True)
class Measure:
    """A column of numbers, or a set of features that a Frechet distance to real images is taken of."""

    title: str
    key: str
    is_frechet: bool


MEASURES = (
    Measure("training reward", "reward", False),
    Measure("judge, never trained against", "judge", False),
    Measure("Fréchet distance, thumbnails of 4x4 pixels", "thumbnails", True),
    Measure("Fréchet distance, features of the shapes CLIP", "clip", True),
    Measure("share of images with nothing but whole shapes", "whole", False),
)


@dataclass(frozen=True)
class Change:
    """What fine-tuning did to one measure in one run.

    Attributes:
        before: of the starting DDPM.
        after: of the fine-tuned one.
        replicates: [R] float64, the difference over bootstrap draws of the images.
    """

    before: float
    after: float
    replicates: Tensor


def pooled(changes: Sequence[Change], generator: torch.Generator) -> Interval:
    """The mean difference of several runs with its 95% interval, by a bootstrap in two stages: runs, then their images.

    Of one run it is the bootstrap over its images. Of a few it is too narrow: n runs drawn anew spread less than n new
    runs would, by sqrt((n - 1) / n), and Student's tails are missing.
    """
    estimates = torch.tensor([change.after - change.before for change in changes], dtype=torch.float64)  # [n]
    spread = torch.stack([change.replicates - change.replicates.mean() for change in changes])  # [n, R]
    draws = spread.shape[1]
    runs = torch.randint(len(changes), (draws, len(changes)), generator=generator)
    images = torch.randint(draws, (draws, len(changes)), generator=generator)
    means = (estimates[runs] + spread[runs, images]).mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(estimates.mean().item(), low, high)


def values_of(measure: Measure, measured: Mapping[str, Any], name: str) -> Tensor:
    """Values, one an image, whose mean is the measure of some images, out of what `run_seed` kept."""
    values = measured[name][measure.key].double()
    return distances_to(measured["real"][measure.key].double(), values) if measure.is_frechet else values


def level_of(measure: Measure, measured: Mapping[str, Any], name: str) -> float | None:
    """The measure of some images; None for the distance of real ones to themselves."""
    return None if measure.is_frechet and name == "real" else values_of(measure, measured, name).mean().item()


def change_of(measure: Measure, measured: Mapping[str, Any]) -> Change:
    """Read one measure out of what `run_seed` kept."""
    before, after = (values_of(measure, measured, name) for name in ("before", "after"))
    indices = bootstrap_indices(len(before), torch.Generator().manual_seed(0))
    return Change(before.mean().item(), after.mean().item(), (after - before)[indices].mean(1))


def whole_shapes(images: Tensor) -> Tensor:
    """1 where the exact verifier sees one to seven objects in an image [N, 3, H, W] and explains each; else 0."""
    enlarged = functional.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True).clamp(0, 1)

    def is_whole(image: Tensor) -> bool:
        _, found = verify.find_objects(image)
        return 1 <= len(found) <= MOST_OBJECTS and all(item.misfit <= LARGEST_MISFIT for item in found)

    return torch.tensor([float(is_whole(image)) for image in enlarged])


def kept(judged: Judged, witness: Callable[[Tensor], Tensor] | None, shown: int) -> dict[str, Tensor]:
    """What the report needs of some images; `witness` gives the features of the shapes CLIP, in that world only."""
    values = {
        "reward": judged.reward,
        "judge": judged.judge,
        "thumbnails": judged.thumbnails,
        "pictures": torch.from_numpy(to_pixels(judged.images[:shown])),
    }
    if witness is not None:
        values |= {"clip": witness(judged.images), "whole": whole_shapes(judged.images[:VERIFIED])}
    return values


def shapes_witness(config: DDPMConfig) -> Callable[[Tensor], Tensor] | None:
    """Unit-length features by the shapes world's CLIP, which knows nothing of this job; None in another world."""
    if config.path.real_img != RENDERED:
        return None
    model = RewardHPS(SHAPES_CLIP, device="cpu", batch_size=config.eval.batch_size)
    return lambda images: functional.normalize(model.image_features(images), dim=1)


def begun(runs: Path, job: str) -> Resumed | None:
    """The newest run of a job that has a checkpoint."""
    with_checkpoints = [run for run in sorted(runs.glob(f"*-{job}")) if list_checkpoints(run / "checkpoints")]
    return open_run(with_checkpoints[-1], job, ()) if with_checkpoints else None


def seed_config(cfg: Path, overrides: Sequence[str], seed: int, folder: Path) -> DDPMConfig:
    """The configuration of one seed: everything that it writes lies in `folder`.

    Raises:
        InputError: it has faults, or the folder belongs to another configuration.
    """
    own = [
        f"seed={seed}",
        f"path.runs={folder / 'runs'}",
        f"train_reward.save={folder / 'reward.pt'}",
        f"finetune.save={folder / 'tuned'}",
        "path.rm=null",
        "path.judge=null",
    ]
    config = SCHEMA.load(cfg, [*overrides, *own]).config
    written, text = folder / "config.yaml", to_yaml(config)
    if written.exists() and written.read_text() != text:
        raise InputError(f"{folder}: was made with another configuration ({written}); choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(written, text.encode())
    return config


def in_more_steps(config: DDPMConfig) -> DDPMConfig:
    """The configuration with `MORE_STEPS` times the DDIM steps, up to the DDPM's training steps."""
    most = len(load_start(config).model.alphas_cumprod)
    steps = min(MORE_STEPS * config.finetune.ddim_steps, most)
    return replace(config, finetune=replace(config.finetune, ddim_steps=steps))


def run_seed(config: DDPMConfig, folder: Path) -> dict[str, Any]:
    """Train, fine-tune and measure one seed, as far as that has not been done yet."""
    runs, results = Path(config.path.runs), folder / "measured.pt"
    if not (reward_file(config).exists() and judge_file(config).exists()):
        train_reward_model(config, begun(runs, TRAIN_REWARD_MODEL), overwrite=True)
    if not Path(config.finetune.save).exists():
        finetune(config, begun(runs, FINETUNE), preference_reward, overwrite=False)
    if not results.exists():
        found, longer = (compare(each, preference_reward) for each in (config, in_more_steps(config)))
        parts = {"before": found.before, "after": found.after, "real": found.real}
        parts |= {"before_longer": longer.before, "after_longer": longer.after}
        keep = partial(kept, witness=shapes_witness(config))
        write_tensors(results, {name: keep(judged, shown=config.eval.shown) for name, judged in parts.items()})
    return read_tensors(results, "result of a study")


def table(seeds: Sequence[int], measured: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The result as a Markdown table, line by line: start -> fine-tuned: difference [95% interval]."""
    levels = {
        f"start, {MORE_STEPS} times the steps": "before_longer",
        f"fine-tuned, {MORE_STEPS} times the steps": "after_longer",
        "real images": "real",
    }
    titles = [*(f"seed {seed}" for seed in seeds), "all seeds", *levels]
    yield f"| | {' | '.join(titles)} |"
    yield "|---" * (len(titles) + 1) + "|"
    for measure in MEASURES:
        if measure.key not in measured[0]["before"]:
            continue
        changes = [change_of(measure, values) for values in measured]
        cells = [_cell([change]) for change in changes] + [_cell(changes)]
        cells += [_level([level_of(measure, values, name) for values in measured]) for name in levels.values()]
        yield f"| {measure.title} | {' | '.join(cells)} |"


def _level(levels: Sequence[float | None]) -> str:
    known = [level for level in levels if level is not None]
    return f"{sum(known) / len(known):.3f}" if known else ""


def _cell(changes: Sequence[Change]) -> str:
    before, after = (sum(values) / len(changes) for values in zip(*((c.before, c.after) for c in changes), strict=True))
    interval = pooled(changes, torch.Generator().manual_seed(0))
    difference = f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
    return f"{before:.3f} → {after:.3f}: {f'**{difference}**' if interval.excludes_zero else difference}"


def picture(seeds: Sequence[int], measured: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG file: for each seed the same noises before and after, and real images at the end."""
    named = [
        (f"seed {seed}, {name}", values[name]["pictures"])
        for seed, values in zip(seeds, measured, strict=True)
        for name in ("before", "after")
    ]
    named.append(("real", measured[0]["real"]["pictures"]))
    rows = [[image.numpy() for image in pictures] for _, pictures in named]
    columns = [str(column) for column in range(len(rows[0]))]
    return as_png(contact_sheet(rows, [name for name, _ in named], columns))


@click.command(cls=SeveralPairs, context_settings={"show_default": True})
@click.option("--cfg", type=click.Path(path_type=Path), default=Path("configs/shapes.yaml"), help="Configuration.")
@click.option("--override", "overrides", multiple=True, metavar="SECTION.KEY=VALUE ...", help="Of every seed.")
@click.option("--seeds", "number", type=click.IntRange(min=1), default=3, help="Seeds 0, 1, ... up to this many.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("outputs/ddpm_study"), help="Folder.")
@shows_input_errors
def main(cfg: Path, overrides: tuple[str, ...], number: int, output: Path) -> None:
    """Fine-tune and evaluate for several seeds, and write a table with intervals and a picture.

    \b
    python -m benchmarks.ddpm_study --cfg configs/shapes.yaml --seeds 3
    python -m benchmarks.ddpm_study --output outputs/no_kl --override finetune.kl_coef=0
    """
    seeds = range(number)
    folders = [output / f"seed-{seed}" for seed in seeds]
    configs = [seed_config(cfg, overrides, seed, folder) for seed, folder in zip(seeds, folders, strict=True)]
    with goes_on_by("the same command again"):
        measured = [run_seed(config, folder) for config, folder in zip(configs, folders, strict=True)]
    text = "\n".join(table(seeds, measured)) + "\n"
    write_atomically(output / "table.md", text.encode())
    write_atomically(output / "before_after.png", picture(seeds, measured))
    click.echo(f"{text}\nwritten to {output / 'table.md'} and {output / 'before_after.png'}")


if __name__ == "__main__":
    main()
