"""What the three commands do, once their configuration is read: train the reward model, fine-tune, evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from errors import InputError
from files import only_writer, write_atomically
from models.devices import resolve_device
from models.pictures import as_png, contact_sheet, to_pixels
from models.pixel_diffusion import PixelDiffusion, load_pixel_diffusion, save_pixel_diffusion
from training.ddpm.comparison import Comparison, Judged, comparison_lines, require_finite
from training.ddpm.config import PREFERENCE, RENDERED, SAMPLED, DDPMConfig, judge_file, reward_file
from training.ddpm.data import ImageSet, Shares, read_folder, render_images, shares, to_unit
from training.ddpm.networks import merged, trained_copy
from training.ddpm.policy import DDIMSteps, DenoisingPolicy
from training.ddpm.report import evaluation_page
from training.ddpm.reward_model import load_classifier, save_classifier
from training.ddpm.reward_training import JUDGE, REWARD, RewardTrainer
from training.ddpm.rollout import ImageReward, sample_images, seeds_of
from training.ddpm.run import EVALUATE, FINETUNE, TRAIN_REWARD_MODEL, EpochRun, EpochTrainer, Look, Plan, Resumed
from training.ddpm.trainer import DDPMTrainer
from training.runs.configuration import to_yaml
from training.runs.events import EventFile
from training.runs.run_folder import RunFolder

FASTEST_LAYOUT = torch.channels_last  # of the networks' convolutions: on 2 cores a step of training takes 12% less
DDPM_ENTRIES = {"model_index.json", "scheduler", "unet"}  # of a folder that `save_pixel_diffusion` wrote
SHOWN = 3  # names in a message
FOLDER_SEED = 0  # with the run's own seed, what one run holds out would have trained another run's reward model

PreferenceReward = Callable[[DDPMConfig, torch.device], ImageReward]


def load_start(config: DDPMConfig) -> DenoisingPolicy:
    """The DDPM that everything starts from, on its device, with its steps laid out.

    Raises:
        InputError: the DDPM or the device is not there, or has fewer training steps than finetune.ddim_steps.
    """
    device = resolve_device(config.device)
    if device.type == "mps":
        raise InputError("device=mps: log-probabilities are summed in float64, which this device lacks; use cpu")
    model = load_pixel_diffusion(config.path.ddpm, config.path.architecture)
    model.network.requires_grad_(False).to(device, memory_format=FASTEST_LAYOUT)
    steps = DDIMSteps(model.alphas_cumprod, config.finetune.ddim_steps, config.finetune.eta)
    return DenoisingPolicy(model.network, model, steps)


def real_images(config: DDPMConfig, size: tuple[int, int]) -> ImageSet:
    """The real images at `size`, always the same ones for one configuration."""
    number = config.train_reward.num_img
    if config.path.real_img == RENDERED:
        return render_images(number, size, config.seed)
    return _folder_images(config, "path.real_img", config.path.real_img, size)


def heldout_real_images(config: DDPMConfig, size: tuple[int, int]) -> Tensor:
    """Real images [M, 3, H, W] in [0, 1] that neither classifier was trained on."""
    return to_unit(_shares(config, "path.real_img", real_images(config, size)).heldout)


def fake_images(config: DDPMConfig, start: DenoisingPolicy) -> ImageSet:
    """The generated images, read or drawn from the DDPM now."""
    if config.path.fake_img != SAMPLED:
        return _folder_images(config, "path.fake_img", config.path.fake_img, start.model.image_size)
    number, eta = config.train_reward.num_img, config.finetune.eta
    seeds = seeds_of("fake", config.seed, count=number)
    images = sample_images(start, seeds, config.eval.batch_size, doing="fake images")
    return ImageSet(
        (images * 255).round().byte(),
        (f"fake images: {number} drawn from {config.path.ddpm} in {len(start.steps)} steps, eta {eta:g}",),
    )


def _folder_images(config: DDPMConfig, key: str, folder: str, size: tuple[int, int]) -> ImageSet:
    settings = config.train_reward
    return read_folder(Path(folder), key, size, settings.num_img, threads=settings.num_workers, seed=FOLDER_SEED)


def train_reward_model(config: DDPMConfig, resumed: Resumed | None, *, overwrite: bool) -> None:
    """Train the reward model and the judge, and write them.

    Raises:
        InputError: an input cannot be used, or an output exists and `overwrite` was not asked for.
        Interrupted: a signal ended it before its end.
    """
    targets = {REWARD: reward_file(config), JUDGE: judge_file(config)}
    if config.path.rm and Path(config.path.rm).resolve() != Path(config.train_reward.save).resolve():
        raise InputError(
            f"train_reward.save={config.train_reward.save} is not the path.rm={config.path.rm} that finetune reads: "
            "leave path.rm at null, or give both the same path"
        )
    for path in targets.values():
        _refuse_existing(path, overwrite, folder=False)
    start = load_start(config)
    sets = {"path.real_img": real_images(config, start.model.image_size), "path.fake_img": fake_images(config, start)}
    for images in sets.values():
        for note in images.notes:
            click.echo(note)
    real, fake = (_shares(config, key, images) for key, images in sets.items())
    for key, part in zip(sets, (real, fake), strict=True):
        if part.copies:
            click.echo(f"{key}: {part.copies} images are equal to others and are left out")
    trainer = RewardTrainer(real, fake, config.train_reward, seed=config.seed, device=start.device)
    epochs = config.train_reward.num_epochs
    plan = Plan(epochs, max(1, epochs // 4), 0)
    folder = _trained(TRAIN_REWARD_MODEL, config, resumed, trainer, plan, None)
    for path in targets.values():
        _refuse_overtaken(path, overwrite, folder)
    for name, path in targets.items():
        heldout = trainer.heldout(name)
        save_classifier(path, trainer.classifiers[name], heldout)
        measures = ", ".join(
            f"{key.removeprefix('heldout_').replace('_', ' ')} {value:.3f}" for key, value in heldout.items()
        )
        click.echo(f"{name}: {path} (held out: {measures})")
        share, luck = trainer.chance()
        if heldout["heldout_accuracy"] < share + luck:
            click.echo(
                f"WARNING: the {name} classifier is near chance: one answer for all is right in {share:.3f} of "
                f"the held-out images, and luck adds up to {luck:.3f}. Tuning against it learns noise: take more "
                "images or epochs, or check that real and generated images differ"
            )


def finetune(config: DDPMConfig, resumed: Resumed | None, preference: PreferenceReward, *, overwrite: bool) -> None:
    """Fine-tune the DDPM and write it.

    Args:
        config: the configuration.
        resumed: a run to go on with, or None.
        preference: builds the reward for finetune.reward=preference.
        overwrite: whether an existing finetune.save may be replaced.

    Raises:
        InputError: an input cannot be used, training diverged, or the output exists.
        Interrupted: a signal ended it before its end.
    """
    target = Path(config.finetune.save)
    _refuse_existing(target, overwrite, folder=True)
    start = load_start(config)
    settings = config.finetune
    reward = _training_reward(config, start.device, preference)
    network = trained_copy(start.model.network, settings.lora_rank, config.seed)
    policy = DenoisingPolicy(network, start.model, start.steps)
    trainer = DDPMTrainer(policy, start, reward, settings, seed=config.seed)
    numbers, actions = sum(weight.numel() for weight in trainer.parameters), start.steps.num_actions
    click.echo(
        f"{numbers:,} trained numbers; {settings.episodes_per_epoch} images an epoch, of {len(start.steps)} steps, "
        f"{actions} of them actions"
    )
    observe = _watch(config, start, trainer, reward) if settings.eval_interval else None
    plan = Plan(settings.num_epochs, settings.save_interval, settings.eval_interval)
    folder = _trained(FINETUNE, config, resumed, trainer, plan, observe)
    seeds = seeds_of("last look", config.seed, count=settings.microbatch)
    drawn = sample_images(_policy_of_result(trainer, start), seeds, settings.microbatch)
    require_finite(drawn, "images of the fine-tuned DDPM")
    result = merged(trainer.result).to("cpu", memory_format=torch.contiguous_format)  # safetensors writes no other
    _refuse_overtaken(target, overwrite, folder)
    save_pixel_diffusion(result, start.model.scheduler_config, target)
    click.echo(f"fine-tuned DDPM: {target}")


@dataclass(frozen=True)
class Evaluation:
    """The images of the starting and of the fine-tuned DDPM, equal seeds in equal rows.

    Attributes:
        before: of the starting DDPM.
        after: of the fine-tuned one.
        real: real images that no classifier was trained on.
        fake: [M, 3, H, W], what the classifiers were taught to be generated; None where the starting DDPM draws it.
        metrics: `COMPARISON_METRICS`.
    """

    before: Judged
    after: Judged
    real: Judged
    fake: Tensor | None
    metrics: dict[str, float]


def compare(config: DDPMConfig, preference: PreferenceReward) -> Evaluation:
    """Hold the fine-tuned DDPM against the one it started from, on seeds that neither training nor its watch used.

    Raises:
        InputError: a model is missing, or the two DDPMs do not belong together.
    """
    start = load_start(config)
    tuned = _tuned(config, start)
    fake = None if config.path.fake_img == SAMPLED else to_unit(fake_images(config, start).images)
    reward = _training_reward(config, start.device, preference)
    comparison = _comparison(config, start, reward, "eval")
    network = tuned.network.to(start.device, memory_format=FASTEST_LAYOUT)
    after = comparison.judged(DenoisingPolicy(network, tuned, start.steps))
    return Evaluation(comparison.start, after, comparison.real, fake, comparison.against_start(after))


def evaluate(config: DDPMConfig, preference: PreferenceReward) -> None:
    """`compare`, with metrics, TensorBoard events, a page and samples/before_after.png in a new run folder.

    Raises:
        InputError: as `compare`, or the run folder cannot be written.
    """
    found = compare(config, preference)
    folder = RunFolder.create(config.path.runs, EVALUATE, to_yaml(config))
    write_atomically(folder.metrics, (json.dumps({"step": 0, **found.metrics}) + "\n").encode())
    images = {"start": found.before.images, "fine-tuned": found.after.images, "a real image": found.real.images}
    images |= {} if found.fake is None else {"a fake image": found.fake}
    picture, drawn = folder.samples / "before_after.png", side_by_side(images, config.eval.shown)
    write_atomically(picture, as_png(drawn))
    click.echo(f"{config.path.ddpm} -> {config.finetune.save}, {config.eval.num_img} images of equal seeds:")
    for line in comparison_lines(found.metrics):
        click.echo(line)
    events = EventFile(folder.logs, 0)
    events.scalars(found.metrics, 0)
    events.picture("before and after", np.asarray(drawn), 0)
    write_atomically(folder.report, evaluation_page(folder, config, found.metrics, images))
    click.echo(f"page: {folder.report}")
    click.echo(f"picture: {picture}")
    click.echo(f"numbers: {folder.metrics}")


def _tuned(config: DDPMConfig, start: DenoisingPolicy) -> PixelDiffusion:
    """The fine-tuned DDPM.

    Raises:
        InputError: there is none, or it does not belong to path.ddpm.
    """
    saved = Path(config.finetune.save)
    if not saved.exists():
        raise InputError(f"finetune.save={saved}: there is no fine-tuned DDPM; python -m scripts.finetune writes it")
    tuned, model = load_pixel_diffusion(str(saved)), start.model
    if tuned.image_size != model.image_size:
        raise InputError(f"{saved} makes images of {tuned.image_size}, and path.ddpm of {model.image_size}")
    if tuned.prediction_type != model.prediction_type or not torch.equal(tuned.alphas_cumprod, model.alphas_cumprod):
        raise InputError(
            f"{saved} has another noise schedule than path.ddpm={config.path.ddpm}: it was fine-tuned from another DDPM"
        )
    return tuned


def _training_reward(config: DDPMConfig, device: torch.device, preference: PreferenceReward) -> ImageReward:
    if config.finetune.reward == PREFERENCE:
        return preference(config, device)
    return load_classifier(reward_file(config), "path.rm", device)


def _comparison(config: DDPMConfig, start: DenoisingPolicy, reward: ImageReward, stream: str) -> Comparison:
    judge = load_classifier(judge_file(config), "path.judge", start.device)
    return Comparison(
        reward,
        judge,
        heldout_real_images(config, start.model.image_size),
        seeds=seeds_of(stream, config.seed, count=config.eval.num_img),
        batch_size=config.eval.batch_size,
        start=start,
    )


def _policy_of_result(trainer: DDPMTrainer, start: DenoisingPolicy) -> DenoisingPolicy:
    """The network that would be kept now, as a policy."""
    return DenoisingPolicy(trainer.result, start.model, start.steps)


def _watch(config: DDPMConfig, start: DenoisingPolicy, trainer: DDPMTrainer, reward: ImageReward) -> Callable[[], Look]:
    comparison = _comparison(config, start, reward, "watch")

    def observe() -> Look:
        now = comparison.judged(_policy_of_result(trainer, start))
        metrics = comparison.against_start(now)
        picture = side_by_side({"start": comparison.start.images, "now": now.images}, config.eval.shown)
        return metrics, np.asarray(picture)

    return observe


def _shares(config: DDPMConfig, key: str, images: ImageSet) -> Shares:
    """Who gets which images. Scenes are rendered anew for every seed; a folder is shared out alike for all of them."""
    seed = config.seed if config.path.real_img == RENDERED else FOLDER_SEED
    return shares(images.images, config.train_reward.heldout_share, seed, key)


def _trained(
    job: str,
    config: DDPMConfig,
    resumed: Resumed | None,
    trainer: EpochTrainer,
    plan: Plan,
    observe: Callable[[], Look] | None,
) -> RunFolder:
    """Train in a folder that no other process writes to meanwhile, which is returned."""
    folder = RunFolder.create(config.path.runs, job, to_yaml(config)) if resumed is None else resumed.folder
    with only_writer(folder.path):
        click.echo(f"run: {folder.path}")
        run = EpochRun(job, config, folder, trainer, plan, observe)
        if resumed is not None:
            run.load(resumed.state)
            write_atomically(folder.config, to_yaml(config).encode())
        run.run()
    return folder


def _refuse_existing(path: Path, overwrite: bool, *, folder: bool) -> None:
    """Refuse an output that exists and may not be replaced: even --overwrite removes no folder of other things."""
    if not path.exists():
        return
    if path.is_dir() != folder:
        kinds = ("file", "folder") if folder else ("folder", "file")
        raise InputError(f"{path}: is a {kinds[0]}, and a {kinds[1]} is to be written there; choose another path")
    others = sorted({entry.name for entry in path.iterdir()} - DDPM_ENTRIES) if folder else []
    if others:
        named = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        raise InputError(f"{path}: is a folder that holds more than a DDPM ({named}); it is never replaced")
    if not overwrite:
        raise InputError(f"{path}: exists already; --overwrite replaces it")


def _refuse_overtaken(path: Path, overwrite: bool, run: RunFolder) -> None:
    """Refuse an output that was not there when the run began."""
    if path.exists() and not overwrite:
        raise InputError(
            f"{path}: was written by somebody else while {run.path} trained, whose last checkpoint is kept: --resume "
            "it with --overwrite, or with another path by --override"
        )


def side_by_side(images: Mapping[str, Tensor], number: int) -> Image.Image:
    """The first images [N, 3, H, W] of each name, at most `number`, above and below each other."""
    number = min(number, *map(len, images.values()))
    rows = [list(to_pixels(ones[:number])) for ones in images.values()]
    return contact_sheet(rows, list(images), [f"image {column + 1}" for column in range(number)])
