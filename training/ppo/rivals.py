"""What a tuned solver stands beside: the best classical solver at as many evaluations in all, and a fine solution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from heapq import nlargest

import torch
from torch import Tensor

from errors import InputError
from models.denoiser import Denoiser
from solvers import EPDTable, classical_table
from training.ppo.heldout import HeldoutJudge, HeldoutScores, HeldoutWatch
from training.solver import Schedule, Solver, classical_solvers, parse_schedule

CLASSICAL = ("ddim", "dpmpp:2", "ipndm")
"""Those that are tables, which the run's own sampler plays."""
SCHEDULES = ("discrete", "polynomial:5")
"""Tried for each, beside the start's own from where that begins."""
LOWER = ("discrete", 1 / 3)
"""Tried, too: this schedule from this share of the model's largest noise level on. Of few evaluations it spends none on
a level at which an image is all noise. Not with flow matching, whose levels end at 1."""
GUIDANCES = (1.0, 2 / 3, 1 / 2)
"""Tried for each, in shares of the start's; a start without guidance (1) has rivals without."""
CHOSEN_ON, FINALISTS = 16, 3
"""Held-out prompts that all of them are tried on, and how many of them, the best there, on all prompts."""
REFERENCE, REFERENCE_STEPS = "dpmpp:2", 50


def best_classical(
    judge: HeldoutJudge, watch: HeldoutWatch, start: Solver, denoiser: Denoiser
) -> tuple[str, HeldoutScores] | None:
    """The classical solver with the best reward, in words, and its scores on all held-out prompts.

    It takes as many evaluations in all as the start. Each has the schedule that is best at the start's guidance (the
    mean of its scales, where it has several), and there the best of `GUIDANCES`: on some prompts, and the best few of
    these on all. None where no such solver suits the model, or the start leaves its first evaluation out (AFS), which
    none of them does.
    """
    solvers = [] if start.afs else list(_solvers(start, denoiser, start.evaluations.total))
    if not solvers:
        return None

    @cache
    def mean_reward(solver: Solver, guidance: float) -> float:
        return watch.mean_reward(judge.judge_once(*_numbers(solver, guidance, start), CHOSEN_ON))

    own = _guidance(start)
    by_name: dict[str, list[Solver]] = {}
    for solver in solvers:
        by_name.setdefault(solver.label, []).append(solver)
    scheduled = [max(group, key=lambda solver: mean_reward(solver, own)) for group in by_name.values()]
    tried = [(solver, share * own) for solver in scheduled for share in (GUIDANCES if own != 1 else (1.0,))]
    finalists = nlargest(FINALISTS, tried, key=lambda one: mean_reward(*one))
    on_all = [(judge.judge_once(*_numbers(*finalist, start)), *finalist) for finalist in finalists]
    scores, best, guidance = max(on_all, key=lambda one: watch.mean_reward(one[0]))
    return f"{best.label}, {best.grid_name}, guidance {guidance:.3g}", scores


def reference_images(judge: HeldoutJudge, start: Solver, denoiser: Denoiser) -> Tensor | None:
    """The first held-out prompts as a fine solution draws them, [P, 3, H, W]; None where none suits the model."""
    if start.afs:
        return None
    for solver in _solvers(start, denoiser, REFERENCE_STEPS, (REFERENCE,)):
        return judge.previews(*_numbers(solver, _guidance(start), start))
    return None


def _solvers(
    start: Solver, denoiser: Denoiser, evaluations: int, names: tuple[str, ...] = CLASSICAL
) -> Iterator[Solver]:
    own = [] if start.schedule is None else [start.schedule]
    name, share = LOWER
    lower = [parse_schedule(name)._replace(first=share * denoiser.sigma_max)] if denoiser.sigma_max > 1 else []
    schedules: dict[Schedule, None] = dict.fromkeys([*map(parse_schedule, SCHEDULES), *lower, *own])
    for solver in classical_solvers(names, [evaluations], list(schedules), note=lambda line: None):
        try:
            yield solver.on(denoiser)
        except InputError:  # a schedule that is not for this model
            continue


def _guidance(start: Solver) -> float:
    return start.table.guidance.mean().item() if start.has_guidance_column else start.guidance_scale


def _numbers(solver: Solver, guidance: float, start: Solver) -> tuple[EPDTable, Tensor]:
    """A settled classical solver as the table that the run's sampler plays in the place of the start's."""
    table = classical_table(solver.sampler, solver.sigmas, **(solver.options or {}))
    if guidance != start.guidance_scale:
        shape = (table.num_steps - 1, 1 + table.num_points)
        table = replace(table, guidance=torch.full(shape, guidance, dtype=torch.float64))
    return table, solver.sigmas
