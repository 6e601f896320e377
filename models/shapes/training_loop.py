"""The loop that the models of the shapes world are trained in: a falling learning rate, weight averaging,
checkpoints, resuming; in several processes where torchrun started them, as if they were one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import SafetensorError
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from errors import InputError, shows_input_errors
from models.checkpoints import load_archive, write_archive
from models.devices import check_compiler, resolve_device
from models.randomness import generator_of
from models.shapes.data import reading_scratch


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast to train.

    steps: optimiser steps. learning_rate: its peak. warmup_steps: linear rise from 0. decay_share: of the steps, at
    the end. averaging_decay: of the exponential moving average of the weights.
    checkpoint_interval, log_interval: steps. checkpoint: the file to write and to resume from.
    settings: what a run that is resumed must have begun with, options of its command by their names.
    muon: move the matrices of transformer blocks by Muon (arXiv 2502.16982), all else by AdamW, as without it.
    """

    steps: int
    learning_rate: float
    checkpoint: Path
    settings: Mapping[str, float | str | None] = field(default_factory=dict)
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
    device: torch.device

    def options(self, checkpoint: str, paths: Mapping[str, Path | None], **others: Any) -> TrainingOptions:
        """How to train to the file `checkpoint` of `scratch`.

        paths: further options that a resumed run must have begun with. others: fields of `TrainingOptions`.
        """
        settings = {name: getattr(self, name) for name in ("images", "batch", "learning_rate", "seed")}
        settings |= {name: None if path is None else str(path) for name, path in paths.items()}
        return TrainingOptions(self.steps, self.learning_rate, self.scratch / checkpoint, settings, **others)


def training_command(
    *, output: str, steps: int, images: int, batch: int, learning_rate: float, seed: int, shared: bool = False
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a click command of a function of a `TrainingRun` and further options; the arguments are its defaults.

    shared: whether its batches are split by `own_share`, so that torchrun may start several processes of it.
    """
    of_file = bool(Path(output).suffix)
    written = click.Path(path_type=Path, file_okay=of_file, dir_okay=not of_file)
    folder = click.Path(path_type=Path, file_okay=False)
    options = (
        click.option("--output", type=written, default=Path(output), help="What is written."),
        click.option("--scratch", type=folder, default=Path("scratch/shapes"), help="Data and checkpoints."),
        click.option("--steps", type=click.IntRange(min=1), default=steps),
        click.option("--images", type=click.IntRange(min=8), default=images, help="Scenes to render and to train on."),
        click.option("--batch", type=click.IntRange(min=2), default=batch),
        click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=learning_rate),
        click.option("--seed", type=click.IntRange(0, 2**32), default=seed),
        click.option("--device", default="cpu", help="auto, cpu, cuda, cuda:N or mps."),
    )

    def decorate(function: Callable[..., None]) -> click.Command:
        @shows_input_errors
        @wraps(function)
        def command(**given: Any) -> None:
            given["device"] = resolve_device(given["device"])
            run = TrainingRun(**{one.name: given.pop(one.name) for one in fields(TrainingRun)})
            try:
                with joined(run, shared) as run:
                    function(run, **given)
            except SafetensorError as error:  # what its library says of a full disk
                raise InputError(f"{run.output}: cannot be written ({error})") from error

        for option in reversed(options):
            command = option(command)
        return click.command(context_settings={"show_default": True})(command)

    return decorate


@contextmanager
def joined(run: TrainingRun, shared: bool) -> Iterator[TrainingRun]:
    """Inside, this process is one of those that torchrun started, if it did; `run` with the device of this one.

    Raises InputError where batches are not `shared`, or not divisible.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        yield run
        return
    if not shared:
        raise InputError(f"torchrun started {processes} processes of this training, which runs in one: start it once")
    if run.batch % processes:
        raise InputError(f"--batch {run.batch} cannot be split over {processes} processes: take a multiple")
    if run.device.type == "cuda":
        run = replace(run, device=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    distributed.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
    try:
        yield run
    finally:
        distributed.destroy_process_group()


def start_option(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option `--start`: `what` to start from in place of fresh weights."""
    return click.option("--start", type=click.Path(path_type=Path), help=f"{what} to start from. [fresh weights]")


def compile_option(function: Callable[..., None]) -> Callable[..., None]:
    """The flag `--compile`, which is refused where there is no compiler; the function is told `compiled`."""

    @wraps(function)
    def checked(run: TrainingRun, compiled: bool, **others: Any) -> None:
        if compiled:
            check_compiler(run.device)
        function(run, compiled=compiled, **others)

    flag = click.option("--compile", "compiled", is_flag=True, help="Let torch.compile make the network's code.")
    return flag(checked)


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


def rank_and_processes() -> tuple[int, int]:
    """Which of the processes of this training this one is, and how many there are; 0 and 1 without torchrun."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def leads() -> bool:
    """Whether this is the process that writes."""
    return rank_and_processes()[0] == 0


def own_share(*drawn: Tensor) -> tuple[Tensor, ...]:
    """Of what was drawn for a step's whole batch [N, ...], alike in every process, this process's rows."""
    rank, processes = rank_and_processes()
    return tuple(rows[rank::processes] for rows in drawn)


def average_gradients(model: nn.Module) -> None:
    """Over the processes, in place: as if one had had the whole batch."""
    _, processes = rank_and_processes()
    if processes == 1:
        return
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(together.div_(processes))
    for gradient, averaged in zip(gradients, together.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))


def fit(model: nn.Module, loss: Callable[[int], dict[str, Tensor]], options: TrainingOptions) -> nn.Module:
    """Train `model`; run the same command again to resume from the last checkpoint.

    Args:
        model: everything that is trained, in one module.
        loss: step -> named scalars; the entry `loss` is minimised, all are logged beside the checkpoint.
        options: see there.

    Returns:
        The module that holds the averaged weights.

    Raises:
        InputError: the checkpoint is damaged or of another training, cannot be written, or the training diverges.
    """
    # Buffers are copied: an average of whole numbers is rounded down, and positions in a text would drift.
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.averaging_decay))
    optimizers = make_optimizers(model, options)
    first = _resume(options, model, averaged, optimizers)
    log = options.checkpoint.with_suffix(".jsonl")
    start = time.monotonic()
    for step in tqdm(
        range(first, options.steps),
        initial=first,
        total=options.steps,
        desc=options.checkpoint.stem,
        mininterval=10,
        disable=not leads(),
    ):
        for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            group["lr"] = options.learning_rate * learning_rate_factor(step, options)
        terms = loss(step)
        terms["loss"].backward()
        average_gradients(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.max_gradient_norm)
        if not norm.isfinite():
            raise InputError(
                f"step {step + 1}: the loss is {terms['loss']:g} and its gradient {norm:g}. Begin anew, with a smaller "
                "--learning-rate and another --scratch"
            )
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        # A young average would remember the random start: let its memory grow with the run.
        averaged.multi_avg_fn = get_ema_multi_avg_fn(min(options.averaging_decay, (1 + step) / (10 + step)))
        averaged.update_parameters(model)
        if leads() and (step + 1) % options.log_interval == 0:
            values = {name: float(value.detach()) for name, value in terms.items()}
            line = {"step": step + 1, **values, "gradient_norm": float(norm), "seconds": time.monotonic() - start}
            with log.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        if leads() and ((step + 1) % options.checkpoint_interval == 0 or step + 1 == options.steps):
            _save(options, model, averaged, optimizers, step + 1)
    return averaged.module


def _save(
    options: TrainingOptions,
    model: nn.Module,
    averaged: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    step: int,
) -> None:
    state = {
        "step": step,
        "settings": dict(options.settings),
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    write_archive(options.checkpoint, state)


def _resume(
    options: TrainingOptions, model: nn.Module, averaged: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> int:
    """The step to go on from; 0 where there is no checkpoint."""
    file = options.checkpoint
    if not file.exists():
        return 0
    with reading_scratch(file):
        state = load_archive(file, mapped=False)
        if len(state.get("optimizers", ())) != len(optimizers):
            raise InputError(f"{file}: an earlier version wrote it, with another optimiser; remove it, and train anew")
        changed = {
            name: value for name, value in state.get("settings", {}).items() if options.settings.get(name) != value
        }
        if changed:
            asked = {name: options.settings.get(name) for name in changed}
            raise InputError(
                f"{file}: began with {_told(changed)}, not {_told(asked)}: go on as it began, or begin anew with "
                "another --scratch"
            )
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["step"]


def _told(settings: Mapping[str, float | str | None]) -> str:
    """Settings as options of a command line."""
    options = ((f"--{name.replace('_', '-')}", value) for name, value in settings.items())
    return ", ".join(f"no {name}" if value is None else f"{name} {value}" for name, value in options)
