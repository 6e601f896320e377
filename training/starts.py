"""Tables that a search can start from, made without training: classical samplers, or one that is near DDIM."""

from __future__ import annotations

from dataclasses import replace

import torch

from errors import InputError
from models.denoiser import Denoiser
from solvers import EPDTable, classical_table, with_ipndm_history
from training.distillation_run import Options
from training.networks import near_euler_table
from training.solver import MULTISTEP_ORDERS, Schedule, parse_classical

NEAR_EULER = "near_euler"

# Points an interval that each start can have, for people.
POINTS = {NEAR_EULER: "1 or more", "ddim": "0", "dpmpp": "0", "dpm2": "1", "ipndm": "0 or more"}
_FITS = {
    NEAR_EULER: lambda points: points > 0,
    "ddim": lambda points: points == 0,
    "dpmpp": lambda points: points == 0,
    "dpm2": lambda points: points == 1,
    "ipndm": lambda points: True,
}


def check_start(options: Options) -> None:
    """Raise InputError where there is no start of that name, or not with so many points."""
    name = _name(options)
    if name not in POINTS:
        raise InputError(f"--start {options.start}: {name} is no table; {', '.join(POINTS)} are")
    if not _FITS[name](options.num_points):
        raise InputError(f"--start {options.start} needs --num_points {POINTS[name]}, not {options.num_points}")


def needs_grid(options: Options) -> bool:
    """Whether the start depends on the noise levels, and so on the model: a multistep sampler without points does."""
    return options.num_points == 0 and _name(options) in MULTISTEP_ORDERS


def start_table(options: Options, denoiser: Denoiser | None) -> EPDTable:
    """The table that `options.start` names, with scales 1 where the options ask for scales.

    near_euler        `near_euler_table`, K at least 1
    ddim, ipndm, dpmpp  the sampler itself (`solvers.classical_table`), K = 0; an order may follow a colon
    dpm2              the sampler itself, K = 1
    ipndm             with K at least 1: EPD's plug-in, the points of `near_euler_table` reached by iPNDM's direction

    `denoiser` gives the grid, where `needs_grid`; otherwise it may be None.
    Raises InputError as `check_start`, and for a schedule that does not suit the model.
    """
    check_start(options)
    name, points, intervals = _name(options), options.num_points, options.num_steps - 1
    order = None if name == NEAR_EULER else parse_classical(options.start)[1]
    ordered = {} if order is None else {"max_order": order}
    if name == "dpm2" or points == 0:
        levels = torch.linspace(2, 1, options.num_steps)  # any grid: the table does not depend on it
        if denoiser is not None:
            levels = Schedule(options.schedule_type, options.schedule_rho).sigmas(options.num_steps, denoiser)
        table = classical_table(name, levels, **ordered)
    else:
        table = near_euler_table(intervals, points)
        table = with_ipndm_history(table, **ordered) if name == "ipndm" else table
    scales = ("scale_dir", "scale_time") if points else ()
    ones = {key: torch.ones_like(table.positions) for key in scales if getattr(options, key)}
    return replace(table, **ones)


def _name(options: Options) -> str:
    return NEAR_EULER if options.start == NEAR_EULER else parse_classical(options.start)[0]
