"""The PPO loop: it knows a policy over tables, a source that tries them, and prompts; no model, no image, no reward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from models.randomness import derived_seed, generator_of
from training.ppo import algorithm
from training.ppo.config import PPOConfig
from training.ppo.policy import EPDParamPolicy, TableDistribution, TableSample
from training.ppo.rollout import PromptStream, RolloutSource, Scores
from training.ppo.search.protocol import AdamSearch, reward_metrics

TOO_FAR = "the update went too far; lower ppo.learning_rate or ppo.ppo_epochs"

METRICS: Mapping[str, str] = {
    "step": "number of this step, from 1",
    "images": "images rolled out since the start of the run",
    "learning_rate": "Adam's step size in this step",
    "reward_mean": "mean reward of the step's finite samples",
    "reward_min": "least reward of the step's finite samples",
    "reward_max": "largest reward of the step's finite samples",
    "reward_within_variance": "mean over prompts of the reward's variance inside a group: the signal, and its noise",
    "reward_between_variance": "variance of the prompts' mean rewards: what the prompt baseline removes",
    "saturated_share": "share of rewards in groups whose rewards are all equal: they teach nothing",
    "dropped_groups": "groups left out of the update for rewards that were NaN or infinite",
    "policy_loss": "clipped surrogate, mean over the step's minibatches",
    "kl": "KL(policy || cold start) in nats, summed over all that is trained, mean over the minibatches",
    "entropy": "entropy of the policy in nats, summed over all that is trained, mean over the minibatches",
    "gradient_norm": "Euclidean norm of the gradient before clipping, mean over the minibatches",
    "first_pass_ratio_error": "largest |ratio - 1| before the step's first update: 0, or sampling and scoring disagree",
    "approximate_kl": "KL(before || after the step) in nats, estimated on the step's tables",
    "clip_fraction": "share of the step's tables whose ratio left the clip range by the end of the step",
    "effective_sample_share": "effective sample size of the ratios at the end of the step, over their number",
    "parameters_at_bounds": "policy parameters held at a bound, where they get no gradient",
}
"""Every metric of a step with its meaning; beside these `reward/<name>`, the mean raw score of each reward, and
`seconds/<phase>`, where a step's time went, with `seconds/update` and the whole `seconds/step`."""


@dataclass(frozen=True)
class Batch:
    """The n <= N samples that an update uses: all groups whose rewards were finite, prompt-major.

    Attributes:
        sample: the tables.
        log_prob: [n], of the policy that drew them.
        rewards: [n].
        scores: of all N samples of the step.
    """

    sample: TableSample
    log_prob: Tensor
    rewards: Tensor
    scores: Scores


class PPOTrainer(AdamSearch):
    """PPO (arXiv 1707.06347) of a policy over tables, with leave-one-out baselines (arXiv 2402.14740).

    In a run of several processes each holds a trainer with the same seed; they differ only in what their source rolls
    out, and since every source gathers the scores of all, every trainer makes the same update.
    """

    def __init__(
        self,
        policy: EPDParamPolicy,
        source: RolloutSource[Any],
        prompts: PromptStream,
        settings: PPOConfig,
        *,
        seed: int,
    ) -> None:
        """Train `policy` on what `source` makes of its tables.

        Args:
            policy: changed in place.
            source: tries and rewards `settings.rloo_k` tables per prompt.
            prompts: where each step's prompts come from.
            settings: section `ppo` of the configuration.
            seed: of the tables drawn and of the order of the minibatches.
        """
        super().__init__(policy, source, prompts, settings, settings.learning_rate, settings.learning_rate_schedule)
        self.generator = generator_of(derived_seed("tables and minibatches", seed))

    def _step(self, number: int) -> dict[str, float]:
        """One rollout and its updates; returns the metrics named in `METRICS`.

        Raises:
            DivergenceError: too many rewards, or a gradient, were not finite, or the mean table is none any more.
        """
        sample, log_prob, outcome = self._roll_out()
        batch = self._score(sample, log_prob, outcome)
        advantages = self._advantages(batch.rewards)
        update = self._update(batch, advantages)
        return self._log(number, batch, update)

    def _own_state(self) -> dict[str, Any]:
        return {**super()._own_state(), "generator": self.generator.get_state()}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        super()._load_own_state(state)
        self.generator.set_state(state["generator"])

    @torch.no_grad()
    def _roll_out(self) -> tuple[TableSample, Tensor, Any]:
        """Tables as drawn, their log-probability [N] then, and what the source made of them."""
        prompts = self.prompts.take(self.settings.rollout_batch_size // self.settings.rloo_k)
        distribution = self.policy()
        sample = distribution.sample(self.settings.rollout_batch_size, self.generator)
        outcome = self.source.roll_out(sample.table(), prompts, self.completed_steps, sample.sigmas())
        return sample, distribution.log_prob(sample), outcome

    def _score(self, sample: TableSample, log_prob: Tensor, outcome: Any) -> Batch:
        scores = self.source.score(outcome)
        groups = scores.rewards.view(-1, self.settings.rloo_k).isfinite().all(1)  # [B]
        self._require_enough(
            groups,
            "{:.0%} of the groups have rewards that are",
            "the tables leave the range in which the solver is stable, or the reward is broken; lower "
            "ppo.learning_rate, raise ppo.dirichlet_concentration, or use model.dtype=float32",
        )
        kept = groups.repeat_interleave(self.settings.rloo_k)  # [N]
        return Batch(sample.select(kept), log_prob[kept], scores.rewards[kept].to(log_prob), scores)

    def _advantages(self, rewards: Tensor) -> Tensor:
        return algorithm.normalize(
            algorithm.leave_one_out_advantages(rewards, self.settings.rloo_k, baseline=self.settings.baseline)
        )

    def _update(self, batch: Batch, advantages: Tensor) -> dict[str, float]:
        """All passes over the batch; returns the metrics of the update."""
        start = perf_counter()
        rate = self._set_learning_rate()
        ratio_error = (self._log_prob(batch) - batch.log_prob).expm1().abs().max().item()
        passes: list[dict[str, float]] = []
        for _ in range(self.settings.ppo_epochs):
            order = torch.randperm(len(advantages), generator=self.generator)
            for rows in order.split(self.settings.minibatch_size):
                passes.append(self._update_minibatch(batch.sample.select(rows), batch.log_prob[rows], advantages[rows]))
        log_prob = self._log_prob(batch)
        moved = algorithm.approximate_kl(log_prob, batch.log_prob)
        self._require_finite(moved, "the KL divergence between the policies before and after the update")
        self._require_solver("the mean table", TOO_FAR)
        return {
            "learning_rate": rate,
            **{name: sum(metrics[name] for metrics in passes) / len(passes) for name in passes[0]},
            "first_pass_ratio_error": ratio_error,
            "approximate_kl": moved,
            "clip_fraction": algorithm.clip_fraction(log_prob, batch.log_prob, self.settings.clip_range),
            "effective_sample_share": algorithm.effective_sample_share(log_prob, batch.log_prob),
            "seconds/update": perf_counter() - start,
        }

    def _update_minibatch(self, sample: TableSample, old_log_prob: Tensor, advantages: Tensor) -> dict[str, float]:
        """One step of the optimiser."""
        settings, distribution = self.settings, self.policy()
        policy_loss = algorithm.clipped_surrogate(
            distribution.log_prob(sample), old_log_prob, advantages, settings.clip_range
        )
        kl, entropy = distribution.kl(self.policy.cold_start()), distribution.entropy()
        loss = algorithm.total_loss(
            policy_loss, kl, entropy, kl_coef=settings.kl_coef, entropy_coef=settings.entropy_coef
        )
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), settings.max_grad_norm)
        self._require_finite(norm.item(), "the norm of the gradient")
        self.optimizer.step()
        return {
            "policy_loss": policy_loss.item(),
            "kl": kl.item(),
            "entropy": entropy.item(),
            "gradient_norm": norm.item(),
        }

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise self._diverged(f"{what} is {value}: {TOO_FAR}")

    @torch.no_grad()
    def _log_prob(self, batch: Batch) -> Tensor:
        return self.policy().log_prob(batch.sample)

    @torch.no_grad()
    def _log(self, number: int, batch: Batch, update: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the step."""
        distribution: TableDistribution = self.policy()
        return {
            **reward_metrics(number, batch.scores, self.settings.rloo_k),
            "reward_mean": batch.rewards.mean().item(),  # of whole groups: they alone are learned from
            "reward_min": batch.rewards.min().item(),
            "reward_max": batch.rewards.max().item(),
            "saturated_share": algorithm.saturated_share(batch.rewards, self.settings.rloo_k),
            **update,
            "parameters_at_bounds": distribution.at_bounds,
        }
