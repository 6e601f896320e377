"""Grids of noise levels: `num_steps` points from sigma_max down to sigma_min, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# Song et al., arXiv 2011.13456: the VP process is followed down to this time, below which it is stiff.
_VP_TIME_MIN = 1e-3

# A stored sigma_min or sigma_max has been through float32.
_RANGE_TOLERANCE = 1e-4


class HasModelTime(Protocol):
    """What the grids that are uniform in a model's own time ask of it (every `Denoiser` has it)."""

    @property
    def time_min(self) -> float:
        """The smallest time the model knows, in (0, 1); the largest is 1."""

    def sigma_of_time(self, time: Tensor) -> Tensor:
        """Noise levels, float64, ascending, of float64 times in [time_min, 1]."""


class FlowTime:
    """The time of flow matching, and the range of its noise levels.

    The level of a time t in (0, 1] is shift t / (1 + (shift - 1) t)  (arXiv 2403.03206, equation 23); it is 1 at 1.
    """

    sigma_max = 1.0

    def __init__(self, shift: float, time_min: float) -> None:
        """`shift`: positive. time_min: the smallest time that is asked for, in (0, 1)."""
        if not (0 < shift < math.inf and 0 < time_min < 1):
            raise ValueError(f"the shift is {shift} and the smallest time {time_min}; they must be positive")
        self.shift, self.time_min = shift, time_min
        self.sigma_min = float(self.sigma_of_time(torch.tensor(time_min, dtype=torch.float64)))

    def sigma_of_time(self, time: Tensor) -> Tensor:
        """The noise level at `time` (any shape), as float64; exactly 1 at 1."""
        time = time.to(torch.float64)
        return self.shift * time / (self.shift * time + (1 - time))


def get_schedule(
    schedule_type: str,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    *,
    rho: float = 7.0,
    denoiser: HasModelTime | None = None,
) -> Tensor:
    """Grid of noise levels, float64 [num_steps], strictly descending from sigma_max to sigma_min, both positive.

    schedule_type, with u = i / (num_steps - 1):
        polynomial    (σ_max^(1/ρ) + u (σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ        (Karras et al., arXiv 2206.00364, Eq. 5)
        logsnr        uniform in log σ; ρ plays no part
        time_uniform  t = (1 + u (ε^(1/ρ) - 1))^ρ, ε = 1e-3, and σ(t) of the VP process that has σ(ε) = σ_min and
                      σ(1) = σ_max                                           (arXiv 2206.00364, Table 1, column VP)
        discrete      the same t with ε = the model's time_min, and the model's own σ(t): with ρ = 1 the usual uniform
                      timesteps. Needs `denoiser`
        flowmatch     the model's own σ(t) at uniform t; ρ plays no part. Needs `denoiser`

    The last two end at the model's own sigma_min, and begin at its own sigma_max, or below it, at a time below 1: where
    evaluations are few, the first is better not spent on a level at which an image is all noise.
    Raises ValueError for an unknown type, a bad number of steps, range or rho, a missing denoiser or another's range,
    and for a rho whose powers float64 cannot hold or tell apart.
    """
    if schedule_type not in SCHEDULES:
        raise ValueError(f"unknown schedule_type {schedule_type!r}; known: {', '.join(SCHEDULES)}")
    if num_steps < 2:
        raise ValueError(f"num_steps counts grid points, at least 2; got {num_steps}")
    if not (0 < sigma_min < sigma_max and math.isfinite(sigma_max)):
        raise ValueError(f"a schedule needs 0 < sigma_min < sigma_max; got {sigma_min} and {sigma_max}")
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"rho must be positive; got {rho}")
    u = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    if schedule_type in MODEL_TIMES:
        sigmas = _model_grid(schedule_type, u, sigma_min, sigma_max, rho, denoiser)
    else:
        sigmas = _FORMULAS[schedule_type](u, sigma_min, sigma_max, rho)
    if not (sigmas.diff() < 0).all():
        raise ValueError(_beyond_float64(rho))
    return sigmas


def log_gaps(sigmas: Tensor) -> Tensor:
    """The shares of a grid's intervals in its whole length in log σ: [..., S + 1] -> [..., S], positive, of sum 1."""
    logarithms = sigmas.log()
    return -logarithms.diff() / (logarithms[..., :1] - logarithms[..., -1:])


def from_log_gaps(gaps: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """The grid [..., S + 1] from sigma_max to sigma_min with these shares [..., S]; the inverse of `log_gaps`.

    Both ends are exact, whatever the rounding of the shares. Differentiable, one grid or many.
    """
    ends = gaps.new_tensor([sigma_max, sigma_min]).expand(*gaps.shape[:-1], 2)
    inner = sigma_max * (sigma_min / sigma_max) ** gaps.cumsum(-1)[..., :-1]
    return torch.cat([ends[..., :1], inner, ends[..., 1:]], dim=-1)


def _polynomial(u: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    return _power_interpolation(u, sigma_max, sigma_min, rho)


def _logsnr(u: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    return sigma_max * (sigma_min / sigma_max) ** u


def _time_uniform(u: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """σ(t)² + 1 = exp(β_d t²/2 + β_min t); β_d and β_min solve it at (ε, σ_min) and (1, σ_max)."""
    time = _power_interpolation(u, 1.0, _VP_TIME_MIN, rho)
    # log1p and expm1, because at σ_min the argument is 1 + 4e-6: the plain forms lose 11 of 16 digits there.
    log_at_min, log_at_max = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (log_at_min / _VP_TIME_MIN - log_at_max) / (_VP_TIME_MIN - 1)
    beta_min = log_at_max - beta_d / 2
    return torch.expm1(beta_d * time**2 / 2 + beta_min * time).sqrt()


def _power_interpolation(u: Tensor, start: float, end: float, rho: float) -> Tensor:
    """From start (u = 0) to end (u = 1), uniform in the rho-th root; no rounding of start reaches end."""
    ends = torch.tensor([start, end], dtype=torch.float64)
    roots = ends ** (1 / rho)
    levels = ((1 - u) * roots[0] + u * roots[1]) ** rho
    if not torch.isclose(levels[[0, -1]], ends, rtol=_RANGE_TOLERANCE, atol=0).all():
        raise ValueError(_beyond_float64(rho))
    return levels


def _beyond_float64(rho: float) -> str:
    return f"rho is {rho:g}: float64 cannot hold its powers, or tell the levels apart; take one between 0.1 and 100"


def _model_grid(
    schedule_type: str, u: Tensor, sigma_min: float, sigma_max: float, rho: float, denoiser: HasModelTime | None
) -> Tensor:
    if denoiser is None:
        raise ValueError(f"the {schedule_type} schedule follows a model's own time: it needs a denoiser")
    least, most = denoiser.sigma_of_time(torch.tensor([denoiser.time_min, 1.0], dtype=torch.float64)).tolist()
    whole = math.isclose(sigma_max, most, rel_tol=_RANGE_TOLERANCE)
    for name, given, own, right in (
        ("sigma_max", sigma_max, most, whole or sigma_max < most),
        ("sigma_min", sigma_min, least, math.isclose(sigma_min, least, rel_tol=_RANGE_TOLERANCE)),
    ):
        if not right:
            raise ValueError(f"the {schedule_type} schedule has the model's own {name} = {own:.6g}; got {given:.6g}")
    first = 1.0 if whole else _time_of_sigma(denoiser, sigma_max)
    time = _power_interpolation(u, first, denoiser.time_min, rho if MODEL_TIMES[schedule_type] else 1.0)
    return denoiser.sigma_of_time(time)


def _time_of_sigma(denoiser: HasModelTime, sigma: float) -> float:
    """The time in [time_min, 1] at which the model's noise level is `sigma`, by bisection."""
    low, high = denoiser.time_min, 1.0
    while low < (middle := (low + high) / 2) < high:
        below = denoiser.sigma_of_time(torch.tensor([middle], dtype=torch.float64)).item() < sigma
        low, high = (middle, high) if below else (low, middle)
    return high


_FORMULAS: dict[str, Callable[[Tensor, float, float, float], Tensor]] = {
    "polynomial": _polynomial,
    "logsnr": _logsnr,
    "time_uniform": _time_uniform,
}
MODEL_TIMES = {"discrete": True, "flowmatch": False}
"""The schedules of a model's own time, which span its whole range; whether rho bends it."""
SCHEDULES = (*_FORMULAS, *MODEL_TIMES)
"""The names that `get_schedule` knows."""
