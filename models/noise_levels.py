"""The noise levels of a discrete-time variance-preserving model, made continuous.

Such a model was trained at T steps (DDPM, arXiv 2006.11239, equation 4): x_i = alpha_i x0 + sqrt(1 - alpha_i^2) n with
alpha_i^2 = prod_{j <= i} (1 - beta_j). A solver also asks for levels between the steps. Step i (from 0) is given the
time t_i = (i + 1) / T, and log alpha is continued piecewise linearly in t (DPM-Solver, arXiv 2206.00927, appendix D;
its outermost segments go on as lines). The level in the scaling x0 + sigma n is sigma = sqrt(1 - alpha^2) / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from errors import InputError, first_line

MOST_STEPS = 1_000_000  # of a model's training; 1,000 are usual


class NoiseLevels:
    """The two maps between the time t in (0, 1] and the noise level sigma; all arithmetic is in float64.

    Both maps can be differentiated. They run where their argument lives, so that a solver on an accelerator never
    waits.
    """

    def __init__(self, betas: Tensor, config: Mapping[str, Any] | None = None) -> None:
        """`betas`: [T] noise variances of the training steps, each in (0, 1).

        `config`: how a diffusers `scheduler_config.json` says them; None where it lists them.
        """
        betas = betas.to("cpu", torch.float64)
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be a vector of at least two numbers, each above 0 and below 1")
        self.num_steps = len(betas)
        self.config = config or {"num_train_timesteps": self.num_steps, "trained_betas": betas.tolist()}
        times = torch.arange(1, self.num_steps + 1, dtype=torch.float64) / self.num_steps
        self._knots = {times.device: (times, 0.5 * torch.log1p(-betas).cumsum(0))}
        self.time_min = 1.0 / self.num_steps
        self.sigma_min = float(self.sigma_of_time(times[0]))
        self.sigma_max = float(self.sigma_of_time(times[-1]))
        if not math.isfinite(self.sigma_max):
            raise ValueError("the last noise level is infinite")

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], source: str) -> NoiseLevels:
        """The levels that a diffusers `scheduler_config.json` describes; `source` names the file in messages.

        Raises `InputError` for a schedule of another kind: one that is no beta schedule, or whose last level is
        infinite.
        """
        if config.get("rescale_betas_zero_snr"):
            raise InputError(
                f"{source}: rescale_betas_zero_snr makes the last noise level infinite; a solver cannot start there. "
                "Use a model whose scheduler does not rescale its betas."
            )
        schedule, trained = config.get("beta_schedule", "linear"), config.get("trained_betas")
        if trained is None and schedule not in ("linear", "scaled_linear"):
            raise InputError(f"{source}: beta_schedule {schedule!r} is not known; known are linear and scaled_linear.")
        try:
            if trained is not None:
                return cls(torch.tensor(trained, dtype=torch.float64))
            start, end, steps = (config[key] for key in ("beta_start", "beta_end", "num_train_timesteps"))
            if steps > MOST_STEPS:
                raise ValueError(f"num_train_timesteps is {steps}, more than {MOST_STEPS:,}")
            power = 2 if schedule == "scaled_linear" else 1
            betas = torch.linspace(start ** (1 / power), end ** (1 / power), steps, dtype=torch.float64) ** power
            said = {"beta_schedule": schedule, "beta_start": start, "beta_end": end, "num_train_timesteps": steps}
            return cls(betas, said)
        except KeyError as error:
            raise InputError(f"{source}: the key {error} is missing.") from error
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise InputError(f"{source}: this is no usable beta schedule: {first_line(error)}.") from error

    def sigma_of_time(self, time: Tensor) -> Tensor:
        """The noise level at `time` (any shape), as float64.

        The line below the first step reaches alpha = 1 just above t = 0; from there down sigma is 0.
        """
        times, log_alphas = self._knots_on(time.device)
        log_alpha = _piecewise_linear(time.to(torch.float64), times, log_alphas).clamp(max=0.0)
        return torch.expm1(-2.0 * log_alpha).sqrt()

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time at which the noise level is `sigma` (any shape, at least 0), as float64."""
        times, log_alphas = self._knots_on(sigma.device)
        log_alpha = -0.5 * torch.log1p(sigma.to(torch.float64) ** 2)
        return _piecewise_linear(log_alpha, log_alphas.flip(0), times.flip(0))

    def _knots_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._knots:
            times, log_alphas = self._knots[torch.device("cpu")]
            self._knots[device] = (times.to(device), log_alphas.to(device))
        return self._knots[device]


def _piecewise_linear(x: Tensor, knots_x: Tensor, knots_y: Tensor) -> Tensor:
    """The line through the two knots around each x (`knots_x` ascending), the outermost lines continued."""
    right = torch.searchsorted(knots_x, x.detach().contiguous()).clamp(1, len(knots_x) - 1)
    x0, x1, y0, y1 = knots_x[right - 1], knots_x[right], knots_y[right - 1], knots_y[right]
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)
