"""A run of either training command from its first epoch to its last: what is written, and how it is resumed."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from errors import InputError
from interrupts import Interrupted, Interrupts
from training.ddpm.comparison import comparison_lines
from training.ddpm.config import SCHEMA, DDPMConfig
from training.ddpm.reward_training import RewardTrainer
from training.ddpm.trainer import DDPMTrainer
from training.runs.checkpoint import CheckpointFormat, fitting, newest_checkpoint, step_path
from training.runs.configuration import config_hash, refuse_changes, to_plain
from training.runs.record import RunRecord
from training.runs.run_folder import RunFolder

TRAIN_REWARD_MODEL, FINETUNE, EVALUATE = "train_reward_model", "finetune", "eval"
CHECKPOINT = CheckpointFormat("the DDPM job", 1, frozenset({"job", "step", "trainer", "config", "config_hash"}))


FIXED_FILES = ("path.real_img", "path.fake_img", "path.ddpm", "path.architecture", "path.rm", "path.preference")
FIXED = (
    *FIXED_FILES,
    "seed",
    "finetune.ddim_steps",
    "finetune.eta",
    "finetune.lora_rank",
    "finetune.reward",
    "finetune.prompt",
    "train_reward.num_img",
    "train_reward.num_noise",
    "train_reward.heldout_share",
    "train_reward.width",
)
"""What a resumed run must have as it began: what is trained, on which data (drawn fakes too), for which reward."""


EpochTrainer = RewardTrainer | DDPMTrainer
"""What a run drives."""

Look = tuple[dict[str, float], np.ndarray]
"""What a look at a run says: `COMPARISON_METRICS`, and a picture, uint8 [H, W, 3]."""


@dataclass(frozen=True)
class Plan:
    """How long a run goes on.

    Attributes:
        epochs: in all, resumed parts included.
        save_interval: epochs between checkpoints.
        observe_interval: epochs between observations; 0: none.
    """

    epochs: int
    save_interval: int
    observe_interval: int


@dataclass(frozen=True)
class Resumed:
    """A run to go on with: its configuration with the overrides, its folder and its checkpoint."""

    config: DDPMConfig
    folder: RunFolder
    state: dict[str, Any]


def open_run(source: Path, job: str, overrides: tuple[str, ...]) -> Resumed:
    """Find a run by its folder or by one of its checkpoints.

    Raises:
        InputError: there is none, it belongs to the other command, its checkpoint is corrupt, or an override changes
            what a run is made of (`FIXED`).
    """
    folder = RunFolder.open(source)
    state = CHECKPOINT.load(source if source.suffix == ".pt" else newest_checkpoint(folder.checkpoints))
    if str(state["job"]) != job:
        raise InputError(f"{folder.path}: is a run of scripts.{state['job']!s:.40}; resume it with that command")
    before = SCHEMA.build(state["config"], str(folder.path)).config
    config = SCHEMA.load(folder.config, overrides, before=to_plain(before)).config  # it may have been cut off
    read = {"train_reward.save"} if job == FINETUNE else set()  # the reward model, where path.rm is null
    refuse_changes(before, config, (*FIXED, *read), (*FIXED_FILES, *read), folder.path)
    return Resumed(config, folder, state)


class EpochRun:
    """Trains to the last epoch, or until it is interrupted; can be gone on with from every checkpoint."""

    def __init__(
        self,
        job: str,
        config: DDPMConfig,
        folder: RunFolder,
        trainer: EpochTrainer,
        plan: Plan,
        observe: Callable[[], Look] | None = None,
    ) -> None:
        """Nothing is written before `run`.

        Args:
            job: name of the command.
            config: kept with every checkpoint.
            folder: of the run.
            trainer: what is driven.
            plan: how long.
            observe: called before the first epoch, where `plan` says, and after the last.
        """
        self.job, self.config, self.folder, self.trainer, self.plan = job, config, folder, trainer, plan
        self._observe = observe if plan.observe_interval else None
        self._record = RunRecord(folder, "epoch")

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; from that of the last epoch, only what comes after training is done.

        Raises:
            InputError: the run has gone further than it is to go, or the checkpoint does not fit.
        """
        if state["step"] > self.plan.epochs:
            raise InputError(
                f"{self.folder.path}: has gone through {state['step']} epochs, and num_epochs={self.plan.epochs} asks "
                "for fewer; raise num_epochs, or resume from one of its earlier checkpoints"
            )
        with fitting(f"{self.folder.path}: its checkpoint"):
            self.trainer.load_state_dict(state["trainer"])
        if self.trainer.completed_steps != state["step"]:
            raise InputError(
                f"{self.folder.path}: its checkpoint is of epoch {state['step']}, and the trainer's state in it of "
                f"epoch {self.trainer.completed_steps}"
            )
        self._record.rewind(self.trainer.completed_steps)

    def run(self) -> None:
        """Train. A checkpoint of the last epoch made is saved.

        Raises:
            InputError: training diverged, or the last checkpoint cannot be saved; checkpoints saved before stay.
            Interrupted: a signal came before the last epoch.
        """
        first, epochs = self.trainer.completed_steps, self.plan.epochs
        with Interrupts() as interrupts, tqdm(total=epochs, initial=first, unit="epoch") as bar:
            if first == 0 and self._observe is not None:
                self._record.row({"step": 0, **self._look()})
            while self.trainer.completed_steps < epochs and interrupts.received is None:
                self._epoch()
                bar.update()
            self._save(last=True)
        if self.trainer.completed_steps < epochs:
            go_on = f"go on: python -m scripts.{self.job} --resume {shlex.quote(str(self.folder.path))}"
            raise Interrupted(interrupts.received, f"nothing but its checkpoint was written; {go_on}")

    def _epoch(self) -> None:
        row = self.trainer.step()
        step = self.trainer.completed_steps
        if self._observe is not None and (step % self.plan.observe_interval == 0 or step == self.plan.epochs):
            row |= self._look()
        self._record.row(row)
        tqdm.write(_line(row, self.plan.epochs))
        if self._record.is_due(step, self.plan.save_interval):
            self._save(last=False)

    def _look(self) -> dict[str, float]:
        step = self.trainer.completed_steps
        metrics, picture = self._observe()
        self._record.attempt("pictures", lambda: self._record.events(step).picture("held-out", picture, step))
        for line in comparison_lines(metrics):
            tqdm.write(f"epoch {step} held out: {line}")
        return metrics

    def _save(self, *, last: bool) -> None:
        step = self.trainer.completed_steps

        def write() -> None:
            state = {
                "job": self.job,
                "step": step,
                "trainer": self.trainer.state_dict(),
                "config": to_plain(self.config),
                "config_hash": config_hash(self.config),
            }
            CHECKPOINT.save(step_path(self.folder.checkpoints, step), state)

        self._record.save(step, write, last=last)


def _line(row: Mapping[str, float], epochs: int) -> str:
    """One line about an epoch: what is trained for first; times and held-out measures have lines of their own."""
    shown = [
        f"{name} {value:.4g}"
        for name, value in row.items()
        if name != "step" and not name.startswith(("seconds", "heldout"))
    ]
    return f"epoch {row['step']:.0f}/{epochs}: {', '.join(shown)} ({row['seconds/step']:.1f} s)"
