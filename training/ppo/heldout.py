"""The held-out watch: is the mean table better on prompts that are never trained on, and does a second judge agree?

Every evaluation uses the same prompts and seeds, so that each difference to the starting table is paired. A held-out
reward that rises while a judge that is not trained on falls is reported as suspected reward hacking.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import InputError
from models.randomness import generator_of
from solvers import EPDTable
from training.measuring.evaluation import Store
from training.measuring.statistics import Interval, bootstrap_indices, paired_difference_interval
from training.ppo.rewards.mix import WeightedMix
from training.ppo.rewards.protocol import Reward
from training.ppo.rl_runner import RLRunner
from training.ppo.rollout import DivergenceError

log = logging.getLogger(__name__)

BOOTSTRAP_SEED = 0

HELDOUT_METRICS: Mapping[str, str] = {
    "heldout/reward": "mean training reward of the mean table on the held-out prompts",
    "heldout/reward_start": "the same of the starting table",
    "heldout/reward_difference": "mean paired difference of the two, with a 95% bootstrap interval (_low, _high)",
    "heldout/classical": "mean training reward of the best classical solver at as many evaluations in all (`rivals`)",
    "heldout/classical_difference": "mean paired difference to that one, with a 95% bootstrap interval (_low, _high)",
    "heldout/classical_panel": "mean score of that one by the judge that is not trained on",
    "heldout/classical_panel_difference": "mean paired difference to that, with a 95% bootstrap interval (_low, _high)",
    "heldout/panel": "mean score by the judge that is not trained on",
    "heldout/panel_start": "the same of the starting table",
    "heldout/panel_difference": "mean paired difference of the two, with a 95% bootstrap interval (_low, _high)",
    "heldout/dropped": "held-out images left out because a score of theirs, or of the starting table's, is not finite",
    "heldout/best_step": "step of the highest held-out reward among the tables that the panel does not find worse",
    "heldout/suspected_reward_hacking": "1 where the reward's interval lies above 0 and the panel's below, else 0",
}
"""Every metric of an evaluation with its meaning."""


@dataclass(frozen=True)
class HeldoutScores:
    """What one table got on the N held-out prompts.

    Attributes:
        parts: raw score [N] float32 of each training reward, by name; NaN where the image is not finite.
        panel: [N] float32 by the judge that is not trained on; None without one.
        previews: [P, 3, H, W], the images of the first prompts.
    """

    parts: Mapping[str, Tensor]
    panel: Tensor | None
    previews: Tensor


@dataclass(frozen=True)
class Kept:
    """Where the scores of solvers that many runs look at are kept from one run to the next.

    Attributes:
        store: where.
        described: (table, noise levels) -> all that images and scores depend on but the prompts and the seeds.
    """

    store: Store
    described: Callable[[EPDTable, Tensor | None], Mapping[str, Any]]


class HeldoutJudge:
    """Scores tables on fixed held-out prompts and seeds."""

    def __init__(
        self,
        source: RLRunner,
        panel: Reward | None,
        prompts: Sequence[str],
        *,
        first_seed: int,
        preview_count: int,
        kept: Kept | None = None,
    ) -> None:
        """Fix everything but the table.

        Args:
            source: makes the images, in a run of several processes each its share, and has the training reward, whose
                running statistics are left alone.
            panel: a judge that is not trained on.
            prompts: one image is made for each.
            first_seed: seed of the first prompt's noise; the next has the next.
            preview_count: how many images are handed back.
            kept: for `judge_once`, which judges anew without it, and in a run of several processes.
        """
        self.prompts = tuple(prompts)
        self.seeds = tuple(range(first_seed, first_seed + len(self.prompts)))
        self._source = source
        self._panel = None if panel is None else WeightedMix({"panel": (panel, 1.0)})
        self._preview_count = preview_count
        self._kept = kept if source.shard.count == 1 else None

    @torch.no_grad()
    def judge(self, table: EPDTable, sigmas: Tensor | None = None, count: int | None = None) -> HeldoutScores:
        """Sample with one table [S, K], at noise levels [S + 1] or the source's, and score.

        `count`: so many of the prompts, from the first. All processes get the scores of all.
        """
        number = min(count or len(self.prompts), len(self.prompts))
        rows = self._rows_here(number)
        images = self._source.sample_images(
            table, [self.prompts[row] for row in rows], [self.seeds[row] for row in rows], sigmas
        )
        raw = self._source.raw_scores(images, self._source.reward)
        parts = {name: scores[:number] for name, scores in raw.items()}
        panel = None if self._panel is None else self._source.raw_scores(images, self._panel)["panel"][:number]
        return HeldoutScores(parts, panel, images.pixels[: self._preview_count].cpu())

    def judge_once(self, table: EPDTable, sigmas: Tensor | None = None, count: int | None = None) -> HeldoutScores:
        """`judge`, or what it said in an earlier run; without previews where `count` is given."""
        shown = self._preview_count if count is None else 0

        def compute() -> dict[str, Tensor]:
            scores = self.judge(table, sigmas, count)
            panel = {} if scores.panel is None else {"panel": scores.panel}
            parts = {f"reward/{name}": part for name, part in scores.parts.items()}
            return {**parts, **panel, "previews": scores.previews[:shown]}

        description = self._described("held-out scores", table, sigmas, count) | {"previews": shown}
        found = self._fetched(description, compute)
        parts = {name: found[f"reward/{name}"] for name in self._source.reward.state_dict()}
        return HeldoutScores(parts, found.get("panel"), found["previews"])

    @torch.no_grad()
    def previews(self, table: EPDTable, sigmas: Tensor) -> Tensor:
        """The images [P, 3, H, W] of the first prompts by a table at noise levels; every process draws them.

        Those of an earlier run, where they are kept.
        """
        shown = slice(0, self._preview_count)

        def compute() -> dict[str, Tensor]:
            drawn = self._source.sample_images(table, self.prompts[shown], self.seeds[shown], sigmas)
            return {"previews": drawn.pixels.cpu()}

        description = self._described("held-out previews", table, sigmas, self._preview_count)
        return self._fetched(description, compute)["previews"]

    def _described(self, kind: str, table: EPDTable, sigmas: Tensor | None, count: int | None) -> dict[str, Any]:
        """All that something said of the first `count` prompts depends on."""
        of_solver = {} if self._kept is None else self._kept.described(table, sigmas)
        return {**of_solver, "kind": kind, "prompts": self.prompts[:count], "seeds": self.seeds[:count]}

    def _fetched(self, description: dict[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is kept under the description, or what is computed, and then kept."""
        if self._kept is None:
            return compute()
        if self._kept.store.holds(description):
            return self._kept.store.fetch(description, compute)
        computed = compute()
        try:
            self._kept.store.keep(description, computed)
        except InputError as error:  # the run is whole without
            log.warning("%s: %s are not kept for other runs", error, description["kind"])
        return computed

    def _rows_here(self, number: int) -> list[int]:
        """This process's consecutive share of the prompts; the last share is filled up with the last prompt."""
        shard = self._source.shard
        share = -(-number // shard.count)
        return [min(row, number - 1) for row in range(shard.rank * share, (shard.rank + 1) * share)]


class HeldoutWatch:
    """Compares each table's held-out scores with the starting table's, and keeps the best."""

    def __init__(self, reward: WeightedMix) -> None:
        """Start with nothing seen; `reward` combines the raw scores of both tables with the same statistics."""
        self._reward = reward
        self._start: HeldoutScores | None = None
        self._best: HeldoutScores | None = None
        self._first: HeldoutScores | None = None
        self.best_step = 0
        self.classical: tuple[str, HeldoutScores] | None = None
        """The best classical solver beside it, in words, and its scores; set before the first evaluation."""

    def observe(self, step: int, scores: HeldoutScores) -> dict[str, float]:
        """Take in the scores of the mean table after `step`; the first call gives the starting table's.

        Returns:
            `HELDOUT_METRICS`; those of the panel only where there is one.

        Raises:
            DivergenceError: fewer than two held-out images have finite scores.
        """
        if self._start is None:
            self._start = self._best = scores
        kept = self._finite_rows(step, scores)
        indices = bootstrap_indices(int(kept.sum()), generator_of(BOOTSTRAP_SEED))
        rewards, start_rewards = self._combined(scores)[kept], self._combined(self._start)[kept]
        reward = paired_difference_interval(rewards, start_rewards, indices)
        metrics = _described("reward", rewards, start_rewards, reward)
        panel = None
        if scores.panel is not None and self._start.panel is not None:
            ours, theirs = scores.panel[kept], self._start.panel[kept]
            panel = paired_difference_interval(ours, theirs, indices)
            metrics |= _described("panel", ours, theirs, panel)
        if self.classical is not None:
            metrics |= self._beside_classical(scores, kept)
        self._keep_best(step, scores, panel)
        hacking = panel is not None and reward.low > 0 and panel.high < 0
        return metrics | {
            "heldout/dropped": int((~kept).sum()),
            "heldout/best_step": self.best_step,
            "heldout/suspected_reward_hacking": int(hacking),
        }

    def mean_reward(self, scores: HeldoutScores) -> float:
        """Of the images whose rewards are finite; negative infinity where there are none."""
        rewards = self._combined(scores)
        finite = rewards[rewards.isfinite()]
        return finite.mean().item() if len(finite) else -math.inf

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as tensors and plain values."""
        name, scores = self.classical or (None, None)
        state = {"best_step": self.best_step, "start": _packed(self._start), "best": _packed(self._best)}
        return state | {"classical": _packed(scores), "classical_name": name}

    def load_state_dict(self, state: Mapping[str, Any], number: int) -> None:
        """Go on from what `state_dict` gave, of `number` held-out prompts."""
        self.best_step = operator.index(state["best_step"])
        names = self._reward.state_dict().keys()
        self._start, self._best = (_unpacked(state[key], names, number) for key in ("start", "best"))
        if state.get("classical") is not None:  # runs of before had none
            self.classical = (str(state["classical_name"]), _unpacked(state["classical"], names, number))

    def _beside_classical(self, scores: HeldoutScores, kept: Tensor) -> dict[str, float]:
        """The metrics of the classical solver, over the `kept` images [N] whose scores by it are finite too."""
        classical = self.classical[1]
        judged = {"classical": (self._combined(scores), self._combined(classical))}
        if scores.panel is not None and classical.panel is not None:
            judged["classical_panel"] = (scores.panel, classical.panel)
        both = torch.stack([kept, *(theirs.isfinite() for _, theirs in judged.values())]).all(0)
        if both.sum() < 2:
            return {}
        indices = bootstrap_indices(int(both.sum()), generator_of(BOOTSTRAP_SEED))
        metrics = {}
        for judge, (ours, theirs) in judged.items():
            difference = paired_difference_interval(ours[both], theirs[both], indices)
            metrics[f"heldout/{judge}"] = theirs[both].double().mean().item()
            metrics |= difference.as_metrics(f"heldout/{judge}_difference")
        return metrics

    def _combined(self, scores: HeldoutScores) -> Tensor:
        """Before the first step in the units of what was seen first: in its own, whatever a mix scores has mean 0."""
        self._first = self._first or scores
        return self._reward.combine(scores.parts, self._first.parts)

    def _finite_rows(self, step: int, scores: HeldoutScores) -> Tensor:
        """Rows [N] where every score of this table and of the starting one, and what they come to, is finite."""
        both = (scores, self._start)
        sets = [part for seen in both for part in (*seen.parts.values(), seen.panel, self._combined(seen))]
        kept = torch.stack([part.isfinite() for part in sets if part is not None]).all(0)
        if kept.sum() < 2:
            raise DivergenceError(
                f"step {step}: {int((~kept).sum())} of {len(kept)} held-out images have scores that are NaN or "
                f"infinite: the mean table leaves the range in which the solver is stable, or the reward is broken"
            )
        return kept

    def _keep_best(self, step: int, scores: HeldoutScores, panel: Interval | None) -> None:
        """A table that the panel finds worse than the start is never the best, however high its reward.

        An image without a finite reward counts as the worst that either table has drawn.
        """
        if panel is not None and panel.high < 0:
            return
        both = torch.stack([self._combined(scores), self._combined(self._best)])
        finite = both.isfinite()
        ours, best = both.where(finite, both[finite].min()).mean(1)
        if ours > best:
            self._best, self.best_step = scores, step


def _described(judge: str, ours: Tensor, theirs: Tensor, difference: Interval) -> dict[str, float]:
    return {
        f"heldout/{judge}": ours.double().mean().item(),
        f"heldout/{judge}_start": theirs.double().mean().item(),
    } | difference.as_metrics(f"heldout/{judge}_difference")


def _packed(scores: HeldoutScores | None) -> dict[str, Any] | None:
    return None if scores is None else {"parts": dict(scores.parts), "panel": scores.panel}


def _unpacked(state: Mapping[str, Any], names: Iterable[str], number: int) -> HeldoutScores:
    parts, panel = {name: state["parts"][name].float() for name in names}, state["panel"]
    for scores in (*parts.values(), *([] if panel is None else [panel])):
        if scores.shape != (number,):
            raise ValueError(f"held-out scores of shape {[*scores.shape]}, and {number} prompts")
    return HeldoutScores(parts, panel, torch.empty(0))
