"""Tables that a search can start from, made without training: classical samplers, or one that is near DDIM."""

from __future__ import annotations

from torch import Tensor

from errors import InputError
from solvers import EPDTable, classical_table, with_ipndm_history
from training.networks import near_euler_table
from training.solver import MULTISTEP_ORDERS, parse_classical

NEAR_EULER = "near_euler"

# Points an interval that each start can have: the fewest, and whether they can be more.
POINTS = {NEAR_EULER: (1, True), "ddim": (0, False), "dpmpp": (0, False), "dpm2": (1, False), "ipndm": (0, True)}


def check_start(start: str, num_points: int) -> None:
    """Raise InputError where there is no start of that name, or not with so many points."""
    name, _ = _parsed(start)
    if name not in POINTS:
        raise InputError(f"--start {start}: {name} is no table; {', '.join(POINTS)} are")
    fewest, or_more = POINTS[name]
    if num_points < fewest or (num_points > fewest and not or_more):
        needed = f"{fewest} or more" if or_more else fewest
        raise InputError(f"--start {start} needs --num_points {needed}, not {num_points}")


def needs_grid(start: str, num_points: int) -> bool:
    """Whether the start depends on the noise levels, and so on the model: a multistep sampler without points does."""
    return num_points == 0 and _parsed(start)[0] in MULTISTEP_ORDERS


def start_table(start: str, sigmas: Tensor, num_points: int) -> EPDTable:
    """The table of that name for this grid [S + 1], of which only the length counts unless `needs_grid`.

    near_euler        `near_euler_table`, K at least 1
    ddim, ipndm, dpmpp  the sampler itself (`solvers.classical_table`), K = 0; an order may follow a colon
    dpm2              the sampler itself, K = 1
    ipndm             with K at least 1: EPD's plug-in, the points of `near_euler_table` reached by iPNDM's direction

    The name and the number of points have passed `check_start`.
    """
    name, options = _parsed(start)
    if name == "dpm2" or num_points == 0:
        return classical_table(name, sigmas, **options)
    table = near_euler_table(len(sigmas) - 1, num_points)
    return with_ipndm_history(table, **options) if name == "ipndm" else table


def _parsed(start: str) -> tuple[str, dict[str, int]]:
    """Name and options."""
    return (NEAR_EULER, {}) if start == NEAR_EULER else parse_classical(start)
