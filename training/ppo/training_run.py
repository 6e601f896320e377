"""A run from its first step to its last: steps, evaluations, what is written, interrupts."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from errors import InputError
from files import write_atomically
from interrupts import Interrupts
from models.pictures import as_png, contact_sheet, read_pixels, to_pixels
from solvers import EPDTable
from training.measuring.statistics import Interval
from training.ppo.assembly import Parts, Start, to_plain
from training.ppo.checkpoint import Numbers, save_checkpoint, table_to_plain
from training.ppo.figures import solver_figure
from training.ppo.heldout import HeldoutJudge, HeldoutScores
from training.ppo.rivals import best_classical, reference_images
from training.runs.checkpoint import best_path, fitting, step_path
from training.runs.configuration import config_hash
from training.runs.configuration import to_plain as config_to_plain
from training.runs.record import RunRecord
from training.runs.run_folder import RunFolder

SHOWN = {
    "kl": "KL {:.3f}",
    "entropy": "entropy {:.2f}",
    "clip_fraction": "clipped {:.0%}",
    "effective_sample_share": "effective samples {:.0%}",
    "step_size": "step size {:.3f}",
}
"""Metrics of the console's line beside reward and time, and how they are written, where a step has them."""

CLASSICAL, REFERENCE = "classical", "reference"
FINISHED, INTERRUPTED, HACKED = "finished", "interrupted", "stopped for suspected reward hacking"


class RunWriter(RunRecord):
    """What one process of a run, the first, writes to its folder: beside what every run does, pictures."""

    def __init__(self, folder: RunFolder, start: Start, judge: HeldoutJudge | None) -> None:
        """`judge`: whose prompts and seeds belong to the images, in their order; None where there are none."""
        super().__init__(folder, "step")
        self._start, self._judge = start, judge

    def previews(self, step: int, images: Tensor) -> None:
        """Save images [P, 3, H, W] of the first held-out prompts by the table after `step`, and draw them."""
        self.images(step, images)
        if len(images):
            self.attempt(
                "TensorBoard", lambda: self.events(step).picture("held-out", self._sheet(step, len(images)), step)
            )

    def images(self, source: int | str, images: Tensor) -> None:
        """Save images [P, 3, H, W] of the first held-out prompts by what `preview_name` calls their source."""
        self.attempt("previews", lambda: self._write_images(source, images))

    def table_plot(self, step: int, table: EPDTable, sigmas: Tensor | None) -> None:
        """Plot the policy's mean beside the start."""
        start = self._start.solver
        now = start.with_numbers(table, sigmas)
        drawn = ("now", now.sigmas, table), ("start", start.sigmas, start.table)
        self.attempt("table plot", lambda: self.events(step).figure("table", solver_figure(*drawn), step))
        gc.collect()  # drawing leaves cycles, 1.2 MB of them, and Python looks for those once 140,000 objects wait

    def _write_images(self, source: int | str, images: Tensor) -> None:
        for number, pixels in enumerate(to_pixels(images)):
            prompt, seed = self._judge.prompts[number], self._judge.seeds[number]
            story = {"prompt": prompt, "seed": str(seed), "step": str(source)}
            write_atomically(self.folder.samples / preview_name(source, number), as_png(pixels, story))

    def _sheet(self, step: int, count: int) -> np.ndarray:
        """The saved images of the first `count` prompts, a row each: by the start, and by the table after `step`."""
        names = {0: "start", step: f"step {step}" if step else "start"}
        rows = [[read_pixels(self.folder.samples / preview_name(at, row)) for at in names] for row in range(count)]
        drawn = zip(self._judge.prompts[:count], self._judge.seeds[:count], strict=True)
        captions = [prompt or f"seed {seed}" for prompt, seed in drawn]
        return np.asarray(contact_sheet(rows, captions, list(names.values())))


def preview_name(source: int | str, number: int) -> str:
    """File name of the image of held-out prompt `number` by the table after a step, `CLASSICAL` or `REFERENCE`."""
    return f"{source if isinstance(source, str) else f'step{source:06d}'}-prompt{number:02d}.png"


class TrainingRun:
    """Trains to the last step, or until it is interrupted; can be gone on with from every checkpoint."""

    def __init__(self, parts: Parts, folder: RunFolder, fabric: Fabric) -> None:
        """Nothing is written before `run`."""
        self.start, self.config, self.folder = parts.start, parts.start.config, folder
        self.trainer, self.judge, self.watch = parts.trainer, parts.judge, parts.watch
        self._denoiser = parts.denoiser
        self._fabric = fabric
        self._writer = RunWriter(folder, self.start, parts.judge) if fabric.is_global_zero else None
        self.interrupted_by = 0
        """The signal that ended `run`, in whatever process it came; 0: none."""

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.trainer.completed_steps

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it belongs to another kind of search, to other prompts or rewards, or was made without held-out
                evaluation.
        """
        with fitting(f"{self.folder.path}: its checkpoint"):
            if state["trainer"].keys() != self.trainer.state_dict().keys():
                raise InputError("the checkpoint is of another kind of search than search.method says")
            self.trainer.load_state_dict(state["trainer"])
            if self.step != state["step"]:
                raise InputError(
                    f"the checkpoint is of step {state['step']}, and its trainer's state of step {self.step}"
                )
            if self.watch is not None and state["watch"] is None:
                raise InputError(
                    "the run was made without held-out evaluation, so there are no scores of its starting table to "
                    "compare with: resume with logging.eval_interval=0"
                )
            if self.watch is not None:
                self.watch.load_state_dict(state["watch"], len(self.judge.prompts))
        if self._writer is not None:
            self._writer.rewind(self.step)

    def run(self) -> str:
        """Train; returns how it ended: `FINISHED`, `INTERRUPTED` or `HACKED`. A checkpoint of the last step is saved.

        Raises:
            DivergenceError: the rewards or an update are not finite; checkpoints saved before stay.
            InputError: the last checkpoint cannot be saved, or the processes' policies differ.
        """
        with (
            Interrupts() as interrupts,
            tqdm(total=self.config.ppo.steps, initial=self.step, unit="step", disable=self._writer is None) as bar,
        ):
            ending = self._to_the_end(interrupts, bar)
            self._require_one_policy()
            self._save(last=True)
        return ending

    def _to_the_end(self, interrupts: Interrupts, bar: tqdm) -> str:
        if self.step == 0 and self.watch is not None:
            if self._writer is not None:
                count = len(self.judge.prompts)
                tqdm.write(f"before step 1: scoring classical solvers and the start on {count} held-out prompts")
            self._look_beside()
            self._record({"step": 0, **self._evaluate()})
            bar.reset()  # the time left is told by steps alone
        while self.step < self.config.ppo.steps:
            self.interrupted_by = int(self._of_each_process(torch.tensor(interrupts.received or 0)).max())
            if self.interrupted_by:
                return INTERRUPTED
            hacked = self._one_step(bar)
            if hacked and self.config.logging.stop_on_reward_hacking:
                return HACKED
        return FINISHED

    def _one_step(self, bar: tqdm) -> bool:
        """A step with all that is due after it; whether reward hacking is suspected."""
        logging = self.config.logging
        row = self.trainer.step()
        last = self.step == self.config.ppo.steps
        if self.watch is not None and (last or self.step % logging.eval_interval == 0):
            row |= self._evaluate()
        self._record(row)
        bar.update()
        if self._writer is not None and (last or self.step % logging.log_interval == 0):
            tqdm.write(console_line(row, self.config.ppo.steps))
        if self.step % logging.save_interval == 0:
            self._require_one_policy()
        if self._writer is not None and self._writer.is_due(self.step, logging.save_interval):
            self._save(last=False)
        return bool(row.get("heldout/suspected_reward_hacking"))

    def _look_beside(self) -> None:
        """Score and draw what the tuned solver will stand beside."""
        solver = self.start.solver
        self.watch.classical = best_classical(self.judge, self.watch, solver, self._denoiser)
        shown = self.config.logging.preview_prompts
        drawn = {REFERENCE: reference_images(self.judge, solver, self._denoiser) if shown else None}
        if self.watch.classical is not None:
            name, scores = self.watch.classical
            drawn[CLASSICAL] = scores.previews
            if self._writer is not None:
                tqdm.write(
                    f"best classical solver at as many evaluations in all ({solver.evaluations.total}): {name}, "
                    f"reward {self.watch.mean_reward(scores):.4f}"
                )
        for what, images in drawn.items():
            if self._writer is not None and images is not None:
                self._writer.images(what, images)

    def _evaluate(self) -> dict[str, float]:
        """Score the policy's mean on the held-out prompts; keeps its checkpoint where it is the best so far."""
        mean = self.trainer.policy.mean()
        judge = self.judge.judge if self.step else self.judge.judge_once  # the start's are other runs' start's too
        scores: HeldoutScores = judge(*mean)
        metrics = self.watch.observe(self.step, scores)
        if self._writer is not None:
            self._writer.previews(self.step, scores.previews)
            self._writer.table_plot(self.step, *mean)
            tqdm.write(heldout_line(self.step, metrics))
            if self.step and self.watch.best_step == self.step:
                path = best_path(self.folder.checkpoints)
                self._writer.attempt(
                    f"no best checkpoint of step {self.step}", lambda: save_checkpoint(path, self._state())
                )
        return metrics

    def _record(self, row: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.row(row, table={name: part.tolist() for name, part in self._mean().items()})

    def _save(self, *, last: bool) -> None:
        if self._writer is not None:
            path = step_path(self.folder.checkpoints, self.step)
            self._writer.save(self.step, lambda: save_checkpoint(path, self._state()), last=last)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "trainer": self.trainer.state_dict(),
            "watch": None if self.watch is None else self.watch.state_dict(),
            "start": to_plain(self.start),
            "table": self._mean(),
            "config": config_to_plain(self.config),
            "config_hash": config_hash(self.config),
        }

    def _mean(self) -> Numbers:
        return table_to_plain(*self.trainer.policy.mean())

    def _require_one_policy(self) -> None:
        """Raise InputError where processes have moved their policies apart: each computes every update by itself."""
        tensors = self.trainer.policy.state_dict().values()
        policies = self._of_each_process(
            torch.cat([tensor.double().flatten().cpu() for tensor in tensors]).nan_to_num()
        )
        apart = (policies - policies[0]).abs().max().item()
        if apart != 0:
            raise InputError(
                f"step {self.step}: the policies of the processes differ, by up to {apart:.2g}: the machines compute "
                f"differently, or one is broken. Go on from the last checkpoint on machines that are alike"
            )

    def _of_each_process(self, numbers: Tensor) -> Tensor:
        """The numbers [...] of all processes: [P, ...]."""
        if self._fabric.world_size == 1:
            return numbers[None]
        return self._fabric.all_gather(numbers.to(self._fabric.device)).cpu()


def console_line(row: Mapping[str, float], steps: int) -> str:
    """One line about a step."""
    seconds = row["seconds/step"]
    network = row.get("seconds/network", 0.0) / seconds if seconds else 0.0
    parts = [
        f"step {row['step']:>{len(str(steps))}.0f}/{steps}  reward {row['reward_mean']:.4f} "
        f"[{row['reward_min']:.3f}, {row['reward_max']:.3f}]",
        *(text.format(row[name]) for name, text in SHOWN.items() if name in row),
        f"{seconds:.1f} s ({network:.0%} network)",
    ]
    if row["dropped_groups"]:
        parts.append(f"dropped groups {row['dropped_groups']:.0f}")
    return "  ".join(parts)


def heldout_line(step: int, metrics: Mapping[str, float]) -> str:
    """One line about an evaluation: each mean score, and how far it is above the start's, with a 95% interval."""
    parts = [f"step {step} held out"]
    for judge in ("reward", "panel"):
        if f"heldout/{judge}" in metrics:
            difference, low, high = Interval.from_metrics(metrics, f"heldout/{judge}_difference")
            score = metrics[f"heldout/{judge}"]
            parts.append(f"{judge} {score:.4f} (start {difference:+.4f} [{low:+.4f}, {high:+.4f}])")
    if metrics["heldout/suspected_reward_hacking"]:
        parts.append("SUSPECTED REWARD HACKING: the reward rises while the panel falls")
    return "  ".join(parts)
