"""From what a person asks for (a solver's name, a grid, a predictor's file) to a sampler that is ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from errors import InputError
from models.denoiser import Denoiser
from models.fingerprints import file_sha256
from models.generate import Denoise, Solve
from schedules import SCHEDULES, get_schedule
from solvers import COLUMNS, SAMPLERS, EPDTable, NetworkEvaluations, network_evaluations
from training.networks import Plain
from training.snapshot import GRID, find_snapshot, load_snapshot

# The exponent that a schedule is commonly used with; the others have none.
USUAL_RHO = {"polynomial": 7.0, "time_uniform": 1.0, "discrete": 1.0}

CLASSICAL = tuple(name for name in SAMPLERS if name != "epd")
# The grids that a classical solver is tried at: guided few-step sampling prefers smaller exponents than the usual 7.
TRIED_SCHEDULES = (
    "polynomial:3",
    "polynomial:4",
    "polynomial:5",
    "polynomial:6",
    "polynomial",
    "logsnr",
    "time_uniform",
    "discrete",
)
MULTISTEP_ORDERS = {"dpmpp": (1, 2, 3), "ipndm": (1, 2, 3, 4)}  # orders that can be asked for, the last is the default

# Worlds that the public EPD code base calls by their data, and the model each stands for.
MODEL_OF_DATASET = {"ms_coco": "sd15"}

# How the public code base calls the one EPD solver in its snapshots.
EPD_NAMES = (None, "epd", "epd_parallel")


class Grid(NamedTuple):
    """A schedule by name, with its exponent (1 where it has none)."""

    schedule_type: str
    rho: float

    def __str__(self) -> str:
        """As it is written on the command line: `discrete`, or `discrete:2` where the exponent is not the usual one."""
        usual = self.rho == USUAL_RHO.get(self.schedule_type, 1.0)
        return self.schedule_type if usual else f"{self.schedule_type}:{self.rho:g}"


OWN_GRID = Grid("own", 1.0)
"""Stands for noise levels that a table's file names one by one."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler with everything bound but the model, the prompts and the noise.

    label: how it is called in tables. sigmas: float64 [num_steps]. settings: plain values that, with the grid, say all
    that the result depends on.
    """

    label: str
    solver: str
    grid: Grid
    sigmas: Tensor
    evaluations: NetworkEvaluations
    settings: Mapping[str, Plain]
    solve: Solve


@dataclass(frozen=True, eq=False)
class Predictor:
    """A table as it was read from its file, and what the file says about it."""

    file: Path
    sha256: str
    table: EPDTable
    metadata: Mapping[str, Plain]

    @property
    def label(self) -> str:
        """A short name: the run's number where it lies in a numbered folder, otherwise the folder's name."""
        folder = self.file.resolve().parent
        run = folder.parent if folder.name == "export" else folder
        number = run.name.split("-")[0]
        return f"epd-{number if number.isdecimal() and len(number) == 5 else run.name}"

    @property
    def dataset_name(self) -> str | None:
        """The world it was made for, as its file calls it."""
        return self._text("dataset_name")

    @property
    def model(self) -> str | None:
        """The model that it was made for, by name or path; None where the file does not say."""
        return self._text("model_path") or MODEL_OF_DATASET.get(self.dataset_name, self.dataset_name)

    @property
    def guidance_scale(self) -> float | None:
        """The one scale of classifier-free guidance: 1 for none, None where the file does not say or has a column."""
        if self.table.guidance is not None:
            return None
        if self._text("guidance_type") == "uncond":
            return 1.0
        return self._number("guidance_rate")

    @property
    def sigmas(self) -> Tensor | None:
        """The noise levels of its own, float64 [num_steps]; None where it goes by a named schedule."""
        own = self.metadata.get(GRID)
        return None if own is None else torch.tensor(own, dtype=torch.float64)

    @property
    def grid(self) -> Grid | None:
        """The schedule that it was made for, `OWN_GRID` for noise levels of its own; None where the file is silent."""
        if self.sigmas is not None:
            return OWN_GRID
        name, rho = self._text("schedule_type"), self._number("schedule_rho")
        if name is None:
            return None
        if name not in SCHEDULES:
            raise self._fault("schedule_type", name, f"known are {', '.join(SCHEDULES)}")
        return Grid(name, rho if rho is not None and name in USUAL_RHO else USUAL_RHO.get(name, 1.0))

    @property
    def afs(self) -> bool:
        """Whether the first evaluation is replaced by its analytic estimate."""
        value = self.metadata.get("afs", False)
        if not isinstance(value, bool):
            raise self._fault("afs", value, "it must be true or false")
        return value

    def evaluations(self) -> NetworkEvaluations:
        """What an image costs, before guidance where the table has none of its own."""
        return self.table.evaluations(afs=self.afs)

    def sigma_range(self, denoiser: Denoiser) -> tuple[float, float]:
        """sigma_min and sigma_max: the file's where it names them, otherwise the model's."""
        low, high = self._number("sigma_min"), self._number("sigma_max")
        return denoiser.sigma_min if low is None else low, denoiser.sigma_max if high is None else high

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self._fault(key, value, "it must be a text")
        return value

    def _number(self, key: str) -> float | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._fault(key, value, "it must be a number")
        return float(value)

    def _fault(self, key: str, value: Plain, remedy: str) -> InputError:
        return InputError(f"{self.file}: {key} is {value!r}; {remedy}")


def load_predictor(source: str | Path, root: str | Path = "exps") -> Predictor:
    """Read the predictor that a person means; see `training.snapshot.find_snapshot` for what `source` can be.

    Raises InputError where there is none, the file is no snapshot, or it was made for another solver than EPD.
    """
    file = find_snapshot(source, root)
    table, metadata = load_snapshot(file)
    predictor = Predictor(file, file_sha256(file), table, metadata)
    if metadata.get("sampler_stu") not in EPD_NAMES:
        raise InputError(
            f"{file}: sampler_stu is {metadata['sampler_stu']!r}; only tables of the solver epd can be used"
        )
    return predictor


def predictor_plan(predictor: Predictor, denoiser: Denoiser, grid: Grid | None = None) -> Plan:
    """The EPD sampler with this table, on its own grid or on another one.

    Raises InputError where neither names a grid, or the grid does not suit the model.
    """
    chosen = grid or predictor.grid
    if chosen is None:
        raise InputError(f"{predictor.file}: does not say its schedule_type; name one with --schedule")
    table, afs = predictor.table, predictor.afs
    sigmas = predictor.sigmas
    if sigmas is None or grid is not None:
        low, high = predictor.sigma_range(denoiser)
        sigmas = _sigmas(chosen, table.num_steps, low, high, denoiser, f"{predictor.file}: ")

    def solve(denoise: Denoise, x: Tensor, levels: Tensor) -> Tensor:
        return SAMPLERS["epd"](denoise, x, levels, table, afs=afs)

    columns: dict[str, Plain] = {column.name: None for column in COLUMNS}
    columns |= {name: entries.tolist() for name, entries in table.columns().items()}
    settings: dict[str, Plain] = {**columns, "afs": afs, "own_grid": sigmas.tolist() if chosen is OWN_GRID else None}
    return Plan(predictor.label, "epd", chosen, sigmas, predictor.evaluations(), settings, solve)


def classical_plan(name: str, num_steps: int, grid: Grid, denoiser: Denoiser, *, afs: bool = False) -> Plan:
    """A classical sampler on `num_steps` grid points of the model's whole range.

    `name` is a solver's, with an order for the multistep ones where not the highest is meant: `ddim`, `dpmpp:2`.
    Raises InputError for a name that is not known and a grid that does not suit the model.
    """
    solver, order = parse_classical(name)
    options = {} if order is None else {"max_order": order}
    sigmas = levels_of(grid, num_steps, denoiser)
    settings: dict[str, Plain] = {**options, "afs": afs}
    solve = partial(SAMPLERS[solver], afs=afs, **options)
    return Plan(name, solver, grid, sigmas, network_evaluations(solver, num_steps, afs=afs), settings, solve)


def parse_classical(name: str) -> tuple[str, int | None]:
    """Solver and order (None for those without) of `ddim`, `dpmpp`, `dpmpp:2`. Raises InputError for another text."""
    solver, colon, text = name.partition(":")
    if solver not in CLASSICAL:
        raise InputError(f"unknown solver {name!r}; known are {', '.join(SAMPLERS)}")
    orders = MULTISTEP_ORDERS.get(solver)
    if orders is None:
        if colon:
            raise InputError(f"solver {name!r}: {solver} has no order to choose; write {solver}")
        return solver, None
    if not colon:
        return solver, orders[-1]
    if text not in map(str, orders):
        raise InputError(f"solver {name!r}: the orders of {solver} are {', '.join(map(str, orders))}")
    return solver, int(text)


def parse_grid(text: str) -> Grid:
    """A schedule as people write it, `discrete` or `polynomial:5`. Raises InputError for another text."""
    name, colon, exponent = text.strip().partition(":")
    if name not in SCHEDULES:
        raise InputError(f"unknown schedule {text!r}; known are {', '.join(SCHEDULES)}")
    if not colon:
        return Grid(name, USUAL_RHO.get(name, 1.0))
    if name not in USUAL_RHO:
        raise InputError(f"schedule {text!r}: {name} has no exponent rho; write {name}")
    try:
        rho = float(exponent)
    except ValueError:
        raise InputError(f"schedule {text!r}: rho is {exponent!r}; write a number, {name}:2") from None
    if not 0 < rho < float("inf"):
        raise InputError(f"schedule {text!r}: rho is {exponent}; it must be positive and finite")
    return Grid(name, rho)


def levels_of(grid: Grid, num_steps: int, denoiser: Denoiser) -> Tensor:
    """A schedule's noise levels over the model's whole range, float64 [num_steps]. InputError where it has none."""
    return _sigmas(grid, num_steps, denoiser.sigma_min, denoiser.sigma_max, denoiser, "")


def _sigmas(grid: Grid, num_steps: int, low: float, high: float, denoiser: Denoiser, where: str) -> Tensor:
    try:
        return get_schedule(grid.schedule_type, num_steps, low, high, rho=grid.rho, denoiser=denoiser)
    except ValueError as error:
        raise InputError(f"{where}{error}") from None
