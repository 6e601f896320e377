"""The learnable EPD table: some fifty numbers, parametrised so that every value of the parameters is a valid table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor, nn

from solvers import EPDTable
from training.parameters import POSITIONS, WEIGHTS, bounded_scale, scale_bound

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""What the metadata of a snapshot may hold: values that JSON can say."""

# The attributes that the public code base looks for in every predictor, and their values where nobody set them.
PUBLIC_ATTRIBUTES: Mapping[str, Plain] = MappingProxyType(
    {
        "dataset_name": None,
        "img_resolution": None,
        "sampler_stu": "epd",
        "sampler_tea": None,
        "M": None,
        "guidance_type": None,
        "guidance_rate": None,
        "schedule_type": None,
        "schedule_rho": None,
        "afs": False,
        "max_order": None,
        "predict_x0": True,
        "lower_order_final": True,
        "fcn": False,
        "alpha": 10.0,
    }
)

# Of `near_euler_table`: the first position of an interval and its weight, and where the positions would end.
FIRST_POSITION, FIRST_WEIGHT, POSITIONS_END = 0.05, 0.75, 0.75


class EPD_predictor(nn.Module):
    """The parameters of an EPD table (arXiv 2507.14797), named as in the public EPD code base.

    With S = `num_steps` - 1 intervals and K = `num_points`, four parameters of shape [S, K]:

        r = sigmoid(r_params)                                                positions, in (0, 1)
        w = softmax(weight_s) over K                                         weights, on the simplex
        o = 2 sigmoid(scale_dir_params / 2) a + (1 - a),   a = scale_dir     direction scales, in (1 - a, 1 + a)
        s = 2 sigmoid(scale_time_params / 2) a + (1 - a),  a = scale_time    time scales, likewise

    The parameters are float32, as the public code base stores them; the table is computed in float64. A fresh
    predictor is the cold start: positions evenly spaced, r_k = k / (K + 1), equal weights, scales 1.

    Args:
        num_steps: grid points of the solver, at least 2.
        num_points: parallel evaluations K per interval, at least 1.
        scale_dir: bound of the direction scales, 0 for none.
        scale_time: bound of the time scales, 0 for none.
        metadata: what the table was made for, by the names of `PUBLIC_ATTRIBUTES` and any others: plain values, each
            kept as an attribute (as the public code base does). One of them acts here: `fcn` forces the direction
            scales of the last interval to 1.

    Raises:
        ValueError: a size or a bound out of its range, or a metadata name that is an attribute of every module.
    """

    def __init__(
        self,
        num_steps: int,
        num_points: int = 2,
        scale_dir: float = 0.0,
        scale_time: float = 0.0,
        **metadata: Plain,
    ) -> None:
        """Start cold; see the class."""
        super().__init__()
        if num_steps < 2 or num_points < 1:
            raise ValueError(f"num_steps={num_steps}, num_points={num_points}: at least 2 grid points and 1 point")
        if not (scale_dir >= 0 and scale_time >= 0):
            raise ValueError(f"scale_dir={scale_dir}, scale_time={scale_time}: a bound cannot be negative")
        self.num_steps, self.num_points = num_steps, num_points
        self.scale_dir, self.scale_time = scale_dir, scale_time

        shape = (num_steps - 1, num_points)
        evenly_spaced = torch.arange(1, num_points + 1, dtype=torch.float64) / (num_points + 1)
        self.r_params = nn.Parameter(torch.logit(evenly_spaced).float().expand(shape).clone())
        self.weight_s = nn.Parameter(torch.zeros(shape))
        self.scale_dir_params = nn.Parameter(torch.zeros(shape))
        self.scale_time_params = nn.Parameter(torch.zeros(shape))
        # Without parameters, and unused here: the public code base calls them on the predictors that it loads.
        self.sigmoid = nn.Sigmoid()
        self.softmax = nn.Softmax(dim=-1)

        for name, value in {**PUBLIC_ATTRIBUTES, **metadata}.items():
            if name.startswith("_") or hasattr(self, name):
                raise ValueError(f"metadata {name!r}: that name is taken by the predictor itself")
            setattr(self, name, value)

    @property
    def metadata(self) -> dict[str, Plain]:
        """Everything but the numbers, num_steps and the bounds included: `EPD_predictor(**metadata)` is alike."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "training"}

    def table(self) -> EPDTable:
        """The table that the parameters stand for: float64 tensors [S, K], differentiable in the parameters."""
        scale_dir = self._scale("scale_dir")
        if scale_dir is not None and self.fcn:
            scale_dir = torch.cat([scale_dir[:-1], torch.ones_like(scale_dir[-1:])])
        return EPDTable(
            positions=POSITIONS.numbers(self.r_params.double()),
            weights=WEIGHTS.numbers(self.weight_s.double()),
            scale_dir=scale_dir,
            scale_time=self._scale("scale_time"),
        )

    def _scale(self, name: str) -> Tensor | None:
        """The scales [S, K] inside their bound, or None where that is 0."""
        bound, parameters = getattr(self, name), getattr(self, f"{name}_params")
        return bounded_scale(bound).numbers(parameters.double()) if bound else None

    @classmethod
    def from_table(cls, table: EPDTable, metadata: Mapping[str, Plain] = MappingProxyType({})) -> EPD_predictor:
        """The predictor whose table is the given one, to float32 precision.

        A bound of the scales is part of the parametrisation, not of the table: it is taken from the metadata where
        the table's scales lie well inside it, and otherwise chosen wide enough.

        Args:
            table: positions, weights and scales [S, K].
            metadata: kept as attributes. num_steps and num_points are taken from the table; `fcn` becomes False, for
                the table itself says what the scales of its last interval are.

        Raises:
            ValueError: the table has a batch dimension, or what the constructor raises.
        """
        if table.positions.ndim != 2:
            raise ValueError(f"a predictor holds one table [S, K], not {tuple(table.positions.shape)}")
        scales = {"scale_dir": table.scale_dir, "scale_time": table.scale_time}
        described = {
            **metadata,
            "num_steps": table.positions.shape[0] + 1,
            "num_points": table.positions.shape[1],
            **{name: scale_bound(scale, metadata.get(name)) for name, scale in scales.items()},
            "fcn": False,
        }
        predictor = cls(**described)
        with torch.no_grad():
            predictor.r_params.copy_(POSITIONS.free(table.positions.double()))
            predictor.weight_s.copy_(WEIGHTS.free(table.weights.double()))
            for name, scale in scales.items():
                if scale is not None:
                    free = bounded_scale(getattr(predictor, name)).free(scale.double())
                    predictor.get_parameter(f"{name}_params").copy_(free)
        return predictor


def near_euler_table(num_intervals: int, num_points: int) -> EPDTable:
    """An untrained table that does no harm, float64 [S, K]: most weight lies on a point beside the interval's start.

    There the direction is nearly that of Euler's method (DDIM), so the table starts about where DDIM with as many
    intervals stands; the other points share the rest of the weight, so that they can be learned. Evenly spaced points
    of equal weights, the predictor's own cold start, throw the state far away where few intervals meet strong guidance.
    """
    places = torch.arange(num_points, dtype=torch.float64) / num_points
    weights = torch.full((num_points,), (1 - FIRST_WEIGHT) / max(num_points - 1, 1), dtype=torch.float64)
    weights[0] = FIRST_WEIGHT if num_points > 1 else 1.0
    positions = FIRST_POSITION + (POSITIONS_END - FIRST_POSITION) * places
    return EPDTable(positions.repeat(num_intervals, 1), weights.repeat(num_intervals, 1))
