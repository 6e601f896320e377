"""The policy: a distribution over solvers, centred on a cold start (design.md, section 3).

Each part that is trained, a column of the table or the grid, is drawn as `cold_start.DRAWN` declares. Its unconstrained
parameters are those of the cold start plus the residual of a small network. All of it is float64.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errors import InputError
from models.randomness import generator_of
from solvers import EPDTable
from training.parameters import GRID
from training.ppo.cold_start import DRAWN, TRAINED, trainable
from training.ppo.distributions import Dirichlet, Normal

HIDDEN_SIZE = 64
"""Width of the residual network."""

Entries = Mapping[str, Tensor]
"""Columns of the table by name, and under `GRID` the noise levels."""


@dataclass(frozen=True)
class TableSample:
    """n solvers as they were drawn.

    Attributes:
        drawn: each trained part [n, R, M], in the coordinate of its distribution: a segment may be too small for a
            float, its logarithm not.
        start: what they were drawn around, which also holds all that is not trained.
    """

    drawn: Entries
    start: Entries

    def __len__(self) -> int:
        """Number of solvers."""
        return len(next(iter(self.drawn.values())))

    def select(self, rows: Tensor) -> TableSample:
        """The solvers named by `rows`: indices, or a mask [n]."""
        return TableSample({name: drawn[rows] for name, drawn in self.drawn.items()}, self.start)

    def table(self) -> EPDTable:
        """The tables [n, S, K], float64, as the solver takes them."""
        table = _table(self._values(), self.start)
        return table if table.batch_size else table.expand(len(self))

    def sigmas(self) -> Tensor | None:
        """The noise levels [n, S + 1], float64; None where they are not trained."""
        return _sigmas(self._values(), self.start)

    def _values(self) -> Entries:
        return {name: DRAWN[name].family.values(drawn) for name, drawn in self.drawn.items()}


@dataclass(frozen=True)
class TableDistribution:
    """The distribution over solvers: sampling and scoring share these parameters.

    Attributes:
        parts: the distribution of each trained part, its parameters [R, M]; with context [N, R, M], one set a row.
        start: the cold start, which also holds all that is not trained.
    """

    parts: Mapping[str, Dirichlet | Normal]
    start: Entries

    @torch.no_grad()
    def sample(self, number: int, generator: torch.Generator) -> TableSample:
        """Draw `number` solvers (with context: one per row, `number` rows).

        The draws happen on the generator's device, so a CPU generator gives the same solvers wherever the policy lives.
        """
        return TableSample({name: part.sample(number, generator) for name, part in self.parts.items()}, self.start)

    def log_prob(self, sample: TableSample) -> Tensor:
        """Log-density [n] of each solver: the sum over its trained parts."""
        return sum(part.log_prob(sample.drawn[name]) for name, part in self.parts.items())

    def entropy(self) -> Tensor:
        """Differential entropy in nats, summed over the parts; a scalar, or [N] with context."""
        return sum(part.entropy() for part in self.parts.values())

    def kl(self, other: TableDistribution) -> Tensor:
        """KL(self || other) in nats, summed over the parts; a scalar, or [N] with context."""
        return sum(part.kl(other.parts[name]) for name, part in self.parts.items())

    def mean_table(self) -> EPDTable:
        """The mean, a table [S, K] (with context [N, S, K]), float64, detached."""
        return _table(self._means(), self.start).detach()

    def mean_sigmas(self) -> Tensor | None:
        """The noise levels [S + 1] (with context [N, S + 1]) whose gaps in log sigma are the mean; None if not trained.

        Float64, detached: the geometric means of the levels that are drawn.
        """
        sigmas = _sigmas(self._means(), self.start)
        return None if sigmas is None else sigmas.detach()

    @property
    def at_bounds(self) -> int:
        """How many parameters are held at a bound, where they get no gradient."""
        return sum(part.at_bounds() for part in self.parts.values())

    def _means(self) -> Entries:
        return {name: part.mean() for name, part in self.parts.items()}


class EPDParamPolicy(nn.Module):
    """Distribution over solvers around a cold start; before the first update its mean is the cold start exactly.

    The residual network maps the one-hot interval index, beside an optional context, through one tanh layer to the
    changes of all parameters of that interval; its last layer starts at zero. Everything is float64.
    """

    def __init__(
        self,
        table: EPDTable,
        *,
        sigmas: Tensor | None = None,
        train: Collection[str] = TRAINED,
        concentration: float,
        grid_concentration: float = 1000.0,
        scale_std: float = 0.05,
        guidance_std: float = 0.1,
        history_std: float = 0.05,
        context_size: int = 0,
        seed: int = 0,
    ) -> None:
        """Centre the policy on a solver.

        Args:
            table: the cold-start table [S, K], as `cold_start.prepare_table` leaves it for `train`.
            sigmas: noise levels [S + 1], descending; needed where the grid is trained, and ignored elsewhere.
            train: names in `cold_start.DRAWN`, in any order: what is drawn; all else stays as it is in the table. Left
                out are those of which nothing can vary in such a table.
            concentration: total concentration of each Dirichlet of segments and of weights at the cold start.
            grid_concentration: that of the grid's gaps.
            scale_std, guidance_std: standard deviation of the logarithm of scales, of guidance, at the cold start.
            history_std: standard deviation of the history columns' entries there.
            context_size: length of the context vector that conditions the distribution; 0: unconditional.
            seed: of the network's first layer (its last layer is zero).

        Raises:
            InputError: the table is a batch, not ordered or lacks a trained column, there is nothing to draw, or the
                cold start cannot have such a concentration or deviation.
        """
        super().__init__()
        if table.batch_size is not None:
            raise InputError(f"a policy starts from one table [S, K]; this is a batch of {table.batch_size}")
        spreads = {
            "dirichlet_concentration": concentration,
            "grid_concentration": grid_concentration,
            "scale_std": scale_std,
            "guidance_std": guidance_std,
            "history_std": history_std,
        }
        self.trained = trainable(table, train)
        start = table.columns()
        if sigmas is not None and GRID in self.trained:
            start[GRID] = sigmas
        if missing := [name for name in self.trained if name not in start]:
            raise InputError(f"ppo.train names {missing[0]}, and the policy was given no {missing[0]} to start from")
        for name, entries in start.items():
            self.register_buffer(f"start_{name}", entries.detach().double().clone(), persistent=False)
        self._start_names = tuple(start)
        base = [DRAWN[name].parameters(self.start[name], spreads[DRAWN[name].spread]) for name in self.trained]
        self.context_size = context_size
        self.sizes = [part.shape[-1] for part in base]
        self.base: Tensor  # [S, P]: the unconstrained parameters of each trained part, of one after the other
        self.register_buffer("base", torch.cat(base, dim=-1))
        self.hidden = nn.utils.skip_init(
            nn.Linear, table.num_intervals + context_size, HIDDEN_SIZE, dtype=torch.float64
        )
        self.output = nn.utils.skip_init(nn.Linear, HIDDEN_SIZE, self.base.shape[-1], dtype=torch.float64)
        nn.init.normal_(self.hidden.weight, generator=generator_of(seed))
        for zero in (self.hidden.bias, self.output.weight, self.output.bias):
            nn.init.zeros_(zero)

    @property
    def start(self) -> Entries:
        """The cold start: the table's columns, and the noise levels where they are trained; float64."""
        return {name: self.get_buffer(f"start_{name}") for name in self._start_names}

    def forward(self, context: Tensor | None = None) -> TableDistribution:
        """The distribution; with `context` [N, context_size], one per row.

        Raises:
            ValueError: a context where the policy takes none, or none where it takes one, or of another size.
        """
        given = 0 if context is None else context.shape[-1]
        if given != self.context_size:
            raise ValueError(f"this policy takes a context of size {self.context_size}, and got {given}")
        intervals = len(self.base)
        features = torch.eye(intervals, dtype=self.base.dtype, device=self.base.device)  # [S, S]
        if context is not None:
            rows = len(context)
            repeated = context.to(self.base)[:, None].expand(rows, intervals, given)
            features = torch.cat([features.expand(rows, intervals, intervals), repeated], dim=-1)  # [N, S, S + context]
        return self.distribution(self.output(self.hidden(features).tanh()))

    def distribution(self, residual: Tensor) -> TableDistribution:
        """The distribution with the cold start's parameters moved by `residual` [..., S, P].

        The P columns: for each trained part, in the order of `DRAWN`, log alpha, or locations, in units of their
        deviations at the cold start, and then log deviations.
        """
        bases, moves = self.split(self.base), self.split(residual)
        return TableDistribution(
            {name: DRAWN[name].distribution(bases[name], moves[name]) for name in self.trained}, self.start
        )

    @torch.no_grad()
    def mean(self) -> tuple[EPDTable, Tensor | None]:
        """The mean table and, where they are trained, the mean noise levels; on the CPU. ValueError where none."""
        distribution = self()
        sigmas = distribution.mean_sigmas()
        return distribution.mean_table().to(device="cpu"), None if sigmas is None else sigmas.cpu()

    def split(self, parameters: Tensor) -> dict[str, Tensor]:
        """Views of the columns [..., S, P] that belong to each trained part."""
        return dict(zip(self.trained, parameters.split(self.sizes, dim=-1), strict=True))

    def cold_start(self) -> TableDistribution:
        """The distribution before the first update, the reference of the KL term."""
        return self.distribution(torch.zeros_like(self.base))


def _entries(values: Entries, start: Entries) -> dict[str, Tensor]:
    """The cold start with the trained parts' numbers [..., R, M] in their places."""
    return {**start, **{name: DRAWN[name].part.entries(part, start[name]) for name, part in values.items()}}


def _table(values: Entries, start: Entries) -> EPDTable:
    return EPDTable(**{name: entries for name, entries in _entries(values, start).items() if name != GRID})


def _sigmas(values: Entries, start: Entries) -> Tensor | None:
    return _entries(values, start).get(GRID)
