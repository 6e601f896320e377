"""The loop that the models of the shapes world are trained in: a falling learning rate, weight averaging,
checkpoints, resuming.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from errors import InputError, first_line, shows_input_errors
from files import replacing
from models.checkpoints import UNREADABLE, load_archive
from models.randomness import generator_of


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast to train.

    steps: optimiser steps. learning_rate: its peak. warmup_steps: linear rise from 0. decay_share: of the steps, at
    the end. averaging_decay: of the exponential moving average of the weights.
    checkpoint_interval, log_interval: steps. checkpoint: the file to write and to resume from.
    muon: move the matrices of transformer blocks by Muon (arXiv 2502.16982), all else by AdamW, as without it.
    """

    steps: int
    learning_rate: float
    checkpoint: Path
    warmup_steps: int = 100
    decay_share: float = 0.4
    weight_decay: float = 0.01
    averaging_decay: float = 0.999
    max_gradient_norm: float = 1.0
    checkpoint_interval: int = 250
    log_interval: int = 50
    muon: bool = False


@dataclass(frozen=True)
class TrainingRun:
    """What every training command is asked; see the options of `training_command`."""

    output: Path
    scratch: Path
    steps: int
    images: int
    batch: int
    learning_rate: float
    seed: int
    device: str


def training_command(
    *, output: str, steps: int, images: int, batch: int, learning_rate: float, seed: int
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a click command of a function of a `TrainingRun` and further options; the arguments are its defaults."""
    path = click.Path(path_type=Path)
    options = (
        click.option("--output", type=path, default=Path(output), help="What is written."),
        click.option("--scratch", type=path, default=Path("scratch/shapes"), help="Data and checkpoints."),
        click.option("--steps", type=click.IntRange(min=1), default=steps),
        click.option("--images", type=click.IntRange(min=8), default=images, help="Scenes to render and to train on."),
        click.option("--batch", type=click.IntRange(min=2), default=batch),
        click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=learning_rate),
        click.option("--seed", type=click.IntRange(0, 2**32), default=seed),
        click.option("--device", default="cpu"),
    )

    def decorate(function: Callable[..., None]) -> click.Command:
        @shows_input_errors
        @wraps(function)
        def command(**given: Any) -> None:
            function(TrainingRun(**{field.name: given.pop(field.name) for field in fields(TrainingRun)}), **given)

        for option in reversed(options):
            command = option(command)
        return click.command(context_settings={"show_default": True})(command)

    return decorate


def start_option(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option `--start`: `what` to start from in place of fresh weights."""
    return click.option("--start", type=click.Path(path_type=Path), help=f"{what} to start from. [fresh weights]")


def learning_rate_factor(step: int, options: TrainingOptions) -> float:
    """Linear warm-up, a plateau, and over the last `decay_share` of the steps a line down to 0.

    The plateau does not depend on the number of steps, so a run that is going well can be resumed with more of them,
    or cut short with fewer.
    """
    warm = min((step + 1) / options.warmup_steps, 1.0)
    left = (options.steps - step) / (options.decay_share * options.steps)
    return min(warm, left, 1.0)


def make_optimizers(model: nn.Module, options: TrainingOptions) -> list[torch.optim.Optimizer]:
    """What moves the parameters; learning rates are those of AdamW for all (Muon's steps are made as long as its)."""
    blocks = [
        weight
        for name, weight in model.named_parameters()
        if options.muon and weight.ndim == 2 and (".layers." in name or ".transformer_blocks." in name)
    ]
    taken = {id(weight) for weight in blocks}
    others = [weight for weight in model.parameters() if id(weight) not in taken]
    settings = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, foreach=True, **settings)]
    if blocks:
        optimizers.append(torch.optim.Muon(blocks, adjust_lr_fn="match_rms_adamw", **settings))
    return optimizers


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: they depend on seed and step alone, so that a resumed run repeats an
    uninterrupted one.
    """
    return generator_of(seed * 1_000_003 + step)


def fit(model: nn.Module, loss: Callable[[int], dict[str, Tensor]], options: TrainingOptions) -> nn.Module:
    """Train `model`; run the same command again to resume from the last checkpoint.

    Args:
        model: everything that is trained, in one module.
        loss: step -> named scalars; the entry `loss` is minimised, all are logged beside the checkpoint.
        options: see there.

    Returns:
        The module that holds the averaged weights.
    """
    # Buffers are copied: an average of whole numbers is rounded down, and positions in a text would drift.
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.averaging_decay))
    optimizers = make_optimizers(model, options)
    first = _resume(options.checkpoint, model, averaged, optimizers)
    log = options.checkpoint.with_suffix(".jsonl")
    start = time.monotonic()
    for step in tqdm(
        range(first, options.steps), initial=first, total=options.steps, desc=options.checkpoint.stem, mininterval=10
    ):
        for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            group["lr"] = options.learning_rate * learning_rate_factor(step, options)
        terms = loss(step)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.max_gradient_norm)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        # A young average would remember the random start: let its memory grow with the run.
        averaged.multi_avg_fn = get_ema_multi_avg_fn(min(options.averaging_decay, (1 + step) / (10 + step)))
        averaged.update_parameters(model)
        if (step + 1) % options.log_interval == 0:
            values = {name: float(value.detach()) for name, value in terms.items()}
            line = {"step": step + 1, **values, "gradient_norm": float(norm), "seconds": time.monotonic() - start}
            with log.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        if (step + 1) % options.checkpoint_interval == 0 or step + 1 == options.steps:
            _save(options.checkpoint, model, averaged, optimizers, step + 1)
    return averaged.module


def read_scratch(file: Path) -> Any:
    """What `torch.save` wrote to a file of `scratch`. Raises InputError where it is damaged."""
    try:
        return load_archive(file, mapped=False)
    except UNREADABLE as error:
        raise InputError(f"{file}: cannot be read ({first_line(error)}); remove it, and it is made anew") from error


def _save(
    file: Path, model: nn.Module, averaged: nn.Module, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    with replacing(file) as temporary:
        torch.save(state, temporary)


def _resume(file: Path, model: nn.Module, averaged: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """The step to go on from; 0 where there is no checkpoint."""
    if not file.exists():
        return 0
    state = read_scratch(file)
    if len(state.get("optimizers", ())) != len(optimizers):
        raise InputError(f"{file}: an earlier version wrote it, with another optimiser; remove it, and train anew")
    model.load_state_dict(state["model"])
    averaged.load_state_dict(state["averaged"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]
