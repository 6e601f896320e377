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

import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Denoise = Callable[..., Tensor]
"""D(x [N, ...], sigma) -> estimate of x0 [N, ...] in x's dtype.

sigma is float64: one level for all rows, 0-dim on the CPU, or one per row, [N] on the device of x. A table with a
guidance column asks D(x, sigma, guidance), guidance [N] float64 on the CPU: whoever calls the network sees there which
rows need no guidance, without waiting for a device."""

Callback = Callable[[int, Tensor], None]
"""Called with (0, start), then with (i + 1, state at sigmas[i + 1]) after interval i.

With `denoise_to_zero` the last call is (num_steps, denoised state). It observes: what it returns is not used."""

Advance = Callable[[Tensor, Tensor, int], Tensor]
"""One interval of a sampler: (x at sigmas[i], denoised estimate there, i) -> x at sigmas[i + 1]."""

# Weights that left a float32 softmax or a JSON file of few digits still sum to one within this.
_WEIGHT_SUM_TOLERANCE = 1e-5


class Rule(NamedTuple):
    """What the numbers of a column must be."""

    text: str
    """For people, after "must"."""
    holds: Callable[[Tensor], Tensor]
    """Whether each number is as it must be: a bool tensor of their shape."""
    of: Callable[[Tensor], Tensor] = Tensor.detach
    """The numbers in question: the column's entries, or something made of them."""


@dataclass(frozen=True)
class Column:
    """A column of the solver table. It is declared once, in `COLUMNS`; all that handles tables goes by that.

    name      the field of `EPDTable`
    per       what each interval's row has an entry for: each of its K points; each of its 1 + K evaluations, the one at
              the interval's start first; or each of the S intervals
    neutral   the entry that changes nothing, and stands for a column that is left out. None where there is no such
              number: positions and weights cannot be left out, and without guidance the caller's constant holds
    rules     what the entries must be
    optional  whether a table may leave it out
    """

    name: str
    per: Literal["point", "evaluation", "interval"]
    neutral: float | None
    rules: tuple[Rule, ...]
    optional: bool = True

    def shape(self, num_intervals: int, num_points: int) -> tuple[int, int]:
        """The shape in a table of S intervals and K points, without a batch dimension."""
        return num_intervals, {"point": num_points, "evaluation": 1 + num_points, "interval": num_intervals}[self.per]

    def check(self, entries: Tensor) -> None:
        """Raise ValueError for the first number that breaks a rule; it says which and what it is."""
        for rule in (_FINITE, *self.rules):
            numbers = rule.of(entries)
            fine = rule.holds(numbers)
            if not fine.all():
                index = (~fine).nonzero()[0].tolist()
                found = numbers[tuple(index)].item()
                raise ValueError(f"EPDTable.{self.name} must {rule.text}; entry {index} is {found:.9g}")


_FINITE = Rule("be finite", Tensor.isfinite)
_POSITIVE = Rule("be positive", lambda scale: scale > 0)
_INSIDE = Rule("lie inside (0, 1)", lambda position: (position > 0) & (position < 1))
_NOT_NEGATIVE = Rule("be at least 0", lambda entry: entry >= 0)
_SUM_TO_ONE = Rule(
    "sum to 1 over the points",
    lambda sums: (sums - 1).abs() <= _WEIGHT_SUM_TOLERANCE,
    of=lambda weights: weights.detach().double().sum(-1) if weights.shape[-1] else torch.ones(weights.shape[:-1]),
)
_EARLIER_ONLY = Rule(
    "be strictly lower triangular, for an interval has only earlier ones to look back to",
    lambda entries: entries == 0,
    of=lambda history: history.detach().triu(),
)

COLUMNS = (
    Column("positions", "point", None, (_INSIDE,), optional=False),
    Column("weights", "point", None, (_NOT_NEGATIVE, _SUM_TO_ONE), optional=False),
    Column("scale_dir", "point", 1.0, (_POSITIVE,)),
    Column("scale_time", "point", 1.0, (_POSITIVE,)),
    Column("guidance", "evaluation", None, (_NOT_NEGATIVE,)),
    Column("history", "interval", 0.0, (_EARLIER_ONLY,)),
    Column("direction_history", "interval", 0.0, (_EARLIER_ONLY,)),
)
"""The columns of `EPDTable`, in the order of its fields."""


@dataclass(frozen=True, eq=False)
class EPDTable:
    """The numbers that make a solver: for each of S intervals, K points, how they are combined, and what is remembered.

    positions  [S, K], in (0, 1): r_k places point k at the noise level σ_{i+1}^r σ_i^(1-r)
    weights    [S, K], on the simplex: at least 0, sum over K is 1
    scale_dir  [S, K], positive: factor on the direction of each point; None for all ones
    scale_time [S, K], positive: factor on the noise level that the network is told; None for all ones
    guidance   [S, 1 + K], at least 0: guidance scale of each evaluation, the one at the interval's start first; None
               for what the caller has bound
    history    [S, S], strictly lower triangular: entry [i, j] draws the estimate at the start of interval i towards
               that of interval j; None for all 0
    direction_history  [S, S], likewise for the direction at the start of the interval (see `with_ipndm_history`)

    K may be 0: then every interval is one evaluation. Every column may have a batch dimension [B, ...] in front, which
    gives each sample a table of its own; those without one are then the same for all samples. All tensors are float32
    or all float64, on one device; gradients flow through them. `epd_sampler` says what the numbers do.
    Raises ValueError, naming the field and the first entry at fault.
    """

    positions: Tensor
    weights: Tensor
    scale_dir: Tensor | None = None
    scale_time: Tensor | None = None
    guidance: Tensor | None = None
    history: Tensor | None = None
    direction_history: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what is no table, and give every column the batch dimension that one of them has."""
        sizes = self.positions.shape
        if len(sizes) not in (2, 3) or 0 in sizes[:-1]:
            raise ValueError(
                f"EPDTable.positions must have shape [S, K] or [B, S, K], S and B at least 1; got {[*sizes]}"
            )
        batches: dict[int, str] = {}
        for column in COLUMNS:
            entries = getattr(self, column.name)
            if entries is not None:
                self._check(column, entries)
                if entries.ndim == 3:
                    batches.setdefault(len(entries), column.name)
        if len(batches) > 1:
            held = ", ".join(f"EPDTable.{name} holds {size} tables" for size, name in batches.items())
            raise ValueError(f"{held}: they must agree")
        for name, entries in self.columns().items():
            if batches and entries.ndim == 2:
                object.__setattr__(self, name, entries.expand(*batches, -1, -1))

    def _check(self, column: Column, entries: Tensor) -> None:
        sizes, wanted = self.positions.shape, column.shape(self.num_intervals, self.num_points)
        if entries.ndim not in (2, 3) or entries.shape[-2:] != wanted or len(entries) == 0:
            raise ValueError(
                f"EPDTable.{column.name} has shape {[*entries.shape]}, positions have {[*sizes]}: "
                f"it must be {[*wanted]}"
            )
        if entries.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"EPDTable.{column.name} must be float32 or float64; got {entries.dtype}")
        if (entries.dtype, entries.device) != (self.positions.dtype, self.positions.device):
            raise ValueError(
                f"EPDTable.{column.name} is {entries.dtype} on {entries.device}, positions are {self.positions.dtype} "
                f"on {self.positions.device}: they must agree"
            )
        column.check(entries)

    def columns(self) -> dict[str, Tensor]:
        """The columns that this table has, by name, in the order of `COLUMNS`: `EPDTable(**table.columns())` is it."""
        present = {column.name: getattr(self, column.name) for column in COLUMNS}
        return {name: entries for name, entries in present.items() if entries is not None}

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
        """K, the number of parallel evaluations in an interval; 0 where the one at its start is all."""
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
        """One table for all as a batch of B, a view: samples with a table of their own. Needs a table without batch."""
        if self.batch_size is not None:
            raise ValueError(f"this EPDTable already holds {self.batch_size} tables: select among them instead")
        return self._map(lambda tensor: tensor.expand(batch_size, *tensor.shape))

    def select(self, samples: int | slice | Tensor) -> EPDTable:
        """The tables of some samples: one for an int, a batch for a slice or an index tensor. Needs a batch."""
        if self.batch_size is None:
            raise ValueError("this EPDTable has no batch dimension to select from")
        return self._map(lambda tensor: tensor[samples])

    def sorted_by_position(self) -> tuple[EPDTable, Tensor]:
        """Sort the points of every interval by position, and all that belongs to a point along with it.

        Returns the sorted table and a bool tensor [S] or [B, S]: True where the order changed. The sampler does not
        care (a sum over points has no order); a Dirichlet over the gaps between positions does.
        """
        order = self.positions.argsort(dim=-1, stable=True)  # [.., S, K]
        changed = (order != torch.arange(self.num_points, device=order.device)).any(-1)
        with_base = torch.cat([order.new_zeros((*order.shape[:-1], 1)), order + 1], dim=-1)  # [.., S, 1 + K]
        orders = {"point": order, "evaluation": with_base}
        moved = {
            column.name: getattr(self, column.name).gather(-1, orders[column.per])
            for column in COLUMNS
            if column.name in self.columns() and column.per in orders
        }
        return replace(self, **moved), changed

    def evaluations(self, *, afs: bool = False, guidance_scale: float = 1.0) -> NetworkEvaluations:
        """What one sample costs with this table; `guidance_scale` is the caller's where the table has no guidance.

        Raises ValueError for a batch of tables: their rows may differ.
        """
        if self.batch_size is not None:
            raise ValueError(f"this EPDTable holds {self.batch_size} tables: select the one to count")
        guidance = guidance_scale if self.guidance is None else self.guidance
        return network_evaluations("epd", self.num_steps, num_points=self.num_points, afs=afs, guidance=guidance)

    def _map(self, function: Callable[[Tensor], Tensor]) -> EPDTable:
        return EPDTable(**{name: function(entries) for name, entries in self.columns().items()})


def epd_sampler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    table: EPDTable,
    *,
    afs: bool = False,
    denoise_to_zero: bool = False,
    parallel: bool = True,
    first: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """EPD: ensemble of K parallel directions per interval (arXiv 2507.14797, Section 3; arXiv 2512.22796), and its kin.

    With r, w, o = scale_dir, s = scale_time, g = guidance, h = history, q = direction_history from row i of the table,
    a = σ_i and b = σ_{i+1}:

        D̄_i = D_i + Σ_j h_j (D_j - D_i)          D_i = D(x, a; g_0), or with AFS in the first interval its estimate
        c_i = (x - D̄_i) / a
        d   = c_i + Σ_j q_j (c_j - c_i)
        τ_k = b^r_k · a^(1 - r_k)
        x_k = x + (τ_k - a) · d
        d_k = (x_k - D(x_k, s_k τ_k; g_k)) / τ_k
        x  <- x + (b - a) · Σ_k w_k o_k d_k       without points, K = 0:  x <- x + (b - a) · d

    x       [B, ...], the start σ₀ · noise; the result has its shape and dtype
    sigmas  [S + 1], descending; or [B, S + 1], a grid for each sample
    table   S intervals; one for all samples, or a batch of B, one for each
    afs     the first direction is x / sqrt(1 + σ₀²) and costs no evaluation (see `_afs_estimate`)
    denoise_to_zero  one more evaluation at σ_S, with the last interval's g_0
    parallel  the K points of an interval go through the network in ONE call of B·K rows, sample-major (row b·K + k is
            point k of sample b), sigma and guidance [B·K]; False makes K calls of B rows: slower, less memory, and the
            same result
    first   D(x, σ₀; g_0) of the first interval where it is known, x's shape and dtype: then it is not asked

    Differentiable in x, in the table and in sigmas. Raises ValueError where table, grid and batch do not fit together.
    """
    steps = EPDSteps(denoise, table, sigmas, x, afs=afs, parallel=parallel, first=first)
    return _march(x, len(steps), steps.interval, steps.to_zero if denoise_to_zero else None, callback)


class EPDSteps:
    """`epd_sampler` interval by interval; one object for one run from noise to image.

        steps = EPDSteps(denoise, table, sigmas, x)
        for i in range(len(steps)):
            x = steps.interval(i, x)

    The object remembers what the columns `history` and `direction_history` look back to; they pass over intervals that
    were not run, so a run may start in the middle of the grid. Arguments and errors are `epd_sampler`'s; of x only
    shape, dtype and device count.
    """

    def __init__(
        self,
        denoise: Denoise,
        table: EPDTable,
        sigmas: Tensor,
        x: Tensor,
        *,
        afs: bool = False,
        parallel: bool = True,
        first: Tensor | None = None,
    ) -> None:
        """Multiply the table out on its grid."""
        levels = _checked_grid(sigmas)
        if table.num_steps != levels.shape[-1]:
            raise ValueError(f"the table needs a grid of {table.num_steps} points; sigmas has {levels.shape[-1]}")
        if table.batch_size not in (None, len(x)):
            raise ValueError(f"the table holds {table.batch_size} samples, x holds {len(x)}")
        if levels.ndim == 2 and len(levels) != len(x):
            raise ValueError(f"sigmas hold {len(levels)} grids, x holds {len(x)} samples")
        self._denoise, self._afs, self._parallel, self._first = denoise, afs, parallel, first
        self._num_points = table.num_points
        # Nobody waits for these copies: the host goes on to queue up the network's calls.
        brought = partial(torch.Tensor.to, device=x.device, non_blocking=True)
        self._levels = levels.cpu() if levels.ndim == 1 else brought(levels.T)  # [S + 1] or [S + 1, B]
        rows = {name: _by_interval(entries) for name, entries in table.columns().items()}  # [S, B or 1, ...]
        grid = levels.to(rows["positions"].device)
        grid = grid[:, None, None] if grid.ndim == 1 else grid.T[..., None]  # [S + 1, B or 1, 1]
        current, following = grid[:-1], grid[1:]
        points = following ** rows["positions"] * current ** (1 - rows["positions"])
        self._told = brought(points * rows.get("scale_time", 1.0))
        self._offsets = brought(points - current, dtype=x.dtype)
        self._gains = brought(
            (following - current) * rows["weights"] * rows.get("scale_dir", 1.0) / points, dtype=x.dtype
        )
        self._guidance = rows["guidance"].cpu() if "guidance" in rows else None
        self._history, self._direction_history = (
            brought(rows[name], dtype=x.dtype) if name in rows else None for name in ("history", "direction_history")
        )
        self._estimates: dict[int, Tensor] = {}
        self._directions: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """S, the number of intervals."""
        return len(self._levels) - 1

    def interval(self, i: int, x: Tensor) -> Tensor:
        """From x at sigmas[i] to the state at sigmas[i + 1]."""
        a, step = (_like(level, x) for level in (self._levels[i], self._levels[i + 1] - self._levels[i]))
        denoised = None
        if i == 0:
            denoised = _afs_estimate(x, a) if self._afs else self._first
        if denoised is None:
            denoised = self._ask(i, x, self._levels[i])
        denoised = _recalling(self._history, i, denoised, self._estimates)
        direction = _recalling(self._direction_history, i, _slope(x, denoised, a), self._directions)
        if self._num_points == 0:
            return x + step * direction
        direction = direction[:, None]  # [B, 1, ...]
        offsets, gains = (_like(row[i], direction) for row in (self._offsets, self._gains))  # [B or 1, K, 1, ...]
        following = x
        for points in [slice(None)] if self._parallel else [slice(k, k + 1) for k in range(self._num_points)]:
            x_k = x[:, None] + offsets[:, points] * direction  # [B, points, ...]
            told = self._told[i, :, points].expand(x_k.shape[:2]).reshape(-1)  # [B * points]
            residual = x_k - self._ask(i, x_k.flatten(0, 1), told, points).view_as(x_k)
            following = following + (gains[:, points] * residual).sum(1)
        return following

    def to_zero(self, x: Tensor) -> Tensor:
        """From x at the last level to its estimate."""
        return self._ask(len(self) - 1, x, self._levels[-1])

    def _ask(self, i: int, x: Tensor, sigma: Tensor, points: slice | None = None) -> Tensor:
        """The estimate at the points, or at the interval's start; x holds their rows, sample-major."""
        if self._guidance is None:
            return self._denoise(x, sigma)
        row = self._guidance[i, :, :1] if points is None else self._guidance[i, :, 1:][:, points]  # [B or 1, n]
        return self._denoise(x, sigma, row.expand(len(x) // row.shape[1], -1).reshape(-1))


def _classical(rule: Callable[..., Advance]) -> Callable[..., Tensor]:
    """The sampler (denoise, x, sigmas, *, afs=False, denoise_to_zero=False, callback=None, ...) of a one-interval rule.

    It drives the rule down the grid: estimate at the start of each interval, then advance. The rule is made anew for
    each run, of `denoise`, the grid's levels and the options that are its own.
    """

    def sampler(
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        *,
        afs: bool = False,
        denoise_to_zero: bool = False,
        callback: Callback | None = None,
        **own: Any,
    ) -> Tensor:
        levels = _one_grid(sigmas)
        advance = rule(denoise, levels, **own)

        def step(i: int, x: Tensor) -> Tensor:
            analytic = afs and i == 0
            return advance(x, _afs_estimate(x, levels[0]) if analytic else denoise(x, _scalar(levels[i])), i)

        final = (lambda x: denoise(x, _scalar(levels[-1]))) if denoise_to_zero else None
        return _march(x, len(levels) - 1, step, final, callback)

    sampler.__name__, sampler.__doc__ = rule.__name__, rule.__doc__
    return sampler


@_classical
def ddim_sampler(denoise: Denoise, levels: list[float]) -> Advance:
    """DDIM, which in σ is Euler's method (Song et al., arXiv 2010.02502, Eq. 13); order 1, one evaluation.

    x <- x + (b - a) · d(x, a)            a = σ_i, b = σ_{i+1}
    """

    def advance(x: Tensor, denoised: Tensor, i: int) -> Tensor:
        a, b = levels[i], levels[i + 1]
        return x + (b - a) * _slope(x, denoised, a)

    return advance


@_classical
def heun_sampler(denoise: Denoise, levels: list[float]) -> Advance:
    """Heun's method, the deterministic EDM sampler (arXiv 2206.00364, Algorithm 1); order 2, two evaluations.

    x' = x + (b - a) · d(x, a)            a = σ_i, b = σ_{i+1}
    x <- x + (b - a) · (d(x, a) + d(x', b)) / 2
    """

    def advance(x: Tensor, denoised: Tensor, i: int) -> Tensor:
        a, b = levels[i], levels[i + 1]
        slope = _slope(x, denoised, a)
        predicted = x + (b - a) * slope
        corrected = _slope(predicted, denoise(predicted, _scalar(b)), b)
        return x + (b - a) * (slope + corrected) / 2

    return advance


@_classical
def dpm2_sampler(denoise: Denoise, levels: list[float], *, r: float = 0.5) -> Advance:
    """DPM-Solver-2, written in σ (Lu et al., arXiv 2206.00927, Algorithm 1; any r: Algorithm 4).

        m  = b^r · a^(1 - r)                  a = σ_i, b = σ_{i+1}
        x' = x + (m - a) · d(x, a)
        x <- x + (b - a) · ( d(x', m) / (2r) + (1 - 1/(2r)) · d(x, a) )

    Two evaluations; order 2. r in (0, 1]; 1 is Heun's method; 0.5 is EPD with one point in the middle.
    """
    if not 0 < r <= 1:
        raise ValueError(f"dpm2 needs r in (0, 1]; got {r}")

    def advance(x: Tensor, denoised: Tensor, i: int) -> Tensor:
        a, b = levels[i], levels[i + 1]
        middle = b**r * a ** (1 - r)
        slope = _slope(x, denoised, a)
        point = x + (middle - a) * slope
        middle_slope = _slope(point, denoise(point, _scalar(middle)), middle)
        return x + (b - a) * (middle_slope / (2 * r) + (1 - 1 / (2 * r)) * slope)

    return advance


_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@_classical
def ipndm_sampler(denoise: Denoise, levels: list[float], *, max_order: int = 4) -> Advance:
    """iPNDM: Adams-Bashforth on the past directions, started at low order (Zhang & Chen, arXiv 2204.13902).

        x <- x + (b - a) · Σ_j c_j d(x_{i-j}, σ_{i-j})            a = σ_i, b = σ_{i+1}

    c are the Adams-Bashforth coefficients of order min(max_order, i + 1), those for equal steps whatever the grid (the
    linear multi-step method of PNDM, Liu et al., arXiv 2202.09778). One evaluation. max_order in 1..4; 1 is DDIM.
    """
    _require_order("ipndm", max_order, _ADAMS_BASHFORTH)
    slopes: deque[Tensor] = deque(maxlen=max_order)  # the newest first

    def advance(x: Tensor, denoised: Tensor, i: int) -> Tensor:
        a, b = levels[i], levels[i + 1]
        slopes.appendleft(_slope(x, denoised, a))
        coefficients = _ADAMS_BASHFORTH[len(slopes)]
        return x + (b - a) * _weighted_sum(coefficients, slopes)

    return advance


_DPMPP_ORDERS = (1, 2, 3)


@_classical
def dpmpp_sampler(
    denoise: Denoise,
    levels: list[float],
    *,
    max_order: int = 3,
    predict_x0: bool = True,
    lower_order_final: bool = True,
) -> Advance:
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
    _require_order("dpmpp", max_order, _DPMPP_ORDERS)
    num_intervals = len(levels) - 1
    estimates: deque[Tensor] = deque(maxlen=max_order)  # the newest first

    def advance(x: Tensor, denoised: Tensor, i: int) -> Tensor:
        estimates.appendleft(denoised if predict_x0 else _slope(x, denoised, levels[i]))
        order = _dpmpp_order(i, num_intervals, max_order, lower_order_final=lower_order_final)
        a, b = levels[i], levels[i + 1]
        weights = _dpmpp_weights(levels[: i + 2], order, predict_x0=predict_x0)
        kept, gain = (b / a, 1.0) if predict_x0 else (1.0, b)
        return kept * x - gain * _weighted_sum(weights, estimates)

    return advance


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "epd": epd_sampler,
    "ddim": ddim_sampler,
    "heun": heun_sampler,
    "dpm2": dpm2_sampler,
    "dpmpp": dpmpp_sampler,
    "ipndm": ipndm_sampler,
}
"""Every sampler by name. `epd` takes a table after the grid, the others do not."""


def classical_table(sampler: str, sigmas: Tensor, **options: Any) -> EPDTable:
    """A classical sampler as a table for this grid [S + 1], exactly: `epd_sampler` with it makes the same states.

        ddim                                                           K = 0
        ipndm   max_order=4                                            K = 0, with history
        dpmpp   max_order=3, predict_x0=True, lower_order_final=True   K = 0, with history
        dpm2    r=0.5, no other                                        K = 1: r = 1/2, w = 1

    Every consistent linear multistep sampler is a table with K = 0. In u = x / σ and t = 1 / σ an interval of such a
    table, x <- (b/a) x + (1 - b/a) D̄_i, is

        u_{i+1} = u_i + (t_{i+1} - t_i) D̄_i,      D̄_i = Σ_j C_ij D_j,   Σ_j C_ij = 1,   h_ij = C_ij for j < i

    A rule that combines estimates (dpmpp in data prediction) states C itself. One that combines directions,
    x <- x + (b - a) Σ_j c_ij d_j with Σ_j c_ij = 1 (ipndm; dpmpp in noise prediction), asks for earlier states,
    d_j = u_j - t_j D_j; but by the update itself u_i - u_j = Σ_{j <= l < i} (t_{l+1} - t_l) D̄_l, so that

        t_i C_i = Σ_j c_ij (t_j e_j + Σ_{j <= l < i} (t_{l+1} - t_l) C_l)

    with e_j the unit vectors: rows again, of sum 1. They reach back to the first interval whatever the order. With
    points (K > 0) the states take another way and this no longer holds; see `with_ipndm_history`.

    Returns a float64 table on the CPU. Raises ValueError for a sampler that is no table, an option that it does not
    have or cannot take, and what is no grid.
    """
    if sampler not in _CLASSICAL_TABLES:
        raise ValueError(f"{sampler!r} is no table; {', '.join(_CLASSICAL_TABLES)} are")
    make = _CLASSICAL_TABLES[sampler]
    known = [name for name in inspect.signature(make).parameters if name != "levels"]
    for name in options:
        if name not in known:
            raise ValueError(f"{sampler} has no option {name!r} as a table; it has {', '.join(known) or 'none'}")
    return make(_one_grid(sigmas), **options)


def with_ipndm_history(table: EPDTable, max_order: int = 4) -> EPDTable:
    """EPD's plug-in for iPNDM (arXiv 2507.14797): the points of every interval are reached by iPNDM's direction.

    The Adams-Bashforth combination of the directions d(x_j, σ_j) enters as the column `direction_history`, on any grid.
    The column `history` cannot say it: between the starts of two intervals lies a step that the points make, whose
    estimates are no combination of those at the starts. max_order in 1..4; 1 leaves no history.
    """
    _require_order("ipndm", max_order, _ADAMS_BASHFORTH)
    history = _multistep_matrix(_ipndm_rows(table.num_intervals, max_order)).tril(-1)
    return replace(table, direction_history=history.to(table.positions))


def _ddim_table(levels: list[float]) -> EPDTable:
    return _table_without_points(levels, None)


def _ipndm_table(levels: list[float], max_order: int = 4) -> EPDTable:
    _require_order("ipndm", max_order, _ADAMS_BASHFORTH)
    directions = _multistep_matrix(_ipndm_rows(len(levels) - 1, max_order))
    return _table_without_points(levels, _of_estimates(levels, directions))


def _dpmpp_table(
    levels: list[float], max_order: int = 3, predict_x0: bool = True, lower_order_final: bool = True
) -> EPDTable:
    _require_order("dpmpp", max_order, _DPMPP_ORDERS)
    num_intervals = len(levels) - 1
    rows = []
    for i in range(num_intervals):
        order = _dpmpp_order(i, num_intervals, max_order, lower_order_final=lower_order_final)
        weights = _dpmpp_weights(levels[: i + 2], order, predict_x0=predict_x0)
        rows.append([weight / sum(weights) for weight in weights])
    combined = _multistep_matrix(rows)
    return _table_without_points(levels, combined if predict_x0 else _of_estimates(levels, combined))


def _dpm2_table(levels: list[float], r: float = 0.5) -> EPDTable:
    if r != 0.5:
        raise ValueError(
            f"dpm2 is a table at r = 0.5 alone: elsewhere it mixes in the interval's first direction; got {r}"
        )
    shape = (len(levels) - 1, 1)
    return EPDTable(torch.full(shape, 0.5, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))


_CLASSICAL_TABLES: dict[str, Callable[..., EPDTable]] = {
    "ddim": _ddim_table,
    "ipndm": _ipndm_table,
    "dpmpp": _dpmpp_table,
    "dpm2": _dpm2_table,
}


def _table_without_points(levels: list[float], estimates: Tensor | None) -> EPDTable:
    """K = 0, with D̄_i = Σ_j estimates[i, j] D_j."""
    none = torch.empty(len(levels) - 1, 0, dtype=torch.float64)
    return EPDTable(none, none, history=None if estimates is None else estimates.tril(-1))


def _ipndm_rows(num_intervals: int, max_order: int) -> list[tuple[float, ...]]:
    return [_ADAMS_BASHFORTH[min(max_order, i + 1)] for i in range(num_intervals)]


def _multistep_matrix(rows: Sequence[Sequence[float]]) -> Tensor:
    """Row i of coefficients, that of interval i itself first, into row i of [S, S], where column j is interval j."""
    matrix = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, row in enumerate(rows):
        matrix[i, i + 1 - len(row) : i + 1] = torch.tensor(row, dtype=torch.float64).flip(0)
    return matrix


def _of_estimates(levels: list[float], directions: Tensor) -> Tensor:
    """From coefficients of directions c_ij to those of estimates C_ij, both [S, S]; see `classical_table`."""
    t = 1 / torch.tensor(levels, dtype=torch.float64)
    estimates = torch.zeros_like(directions)
    for i, row in enumerate(directions):
        for j in range(i + 1):
            path = (t[j : i + 1].diff()[:, None] * estimates[j:i]).sum(0)
            path[j] += t[j]
            estimates[i] += row[j] * path / t[i]
    return estimates


def _require_order(sampler: str, max_order: int, orders: Iterable[int]) -> None:
    if max_order not in orders:
        raise ValueError(f"{sampler} needs max_order in {list(orders)}; got {max_order}")


_CALLS_PER_INTERVAL = {"epd": 2, "ddim": 1, "heun": 2, "dpm2": 2, "dpmpp": 1, "ipndm": 1}


class NetworkEvaluations(NamedTuple):
    """What one sample costs."""

    parallel: int
    """Network calls one after another when the K points share a call: the latency, and the "NFE" of tables."""
    total: int
    """All evaluations. Differs from `parallel` for `epd` with more than one point."""
    rows: int
    """Network rows: the computation. An evaluation under guidance takes two, one more for the unconditional half."""


def network_evaluations(
    sampler: str,
    num_steps: int,
    *,
    num_points: int = 1,
    afs: bool = False,
    guidance: float | Tensor = 1.0,
) -> NetworkEvaluations:
    """Count the evaluations that a sampler spends on a grid of `num_steps` points; `num_points` is K of `epd`.

    `guidance` is one scale for all evaluations, or a table's column [S, 1 + K]; at scale 1 an evaluation is one row.
    Raises ValueError for an unknown sampler, fewer than 2 grid points, or other than one point outside `epd`.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps counts grid points, at least 2; got {num_steps}")
    intervals = num_steps - 1
    parallel = _calls_per_interval(sampler, num_points) * intervals - afs
    total = parallel + max(num_points - 1, 0) * intervals
    guided = (torch.as_tensor(guidance) != 1).int()
    if guided.ndim == 0:
        return NetworkEvaluations(parallel, total, total * (1 + int(guided)))
    return NetworkEvaluations(parallel, total, total + int(guided.sum() - afs * guided[0, 0]))


def num_steps_for(sampler: str, parallel_evaluations: int) -> int:
    """Grid points on which a sampler spends exactly this many parallel evaluations (inverse of `network_evaluations`).

    Raises ValueError for an unknown sampler and for a budget that no whole number of intervals meets.
    """
    per_interval = _calls_per_interval(sampler)
    intervals, rest = divmod(parallel_evaluations, per_interval)
    if rest or intervals < 1:
        raise ValueError(
            f"{sampler} cannot spend exactly {parallel_evaluations} evaluations: it makes {per_interval} in each "
            "interval"
        )
    return intervals + 1


def _calls_per_interval(sampler: str, num_points: int = 1) -> int:
    if sampler not in _CALLS_PER_INTERVAL:
        raise ValueError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    if num_points < 0 or (num_points != 1 and sampler != "epd"):
        raise ValueError(f"num_points must be 1, or with epd any number from 0; got {num_points} with {sampler}")
    return _CALLS_PER_INTERVAL[sampler] if num_points else 1


def _march(
    x: Tensor,
    num_intervals: int,
    step: Callable[[int, Tensor], Tensor],
    final: Callable[[Tensor], Tensor] | None,
    callback: Callback | None,
) -> Tensor:
    """Take all intervals, then perhaps the estimate of the last state, and show every state on the way."""
    observe = callback or (lambda done, x: None)
    observe(0, x)
    for i in range(num_intervals):
        x = step(i, x)
        observe(i + 1, x)
    if final is not None:
        x = final(x)
        observe(num_intervals + 1, x)
    return x


def _afs_estimate(x: Tensor, sigma: float | Tensor) -> Tensor:
    """Analytical first step (Dockhorn et al., arXiv 2210.05475): the estimate whose direction is x / sqrt(1 + σ²).

    At large σ nearly all of x is noise, and x / sqrt(1 + σ²) is what a network answers there. It presumes data of about
    unit variance and σ₀ far above 1, so it does not suit flow matching, which starts at σ = 1.
    """
    return x * (1 - sigma / (1 + sigma**2) ** 0.5)


def _slope(x: Tensor, denoised: Tensor, sigma: float | Tensor) -> Tensor:
    """d(x, σ) = (x - D) / σ."""
    return (x - denoised) / sigma


def _scalar(sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float64)


def _weighted_sum(weights: Sequence[float], tensors: Iterable[Tensor]) -> Tensor:
    """Σ weight · tensor over the first len(weights) tensors."""
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=False)]).sum(0)


def _dpmpp_order(i: int, num_intervals: int, max_order: int, *, lower_order_final: bool) -> int:
    """The order of interval i: what its history allows, and once that is max_order, what is left to the end."""
    order = min(max_order, i + 1)
    return min(order, num_intervals - i) if lower_order_final and order == max_order else order


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


def _recalling(history: Tensor | None, i: int, own: Tensor, earlier: dict[int, Tensor]) -> Tensor:
    """y_i + Σ_j h_ij (y_j - y_i) over the intervals j that were run; keeps y_i = own for those that follow.

    history [S, B or 1, S], or None: then nothing is added, and nothing kept.
    """
    if history is None:
        return own
    found = own
    for j, other in earlier.items():
        found = found + _like(history[i, :, j], own) * (other - own)
    earlier[i] = own
    return found


def _by_interval(rows: Tensor) -> Tensor:
    """A column of a table, [S, n] or [B, S, n], as float64 [S, 1 or B, n]."""
    return rows.double().unsqueeze(1) if rows.ndim == 2 else rows.double().transpose(0, 1)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Numbers for the leading dimensions of x in x's dtype, to be multiplied with it: [B, K] -> [B, K, 1, ...].

    One number for all, 0-dim, stays a float64 number on the CPU, as which the device takes it without waiting.
    """
    return values.to(x).reshape(*values.shape, *[1] * (x.ndim - values.ndim)) if values.ndim else values


def _checked_grid(sigmas: Tensor) -> Tensor:
    """The noise levels in float64, [n] or one grid per sample [B, n]; ValueError unless every one is a grid:

    n >= 2, finite, positive and strictly descending.
    """
    if sigmas.ndim not in (1, 2) or sigmas.shape[-1] < 2 or len(sigmas) == 0:
        raise ValueError(
            "sigmas must be a grid [num_steps], or one per sample [B, num_steps], of at least 2 points; "
            f"got shape {[*sigmas.shape]}"
        )
    levels = sigmas.double()
    for grid in levels.detach().reshape(-1, sigmas.shape[-1]).tolist():
        if not all(math.isfinite(level) and level > 0 for level in grid):
            raise ValueError(f"sigmas must be finite and positive; got {grid}")
        if any(a <= b for a, b in pairwise(grid)):
            raise ValueError(f"sigmas must descend strictly; got {grid}")
    return levels


def _one_grid(sigmas: Tensor) -> list[float]:
    """The noise levels of a grid for all samples as numbers; ValueError for another than that."""
    if sigmas.ndim != 1:
        raise ValueError(f"sigmas must be one grid [num_steps] of at least 2 points; got shape {[*sigmas.shape]}")
    return _checked_grid(sigmas).tolist()
