"""PPO of a distribution over solvers (`training.ppo.ppo_trainer`)."""

from __future__ import annotations

from typing import Any

from training.ppo.config import Config
from training.ppo.policy import EPDParamPolicy
from training.ppo.ppo_trainer import PPOTrainer
from training.ppo.rollout import PromptStream, RolloutSource
from training.solver import Solver


def make_policy(solver: Solver, config: Config) -> EPDParamPolicy:
    """The policy before its first update."""
    ppo = config.ppo
    return EPDParamPolicy(
        solver.table,
        sigmas=solver.sigmas,
        train=ppo.train,
        concentration=ppo.dirichlet_concentration,
        grid_concentration=ppo.grid_concentration,
        scale_std=ppo.scale_std,
        guidance_std=ppo.guidance_std,
        history_std=ppo.history_std,
        seed=config.run.seed,
    )


def make_search(
    policy: EPDParamPolicy, source: RolloutSource[Any], prompts: PromptStream, config: Config
) -> PPOTrainer:
    """PPO with the settings in section `ppo`."""
    return PPOTrainer(policy, source, prompts, config.ppo, seed=config.run.seed)
