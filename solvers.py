"""Samplers of the probability-flow ODE: pure functions of tensors. They know no model, no file and no learning.

A frozen model is seen only through its denoised estimate D(x, σ) ≈ E[x₀ | x]. The ODE is

    dx/dσ = d(x, σ) = (x - D(x, σ)) / σ                      (Karras et al., arXiv 2206.00364, Eqs. 1 and 3)

from x = σ₀ · noise down a descending grid σ₀ > σ₁ > ... > σ_S > 0 of `num_steps` = S + 1 points. It holds for
variance-preserving models in their x / sqrt(1 + σ²) scaling, for EDM models, and for flow matching with σ in (0, 1],
where d is the velocity; so no sampler asks what kind of model it has.

Noise levels are computed in float64 before the loop; the state stays in the dtype of x. Nothing in a loop waits for the
device.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""D(x [N, ...], sigma) -> estimate of x0 [N, ...] in x's dtype.

sigma is float64: one level for all rows, 0-dim on the CPU, or one per row, [N] on the device of x."""

Callback = Callable[[int, Tensor], None]
"""Called with (0, start), then with (i + 1, state at sigmas[i + 1]) after interval i.

With `denoise_to_zero` the last call is (num_steps, denoised state). It observes: what it returns is not used."""

Advance = Callable[[Tensor, Tensor, int], Tensor]
"""One interval of a sampler: (x at sigmas[i], denoised estimate there, i) -> x at sigmas[i + 1]."""

# Weights that left a float32 softmax or a JSON file of few digits still sum to one within this.
_WEIGHT_SUM_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class EPDTable:
    """The numbers that make a solver: for each of S intervals, K points and how they are combined.

    positions  [S, K] or [B, S, K], in (0, 1): r_k places point k at the noise level σ_{i+1}^r σ_i^(1-r)
    weights    same shape, on the simplex: at least 0, sum over K is 1
    scale_dir  same shape, positive, or None for all ones: factor on the direction of each point
    scale_time same shape, positive, or None for all ones: factor on the noise level that the network is told

    With a batch dimension B each sample has a table of its own. All tensors are float32 or all float64, on one device;
    gradients flow through them. Raises ValueError, naming the field and the first entry at fault.
    """

    positions: Tensor
    weights: Tensor
    scale_dir: Tensor | None = None
    scale_time: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what is no table."""
        shape = self.positions.shape
        if len(shape) not in (2, 3) or 0 in shape:
            raise ValueError(f"EPDTable.positions must have shape [S, K] or [B, S, K], none of them 0; got {[*shape]}")
        for name, tensor in self._tensors().items():
            if tensor.shape != shape:
                raise ValueError(f"EPDTable.{name} has shape {[*tensor.shape]}, positions have {[*shape]}")
            if tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"EPDTable.{name} must be float32 or float64; got {tensor.dtype}")
            if (tensor.dtype, tensor.device) != (self.positions.dtype, self.positions.device):
                raise ValueError(
                    f"EPDTable.{name} is {tensor.dtype} on {tensor.device}, positions are {self.positions.dtype} "
                    f"on {self.positions.device}: they must agree"
                )
            _require(tensor.isfinite(), name, tensor, "be finite")
        _require((self.positions > 0) & (self.positions < 1), "positions", self.positions, "lie inside (0, 1)")
        _require(self.weights >= 0, "weights", self.weights, "be at least 0")
        sums = self.weights.detach().double().sum(-1)
        _require((sums - 1).abs() <= _WEIGHT_SUM_TOLERANCE, "weights", sums, "sum to 1 over the points")
        for name, scale in (("scale_dir", self.scale_dir), ("scale_time", self.scale_time)):
            if scale is not None:
                _require(scale > 0, name, scale, "be positive")

    @property
    def num_intervals(self) -> int:
        """S, the number of intervals."""
        return self.positions.shape[-2]

    @property
    def num_steps(self) -> int:
        """S + 1, the number of grid points that the table needs."""
        return self.num_intervals + 1

    @property
    def num_points(self) -> int:
        """K, the number of parallel evaluations in an interval."""
        return self.positions.shape[-1]

    @property
    def batch_size(self) -> int | None:
        """B where every sample has its own table, None where one table serves all."""
        return self.positions.shape[0] if self.positions.ndim == 3 else None

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> EPDTable:
        """The same table on another device or in another dtype; gradients flow back through the copy."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def detach(self) -> EPDTable:
        """The same numbers, cut from the graph that made them."""
        return self._map(Tensor.detach)

    def expand(self, batch_size: int) -> EPDTable:
        """One table for all as [B, S, K], a view: B samples with a table of their own. Needs a table without batch."""
        if self.batch_size is not None:
            raise ValueError(f"this EPDTable already holds {self.batch_size} tables: select among them instead")
        return self._map(lambda tensor: tensor.expand(batch_size, *tensor.shape))

    def select(self, samples: int | slice | Tensor) -> EPDTable:
        """The tables of some samples: [S, K] for an int, [n, S, K] for a slice or an index tensor. Needs a batch."""
        if self.batch_size is None:
            raise ValueError("this EPDTable has no batch dimension to select from")
        return self._map(lambda tensor: tensor[samples])

    def sorted_by_position(self) -> tuple[EPDTable, Tensor]:
        """Sort the points of every interval by position, weights and scales carried along.

        Returns the sorted table and a bool tensor [S] or [B, S]: True where the order changed. The sampler does not
        care (a sum over points has no order); a Dirichlet over the gaps between positions does.
        """
        order = self.positions.argsort(dim=-1, stable=True)  # [.., S, K]
        changed = (order != torch.arange(self.num_points, device=order.device)).any(-1)
        return self._map(lambda tensor: tensor.gather(-1, order)), changed

    def _tensors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> EPDTable:
        return EPDTable(**{name: function(tensor) for name, tensor in self._tensors().items()})


def epd_sampler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    table: EPDTable,
    *,
    afs: bool = False,
    denoise_to_zero: bool = False,
    parallel: bool = True,
    callback: Callback | None = None,
) -> Tensor:
    """EPD: ensemble of K parallel directions per interval (arXiv 2507.14797, Section 3; arXiv 2512.22796).

    With r, w, o = scale_dir, s = scale_time from row i of the table and a = σ_i, b = σ_{i+1}:

        τ_k = b^r_k · a^(1 - r_k)
        x_k = x + (τ_k - a) · d(x, a)
        d_k = (x_k - D(x_k, s_k τ_k)) / τ_k
        x  <- x + (b - a) · Σ_k w_k o_k d_k

    x       [B, ...], the start σ₀ · noise; the result has its shape and dtype
    sigmas  [S + 1], descending
    table   S intervals; [S, K] for all samples, or [B, S, K], one for each
    afs     the first direction is x / sqrt(1 + σ₀²) and costs no evaluation (see `_afs_estimate`)
    parallel  the K points of an interval go through the network in ONE call of B·K rows, sample-major (row b·K + k is
            point k of sample b), sigma [B·K]; False makes K calls of B rows, sigma [B]: slower, less memory, and the
            same result

    Differentiable in x and in the table. Raises ValueError where table, grid and batch do not fit together.
    """
    if table.num_steps != len(sigmas):
        raise ValueError(f"the table needs a grid of {table.num_steps} points; sigmas has {len(sigmas)}")
    if table.batch_size not in (None, len(x)):
        raise ValueError(f"the table holds {table.batch_size} samples, x holds {len(x)}")
    levels = _checked_grid(sigmas)
    rows = _epd_rows(levels, table, x)
    calls = [slice(None)] if parallel else [slice(k, k + 1) for k in range(table.num_points)]

    def advance(x: Tensor, denoised: Tensor, i: int) -> Tensor:
        slope = ((x - denoised) / levels[i])[:, None]  # [B, 1, ...]
        offsets, gains = (_unsqueeze_like(row[i], slope) for row in (rows.offsets, rows.gains))  # [B or 1, K, 1, ...]
        following = x
        for points in calls:
            x_k = x[:, None] + offsets[:, points] * slope  # [B, points, ...]
            told = rows.told[i, :, points].expand(x_k.shape[:2]).reshape(-1)  # [B * points]
            residual = x_k - denoise(x_k.flatten(0, 1), told).view_as(x_k)
            following = following + (gains[:, points] * residual).sum(1)
        return following

    return _integrate(denoise, x, levels, advance, afs=afs, denoise_to_zero=denoise_to_zero, callback=callback)


def ddim_sampler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    afs: bool = False,
    denoise_to_zero: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM, which in σ is Euler's method (Song et al., arXiv 2010.02502, Eq. 13); order 1, one evaluation.

    x <- x + (b - a) · d(x, a)            a = σ_i, b = σ_{i+1}
    """
    levels = _checked_grid(sigmas)

    def advance(x: Tensor, denoised: Tensor, i: int) -> Tensor:
        a, b = levels[i], levels[i + 1]
        return x + (b - a) * _slope(x, denoised, a)

    return _integrate(denoise, x, levels, advance, afs=afs, denoise_to_zero=denoise_to_zero, callback=callback)


def heun_sampler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    afs: bool = False,
    denoise_to_zero: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method, the deterministic EDM sampler (arXiv 2206.00364, Algorithm 1); order 2, two evaluations.

    x' = x + (b - a) · d(x, a)            a = σ_i, b = σ_{i+1}
    x <- x + (b - a) · (d(x, a) + d(x', b)) / 2
    """
    levels = _checked_grid(sigmas)

    def advance(x: Tensor, denoised: Tensor, i: int) -> Tensor:
        a, b = levels[i], levels[i + 1]
        slope = _slope(x, denoised, a)
        predicted = x + (b - a) * slope
        corrected = _slope(predicted, denoise(predicted, _scalar(b)), b)
        return x + (b - a) * (slope + corrected) / 2

    return _integrate(denoise, x, levels, advance, afs=afs, denoise_to_zero=denoise_to_zero, callback=callback)


def dpm2_sampler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    r: float = 0.5,
    afs: bool = False,
    denoise_to_zero: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver-2, written in σ (Lu et al., arXiv 2206.00927, Algorithm 1; any r: Algorithm 4).

        m  = b^r · a^(1 - r)                  a = σ_i, b = σ_{i+1}
        x' = x + (m - a) · d(x, a)
        x <- x + (b - a) · ( d(x', m) / (2r) + (1 - 1/(2r)) · d(x, a) )

    Two evaluations; order 2. r in (0, 1]; 1 is Heun's method; 0.5 is EPD with one point in the middle.
    """
    if not 0 < r <= 1:
        raise ValueError(f"dpm2 needs r in (0, 1]; got {r}")
    levels = _checked_grid(sigmas)

    def advance(x: Tensor, denoised: Tensor, i: int) -> Tensor:
        a, b = levels[i], levels[i + 1]
        middle = b**r * a ** (1 - r)
        slope = _slope(x, denoised, a)
        point = x + (middle - a) * slope
        middle_slope = _slope(point, denoise(point, _scalar(middle)), middle)
        return x + (b - a) * (middle_slope / (2 * r) + (1 - 1 / (2 * r)) * slope)

    return _integrate(denoise, x, levels, advance, afs=afs, denoise_to_zero=denoise_to_zero, callback=callback)


_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def ipndm_sampler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    max_order: int = 4,
    afs: bool = False,
    denoise_to_zero: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """iPNDM: Adams-Bashforth on the past directions, started at low order (Zhang & Chen, arXiv 2204.13902).

        x <- x + (b - a) · Σ_j c_j d(x_{i-j}, σ_{i-j})            a = σ_i, b = σ_{i+1}

    c are the Adams-Bashforth coefficients of order min(max_order, i + 1), those for equal steps whatever the grid (the
    linear multi-step method of PNDM, Liu et al., arXiv 2202.09778). One evaluation. max_order in 1..4; 1 is DDIM.
    """
    if max_order not in _ADAMS_BASHFORTH:
        raise ValueError(f"ipndm needs max_order in {list(_ADAMS_BASHFORTH)}; got {max_order}")
    levels = _checked_grid(sigmas)
    slopes: deque[Tensor] = deque(maxlen=max_order)  # the newest first

    def advance(x: Tensor, denoised: Tensor, i: int) -> Tensor:
        a, b = levels[i], levels[i + 1]
        slopes.appendleft(_slope(x, denoised, a))
        coefficients = _ADAMS_BASHFORTH[len(slopes)]
        return x + (b - a) * _weighted_sum(coefficients, slopes)

    return _integrate(denoise, x, levels, advance, afs=afs, denoise_to_zero=denoise_to_zero, callback=callback)


def dpmpp_sampler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    max_order: int = 3,
    predict_x0: bool = True,
    lower_order_final: bool = True,
    afs: bool = False,
    denoise_to_zero: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++ multistep, one evaluation (Lu et al., arXiv 2211.01095, Algorithm 2 is 2M in data prediction).

    In λ = -log σ the linear part of the ODE is solved exactly and the rest is extrapolated from past estimates m0 (the
    newest), m1, m2. With h = λ_{i+1} - λ_i, and D1, D2 for h dm/dλ and h²/2 d²m/dλ² by differences (`_dpmpp_weights`):

        predict_x0, m = D(x, σ):   x <- (b/a) x - φ1 m0 + φ2 D1 - φ3 D2,   φ1 = e^-h - 1, φ2 = φ1/h + 1, φ3 = φ2/h - 1/2
        otherwise,  m = d(x, σ):   x <- x - b (φ1 m0 + φ2 D1 + φ3 D2),     φ1 = e^h - 1,  φ2 = φ1/h - 1, φ3 = φ2/h - 1/2

    The first intervals run at the order that their history allows. With `lower_order_final` the order, once it has
    reached max_order, comes down to 1 at the end, which steadies runs of few steps. max_order in 1..3; 1 is DDIM.

    3M is the rule of the authors' code and of its ports. Exact for m linear in λ, it would be so for quadratic m with
    2 φ3 in place of φ3; as published it converges with order 2.
    """
    if max_order not in (1, 2, 3):
        raise ValueError(f"dpmpp needs max_order in [1, 2, 3]; got {max_order}")
    levels = _checked_grid(sigmas)
    num_intervals = len(levels) - 1
    estimates: deque[Tensor] = deque(maxlen=max_order)  # the newest first

    def advance(x: Tensor, denoised: Tensor, i: int) -> Tensor:
        estimates.appendleft(denoised if predict_x0 else _slope(x, denoised, levels[i]))
        order = len(estimates)
        if lower_order_final and order == max_order:
            order = min(order, num_intervals - i)
        a, b = levels[i], levels[i + 1]
        weights = _dpmpp_weights(levels[: i + 2], order, predict_x0=predict_x0)
        kept, gain = (b / a, 1.0) if predict_x0 else (1.0, b)
        return kept * x - gain * _weighted_sum(weights, estimates)

    return _integrate(denoise, x, levels, advance, afs=afs, denoise_to_zero=denoise_to_zero, callback=callback)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "epd": epd_sampler,
    "ddim": ddim_sampler,
    "heun": heun_sampler,
    "dpm2": dpm2_sampler,
    "dpmpp": dpmpp_sampler,
    "ipndm": ipndm_sampler,
}
"""Every sampler by name. `epd` takes a table after the grid, the others do not."""

_CALLS_PER_INTERVAL = {"epd": 2, "ddim": 1, "heun": 2, "dpm2": 2, "dpmpp": 1, "ipndm": 1}


class NetworkEvaluations(NamedTuple):
    """What one sample costs, before guidance (which doubles both where it needs an unconditional half)."""

    parallel: int
    """Network calls one after another when the K points share a call: the latency, and the "NFE" of tables."""
    total: int
    """Network rows: the computation. Differs from `parallel` for `epd` with more than one point."""


def network_evaluations(
    sampler: str, num_steps: int, *, num_points: int = 1, afs: bool = False, denoise_to_zero: bool = False
) -> NetworkEvaluations:
    """Count the evaluations that a sampler spends on a grid of `num_steps` points; `num_points` is K of `epd`.

    Raises ValueError for an unknown sampler, fewer than 2 grid points, or more than one point outside `epd`.
    """
    per_interval = _calls_per_interval(sampler)
    if num_steps < 2:
        raise ValueError(f"num_steps counts grid points, at least 2; got {num_steps}")
    if num_points < 1 or (num_points > 1 and sampler != "epd"):
        raise ValueError(f"num_points must be 1, or more with epd; got {num_points} with {sampler}")
    intervals = num_steps - 1
    parallel = per_interval * intervals - afs + denoise_to_zero
    return NetworkEvaluations(parallel=parallel, total=parallel + (num_points - 1) * intervals)


def num_steps_for(sampler: str, parallel_evaluations: int, *, afs: bool = False, denoise_to_zero: bool = False) -> int:
    """Grid points on which a sampler spends exactly this many parallel evaluations (inverse of `network_evaluations`).

    Raises ValueError for an unknown sampler and for a budget that no whole number of intervals meets.
    """
    per_interval = _calls_per_interval(sampler)
    intervals, rest = divmod(parallel_evaluations + afs - denoise_to_zero, per_interval)
    if rest or intervals < 1:
        raise ValueError(
            f"{sampler} cannot spend exactly {parallel_evaluations} evaluations (afs={afs}, "
            f"denoise_to_zero={denoise_to_zero}): it makes {per_interval} in each interval"
        )
    return intervals + 1


def _calls_per_interval(sampler: str) -> int:
    if sampler not in _CALLS_PER_INTERVAL:
        raise ValueError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    return _CALLS_PER_INTERVAL[sampler]


def _integrate(
    denoise: Denoise,
    x: Tensor,
    levels: list[float],
    advance: Advance,
    *,
    afs: bool,
    denoise_to_zero: bool,
    callback: Callback | None,
) -> Tensor:
    """Drive a one-interval rule down the grid: estimate at the start of each interval, advance, show."""
    observe = callback or _ignore
    observe(0, x)
    for i in range(len(levels) - 1):
        denoised = _afs_estimate(x, levels[0]) if afs and i == 0 else denoise(x, _scalar(levels[i]))
        x = advance(x, denoised, i)
        observe(i + 1, x)
    if denoise_to_zero:
        x = denoise(x, _scalar(levels[-1]))
        observe(len(levels), x)
    return x


def _ignore(done: int, x: Tensor) -> None:
    """Observe nothing."""


def _afs_estimate(x: Tensor, sigma: float) -> Tensor:
    """Analytical first step (Dockhorn et al., arXiv 2210.05475): the estimate whose direction is x / sqrt(1 + σ²).

    At large σ nearly all of x is noise, and x / sqrt(1 + σ²) is what a network answers there. It presumes data of about
    unit variance and σ₀ far above 1, so it does not suit flow matching, which starts at σ = 1.
    """
    return x * (1 - sigma / math.sqrt(1 + sigma**2))


def _slope(x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """d(x, σ) = (x - D) / σ."""
    return (x - denoised) / sigma


def _scalar(sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float64)


def _weighted_sum(weights: Sequence[float], tensors: Iterable[Tensor]) -> Tensor:
    """Σ weight · tensor over the first len(weights) tensors."""
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=False)]).sum(0)


def _dpmpp_weights(levels: list[float], order: int, *, predict_x0: bool) -> tuple[float, ...]:
    """Factors of m0, m1, m2 in φ1 m0 ∓ φ2 D1 + φ3 D2 (minus for data prediction); the interval ends at levels[-1].

    With r0 h, r1 h the lengths of the two intervals before it, the differences (m0 - m1)/r0 and (m1 - m2)/r1 give
    D1 = (m0 - m1)/r0 + r0 D2 and D2 = ((m0 - m1)/r0 - (m1 - m2)/r1) / (r0 + r1). The second-order rule has φ1/2 in
    place of ∓φ2: equal to leading order, and its authors' choice.
    """
    lengths = [math.log(a / b) for a, b in pairwise(levels[-order - 1 :])]
    h = lengths[-1]
    sign = -1.0 if predict_x0 else 1.0
    phi_1 = math.expm1(sign * h)
    if order == 1:
        return (phi_1,)
    r0 = lengths[-2] / h
    if order == 2:
        newer = phi_1 / (2 * r0)
        return phi_1 + newer, -newer
    r1 = lengths[-3] / h
    phi_2 = phi_1 / h - sign
    phi_3 = phi_2 / h - 0.5
    newer = (sign * phi_2 * (2 * r0 + r1) + phi_3) / ((r0 + r1) * r0)  # factor of m0 - m1
    older = -(sign * phi_2 * r0 + phi_3) / ((r0 + r1) * r1)  # factor of m1 - m2
    return phi_1 + newer, older - newer, -older


class _EPDRows(NamedTuple):
    """A table on a grid: what the EPD loop needs, for all intervals at once; [S, B or 1, K] each, on the device of x.

    told     noise levels told to the network, s_k τ_k; float64
    offsets  steps to the points, τ_k - σ_i; in the dtype of x
    gains    factors of x_k - D(x_k, s_k τ_k) in the update, (σ_{i+1} - σ_i) w_k o_k / τ_k; in the dtype of x
    """

    told: Tensor
    offsets: Tensor
    gains: Tensor


def _epd_rows(levels: list[float], table: EPDTable, x: Tensor) -> _EPDRows:
    positions, weights = _by_interval(table.positions), _by_interval(table.weights)
    ones = torch.ones_like(positions)
    scale_dir = ones if table.scale_dir is None else _by_interval(table.scale_dir)
    scale_time = ones if table.scale_time is None else _by_interval(table.scale_time)
    grid = torch.tensor(levels, dtype=torch.float64, device=positions.device)[:, None, None]
    current, following = grid[:-1], grid[1:]
    points = following**positions * current ** (1 - positions)
    return _EPDRows(
        told=(scale_time * points).to(x.device),
        offsets=(points - current).to(x),
        gains=((following - current) * weights * scale_dir / points).to(x),
    )


def _by_interval(rows: Tensor) -> Tensor:
    """A field of a table, [S, K] or [B, S, K], as float64 [S, 1 or B, K]."""
    return rows.double().unsqueeze(1) if rows.ndim == 2 else rows.double().transpose(0, 1)


def _unsqueeze_like(row: Tensor, x: Tensor) -> Tensor:
    """[B, K] -> [B, K, 1, ...] with the number of dimensions of x."""
    return row.reshape(*row.shape, *[1] * (x.ndim - row.ndim))


def _checked_grid(sigmas: Tensor) -> list[float]:
    """The noise levels as numbers; ValueError unless [n >= 2], finite, positive and strictly descending."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas must be a grid [num_steps] of at least 2 points; got shape {[*sigmas.shape]}")
    levels = sigmas.detach().double().tolist()
    if not all(math.isfinite(level) and level > 0 for level in levels):
        raise ValueError(f"sigmas must be finite and positive; got {levels}")
    if any(a <= b for a, b in pairwise(levels)):
        raise ValueError(f"sigmas must descend strictly; got {levels}")
    return levels


def _require(fine: Tensor, name: str, values: Tensor, rule: str) -> None:
    """Raise ValueError for the first entry of an EPDTable field that is not fine; it says which and what it holds."""
    if not fine.all():
        index = (~fine).nonzero()[0].tolist()
        raise ValueError(f"EPDTable.{name} must {rule}; entry {index} is {values[tuple(index)].item():.9g}")
