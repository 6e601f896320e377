"""Distillation: its parts against brute force and closed forms, the whole against the classical solvers."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import InputError
from models.generate import initial_noise
from schedules import get_schedule
from solvers import SAMPLERS, EPDTable, classical_table, epd_sampler, num_steps_for
from tests.guided_mixture import GuidedMixture
from training import distillation_run
from training.distillation import (
    SEARCHED_POSITIONS,
    SEARCHED_RANGE,
    SMALLEST_WEIGHT,
    Refinement,
    Task,
    Trajectories,
    best_points,
    loss_scales,
    search,
    simplex_least_squares,
    teacher_trajectories,
    trajectory_loss,
)
from training.distillation_options import Options, load_options
from training.distillation_run import (
    claim_folder,
    distil,
    is_finished,
    next_folder,
    prepare,
)
from training.networks import EPD_predictor
from training.parameters import SolverParameters
from training.runs import run_folder
from training.snapshot import load_snapshot
from training.starts import start_table

OPTIONS = Options(
    dataset_name="mixture",
    model_path=None,
    num_steps=3,
    num_points=2,
    sampler_stu="epd",
    sampler_tea="dpm2",
    M=9,
    afs=False,
    scale_dir=0.0,
    scale_time=0.0,
    guidance_rate=7.5,
    schedule_type="discrete",
    schedule_rho=1.0,
    trajectories=64,
    batch=16,
    batch_gpu=64,
    total_kimg=0.48,
    lr=0.1,
    coslr=True,
    target="latent",
    recompute=False,
    seed=0,
    prompt_file=None,
    init_only=False,
    start="search",
    train="positions,weights",
)
PROMPTS = ["0", "1", "2"]


def carried_out(folder, options, denoiser, prompts):
    return distil(folder, options, denoiser, prepare(options, denoiser, prompts))


def _grid(denoiser, num_steps, schedule_type="discrete", rho=1.0):
    return get_schedule(schedule_type, num_steps, denoiser.sigma_min, denoiser.sigma_max, rho=rho, denoiser=denoiser)


def _taught(num_steps=3, count=6, extra=9, **task):
    denoiser = GuidedMixture()
    sigmas = dataclasses.replace(OPTIONS, num_steps=num_steps).sigmas(denoiser, extra)
    task = Task(denoiser, 7.5, sigmas[:: extra + 1], **task)
    prompts = [PROMPTS[number % 3] for number in range(count)]
    return task, teacher_trajectories(task, "dpm2", sigmas, prompts, range(count))


# ------------------------------------------------------------------------------------------------------- teacher


@pytest.mark.parametrize("schedule_type", ["polynomial", "logsnr", "time_uniform", "discrete", "flowmatch"])
@pytest.mark.parametrize("extra", [1, 4])
def test_the_teacher_stops_at_every_point_of_the_student(schedule_type, extra):
    denoiser = GuidedMixture()
    options = dataclasses.replace(OPTIONS, num_steps=4, schedule_type=schedule_type, schedule_rho=2.0)
    teacher = options.sigmas(denoiser, extra)
    student = _grid(denoiser, 4, schedule_type, 2.0)
    assert len(teacher) == 3 * (extra + 1) + 1
    torch.testing.assert_close(teacher[:: extra + 1], student, rtol=1e-12, atol=0)


def test_trajectories_are_the_teachers_runs_whatever_the_micro_batch():
    task, trajectories = _taught(micro_batch=4)
    denoiser, sigmas = task.denoiser, _grid(task.denoiser, 21)
    noise = initial_noise(range(6), denoiser.latent_shape, device=denoiser.device, dtype=torch.float32)
    start = noise * sigmas[0].float()
    torch.testing.assert_close(trajectories.states[0], start, rtol=0, atol=0)
    end = SAMPLERS["dpm2"](task.bind(trajectories.prompts), start, sigmas)
    torch.testing.assert_close(trajectories.states[2], end, rtol=1e-5, atol=1e-5)
    middle = SAMPLERS["dpm2"](task.bind(trajectories.prompts), start, sigmas[:11])
    torch.testing.assert_close(trajectories.states[1], middle, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- search


@given(seed=st.integers(0, 10**6), num_points=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_weights_on_the_simplex_satisfy_the_conditions_of_optimality(seed, num_points):
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(5, num_points, 6, generator=generator, dtype=torch.float64)
    wanted = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    gram, projections = moves @ moves.mT, (moves @ wanted[..., None])[..., 0]
    weights = simplex_least_squares(gram, projections)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, dtype=torch.float64))
    assert (weights >= SMALLEST_WEIGHT - 1e-12).all() or num_points == 1
    # Karush-Kuhn-Tucker: the gradient is the same for all free weights, and not smaller for those at their floor
    gradient = (gram @ weights[..., None])[..., 0] - projections
    for row, weight in zip(gradient, weights, strict=True):
        free = weight > SMALLEST_WEIGHT + 1e-9
        assert (row[free].max() - row[free].min()).abs() < 1e-6
        assert (row >= row[free].min() - 1e-6).all()


def test_all_positions_together_are_a_choice_too():
    moves = torch.eye(16, dtype=torch.float64)
    found, weights = best_points(moves @ moves.T, torch.full((16,), 1 / 16).double(), torch.linspace(0.05, 0.8, 16), 16)
    assert len(found) == 16
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 16), rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_points", [1, 2, 3])
def test_planted_points_are_found_again(num_points):
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(7, 40, generator=generator, dtype=torch.float64)
    positions = torch.linspace(0.1, 0.7, 7, dtype=torch.float64)
    planted = torch.tensor([1, 4, 6][:num_points])
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)[:num_points]
    weights = weights / weights.sum()
    wanted = weights @ moves[planted]
    found, found_weights = best_points(moves @ moves.T, moves @ wanted, positions, num_points)
    assert found.tolist() == positions[planted].tolist()
    torch.testing.assert_close(found_weights, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("afs", [False, True])
def test_no_pair_of_searched_positions_ends_nearer_to_the_teacher(afs):
    task, trajectories = _taught(num_steps=2, afs=afs)
    found = search(task, trajectories, 2)

    def squares(positions, weights):
        table = EPDTable(torch.tensor([positions]).double(), torch.tensor([weights]).double())
        denoise = task.bind(trajectories.prompts)
        end = epd_sampler(denoise, trajectories.states[0], task.sigmas, table, afs=afs)
        return (end - trajectories.states[1]).square().sum().item()

    best = squares(found.positions[0].tolist(), found.weights[0].tolist())
    positions = torch.linspace(*SEARCHED_RANGE, SEARCHED_POSITIONS, dtype=torch.float64).tolist()
    for pair in list(combinations(positions, 2))[::3]:
        for first in (0.02, 0.3, 0.6, 0.75, 0.85, 0.98):
            assert best <= squares(pair, [first, 1 - first]) * (1 + 1e-5)


def test_each_interval_is_searched_from_where_the_student_really_is():
    task, trajectories = _taught(num_steps=3)
    found = search(task, trajectories, 2)
    first = EPDTable(found.positions[:1], found.weights[:1])
    reached = epd_sampler(task.bind(trajectories.prompts), trajectories.states[0], task.sigmas[:2], first)
    rest = dataclasses.replace(task, sigmas=task.sigmas[1:])
    again = search(rest, Trajectories(trajectories.prompts, torch.stack([reached, trajectories.states[2]])), 2)
    assert again.positions.tolist() == found.positions[1:].tolist()
    torch.testing.assert_close(again.weights, found.weights[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_points", "afs"), [(2, False), (0, False), (0, True)])
def test_the_search_costs_what_was_said(num_points, afs):
    task, trajectories = _taught(afs=afs)
    task.denoiser.evaluations = 0
    search(task, trajectories, num_points)
    options = dataclasses.replace(OPTIONS, num_points=num_points, afs=afs, trajectories=8)  # two of them held out
    assert task.denoiser.evaluations == options.evaluations()["search"]


@pytest.mark.parametrize("sampler", ["ipndm", "dpmpp"])
def test_a_planted_history_is_found_again(sampler):
    task, trajectories = _taught(num_steps=6, count=12, micro_batch=5)
    planted = classical_table(sampler, task.sigmas)
    states, start = [], trajectories.states[0]
    denoise = task.bind(trajectories.prompts)
    epd_sampler(denoise, start, task.sigmas, planted, callback=lambda _, x: states.append(x))
    found = search(task, Trajectories(trajectories.prompts, torch.stack(states)), 0)
    assert found.num_points == 0
    torch.testing.assert_close(found.history, planted.history, rtol=0, atol=0.02)
    end = epd_sampler(denoise, start, task.sigmas, found)
    torch.testing.assert_close(end, states[-1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("afs", [False, True])
def test_no_row_of_history_nearby_ends_nearer_to_the_teacher(afs):
    task, trajectories = _taught(num_steps=4, afs=afs, micro_batch=4)
    history = search(task, trajectories, 0).history

    def squares(history, i):
        states = []
        table = EPDTable(_none(3), _none(3), history=history)
        denoise = task.bind(trajectories.prompts)
        epd_sampler(
            denoise, trajectories.states[0], task.sigmas, table, afs=afs, callback=lambda _, x: states.append(x)
        )
        return (states[i + 1] - trajectories.states[i + 1]).double().square().sum().item()

    for i, j in ((1, 0), (2, 0), (2, 1)):
        least = squares(history, i)
        for step in (-0.02, 0.02):
            moved = history.clone()
            moved[i, j] += step
            assert squares(moved, i) > least


def test_estimates_that_say_the_same_share_a_factor():
    """Were the network's answer always the same, history would change nothing, and none is found."""
    task, trajectories = _taught(num_steps=4)
    task.denoiser.denoise = lambda x, sigma, conditioning: torch.ones_like(x)
    assert search(task, trajectories, 0).history.abs().max() < 1


# -------------------------------------------------------------------------------------------------------- refine


def _predictor(num_steps=3, seed=0, **bounds):
    predictor = EPD_predictor(num_steps, 2, **bounds)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        predictor.r_params.sub_(1.5)
    return predictor


@pytest.mark.parametrize("target", ["latent", "image"])
def test_the_loss_is_the_distance_that_its_formula_says(target):
    task, trajectories = _taught(num_steps=4, target=target)
    scales = loss_scales(task, trajectories)
    table = _predictor(4).table().detach()
    states = []
    denoise = task.bind(trajectories.prompts)
    epd_sampler(denoise, trajectories.states[0], task.sigmas, table, callback=lambda _, x: states.append(x))

    def distances(found, wanted):
        return (found - wanted).flatten(1).norm(dim=1)

    teacher = trajectories.states
    ends = [states[3], teacher[3]] if target == "latent" else [task.denoiser.decode(x) for x in (states[3], teacher[3])]
    spread = teacher[3] - teacher[2] if target == "latent" else ends[1] - ends[1].mean(0)
    unit = spread.flatten(1).square().sum(1).mean().sqrt()
    expected = distances(*ends) / unit
    for i in (1, 2):
        moved = (teacher[i] - teacher[i - 1]).flatten(1).square().sum(1).mean().sqrt()
        expected = expected + 0.05 * distances(states[i], teacher[i]) / moved
    loss = trajectory_loss(task, table, trajectories, scales)
    torch.testing.assert_close(loss, expected.double(), rtol=1e-3, atol=3e-3)


@pytest.mark.parametrize("target", ["latent", "image"])
def test_the_gradient_goes_through_the_network_and_is_right(target):
    task, trajectories = _taught(num_steps=3, target=target)
    precise = Trajectories(trajectories.prompts, trajectories.states.double())
    predictor = _predictor(scale_dir=0.2, scale_time=0.2).double()
    scales = loss_scales(task, precise)

    def loss():
        return trajectory_loss(task, predictor.table(), precise, scales).mean()

    loss().backward()
    step = 1e-4 if target == "latent" else 1e-2  # images are float32
    for parameter in predictor.parameters():
        for index in ((0, 0), (1, 1)):
            with torch.no_grad():
                kept = parameter[index].item()
                parameter[index] = kept + step
                above = loss()
                parameter[index] = kept - step
                below = loss()
                parameter[index] = kept
            numeric = ((above - below) / (2 * step)).item()
            assert parameter.grad[index].item() == pytest.approx(numeric, rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("num_points", [0, 2])
def test_the_gradient_goes_through_levels_and_history_and_is_right(num_points):
    task, trajectories = _taught(num_steps=4)
    precise = Trajectories(trajectories.prompts, trajectories.states.double())
    points = _predictor(4).table().columns() if num_points else dict.fromkeys(("positions", "weights"), _none(3))
    student = SolverParameters(EPDTable(**points), task.sigmas, ["grid", "history", "direction_history"])
    scales = loss_scales(task, precise)

    def loss():
        return trajectory_loss(task, student.table(), precise, scales, student.sigmas()).mean()

    loss().backward()
    for parameter in student.parameters():
        index = (0, 1)
        with torch.no_grad():
            kept = parameter[index].item()
            parameter[index] = kept + 1e-4
            above = loss()
            parameter[index] = kept - 1e-4
            below = loss()
            parameter[index] = kept
        numeric = ((above - below) / 2e-4).item()
        assert abs(numeric) > 1e-4
        assert parameter.grad[index].item() == pytest.approx(numeric, rel=2e-3)


def test_on_other_levels_the_last_states_alone_are_compared():
    task, trajectories = _taught(num_steps=4)
    scales, table = loss_scales(task, trajectories), _predictor(4).table().detach()
    sigmas = task.sigmas * torch.tensor([1.0, 0.8, 1.1, 1.0], dtype=torch.float64)
    end = epd_sampler(task.bind(trajectories.prompts), trajectories.states[0], sigmas, table)
    expected = (end - trajectories.states[-1]).flatten(1).norm(dim=1) / scales[-1]
    loss = trajectory_loss(task, table, trajectories, scales, sigmas)
    torch.testing.assert_close(loss, expected.double(), rtol=1e-3, atol=3e-3)


def test_a_student_that_is_the_teacher_has_no_loss_and_a_finite_gradient():
    denoiser = GuidedMixture()
    sigmas = _grid(denoiser, 3)
    task = Task(denoiser, 7.5, sigmas)
    middle = torch.full((2, 1), 0.5, dtype=torch.float64)
    noise = initial_noise(range(3), denoiser.latent_shape, device=denoiser.device, dtype=torch.float32)
    states = []
    table = EPDTable(middle, torch.ones_like(middle))
    epd_sampler(task.bind(PROMPTS), noise * sigmas[0].float(), sigmas, table, callback=lambda _, x: states.append(x))
    trajectories = Trajectories(PROMPTS, torch.stack(states))
    predictor = EPD_predictor(3, 1)
    loss = trajectory_loss(task, predictor.table(), trajectories, loss_scales(task, trajectories))
    assert loss.abs().max() < 1e-6
    loss.sum().backward()
    assert predictor.r_params.grad.isfinite().all()


def _none(num_intervals):
    return torch.empty(num_intervals, 0, dtype=torch.float64)


def _refinement(task, trajectories, **changes):
    settings = {"batch": 4, "updates": 6, "learning_rate": 0.1, "cosine": True, "seed": 0, **changes}
    student = SolverParameters(_predictor().table(), task.sigmas, ["positions", "weights"])
    return Refinement(task, student, trajectories, trajectories.select([0]), **settings)


@pytest.mark.parametrize("change", [{"micro_batch": 1}, {"micro_batch": 3}, {"recompute": True}])
def test_neither_micro_batches_nor_recomputation_change_an_update(change):
    task, trajectories = _taught()
    runs = [_refinement(variant, trajectories) for variant in (task, dataclasses.replace(task, **change))]
    losses = [[run.step()[0] for _ in range(3)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*(run.student.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_trajectory_is_seen_once_in_each_round():
    task, trajectories = _taught()
    refinement = _refinement(task, trajectories, batch=4)
    drawn = []
    for refinement.done in range(6):
        drawn += refinement._drawn()
    rounds = [drawn[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(each) == list(range(6)) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_neighbouring_seeds_share_no_order():
    task, trajectories = _taught(count=12)

    def orders(seed):
        refinement = _refinement(task, trajectories, batch=12, seed=seed)
        found = set()
        for refinement.done in range(6):
            found.add(tuple(refinement._drawn()))
        return found

    assert len(orders(3)) == 6
    assert orders(3).isdisjoint(orders(4))


def test_the_step_size_follows_the_cosine():
    task, trajectories = _taught()
    refinement = _refinement(task, trajectories, updates=4)
    rates = [refinement.step()[1] for _ in range(4)]
    assert rates == pytest.approx([0.1, 0.1 * (1 + 0.5**0.5) / 2, 0.05, 0.1 * (1 - 0.5**0.5) / 2])
    constant = _refinement(task, trajectories, cosine=False)
    assert [constant.step()[1] for _ in range(2)] == [0.1, 0.1]


def test_a_restored_refinement_goes_on_bit_for_bit():
    task, trajectories = _taught()
    whole = _refinement(task, trajectories)
    expected = [whole.step() for _ in range(6)]
    first = _refinement(task, trajectories)
    for _ in range(3):
        first.step()
    second = _refinement(task, trajectories)
    second.load_state_dict(first.state_dict())
    assert [second.step() for _ in range(3)] == expected[3:]
    for one, other in zip(whole.student.parameters(), second.student.parameters(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize(
    ("name", "message"),
    [("grid", "the noise levels no longer descend"), ("history", "EPDTable.history must be finite")],
)
def test_updates_that_lead_to_no_solver_are_reported(name, message):
    task, trajectories = _taught()
    student = SolverParameters(_predictor().table(), task.sigmas, [name])
    with torch.no_grad():
        student.free[name].fill_(torch.nan)
    refinement = Refinement(
        task, student, trajectories, trajectories, batch=4, updates=6, learning_rate=0.1, cosine=True, seed=0
    )
    for ask in (refinement.step, refinement.held_out_loss):
        with pytest.raises(InputError, match=rf"diverged at update 0: {message}.* smaller --lr"):
            ask()


def test_a_step_too_wide_is_reported():
    task, trajectories = _taught()
    student = SolverParameters(_predictor().table(), task.sigmas, ["history"])
    refinement = Refinement(
        task, student, trajectories, trajectories, batch=4, updates=6, learning_rate=1e300, cosine=True, seed=0
    )
    refinement.step()
    with pytest.raises(InputError, match=r"diverged at update 1: the loss is (nan|inf); try a smaller --lr"):
        refinement.step()


def test_a_loss_that_is_no_number_is_reported():
    task, trajectories = _taught()
    refinement = _refinement(task, trajectories)
    refinement.trajectories.states[1] = torch.nan
    with pytest.raises(InputError, match="diverged at update 0"):
        refinement.step()


# ----------------------------------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def reference():
    """Held-out prompts, their noise, and where 100 Heun steps take it."""
    denoiser = GuidedMixture()
    prompts = [PROMPTS[number % 3] for number in range(192)]
    noise = initial_noise(range(1000, 1192), denoiser.latent_shape, device=denoiser.device, dtype=torch.float32)
    task = Task(denoiser, 7.5, _grid(denoiser, 101))
    with torch.no_grad():
        end = SAMPLERS["heun"](task.bind(prompts), noise * task.sigmas[0].float(), task.sigmas)
    return denoiser, task.bind(prompts), noise, end


def _distance(reference, solve, sigmas):
    """Mean over held-out images of the root mean square distance to the reference."""
    _, denoise, noise, end = reference
    with torch.no_grad():
        found = solve(denoise, noise * sigmas[0].float(), sigmas)
    return (found - end).square().flatten(1).mean(1).sqrt().mean().item()


def _classical(reference, nfe):
    """The distance of every classical solver on three schedules."""
    return {
        (name, schedule): _distance(
            reference, SAMPLERS[name], _grid(reference[0], num_steps_for(name, nfe), schedule, rho)
        )
        for name in ("ddim", "heun", "dpm2", "dpmpp", "ipndm")
        for schedule, rho in (("discrete", 1.0), ("polynomial", 7.0), ("logsnr", 7.0))
    }


@pytest.mark.parametrize("num_steps", [3, 4])
def test_from_nothing_it_beats_every_classical_solver_of_equal_parallel_cost(tmp_path, reference, num_steps):
    denoiser = reference[0]
    sigmas = _grid(denoiser, num_steps)
    options = dataclasses.replace(OPTIONS, num_steps=num_steps)
    table, metadata = load_snapshot(carried_out(tmp_path / "run", options, denoiser, PROMPTS))
    searched, _ = load_snapshot(tmp_path / "run" / "network-snapshot-000000.pkl")

    def epd(table):
        return _distance(reference, lambda denoise, x, grid: epd_sampler(denoise, x, grid, table), sigmas)

    classical = _classical(reference, options.nfe)
    uniform = epd(EPD_predictor(num_steps).table().detach())
    assert uniform > 5  # the states themselves are of about unit size: it explodes
    assert epd(searched) < 0.75 * min(classical.values())
    assert epd(table) < 0.6 * min(classical.values())
    assert (table.positions.diff(dim=-1) > 0).all()
    assert metadata["num_steps"] == num_steps


@pytest.mark.parametrize(("num_steps", "factor"), [(5, 0.6), (7, 0.45)])
def test_without_points_it_beats_every_classical_solver_of_equal_cost(tmp_path, reference, num_steps, factor):
    """By its grid and its history, from nothing; and at 4 evaluations in sequence the one with points and 6 in all."""
    denoiser = reference[0]
    changes = {"num_points": 0, "train": "history,grid", "trajectories": 256, "total_kimg": 3.2}
    options = dataclasses.replace(OPTIONS, num_steps=num_steps, **changes)
    file = carried_out(tmp_path / "run", options, denoiser, PROMPTS)
    assert file.suffix == ".json"
    table, metadata = load_snapshot(file)
    sigmas = torch.tensor(metadata["sigmas"], dtype=torch.float64)
    assert (table.num_points, metadata["learned"]) == (0, ["history", "grid"])
    assert sigmas[[0, -1]].tolist() == pytest.approx([denoiser.sigma_max, denoiser.sigma_min])
    found = _distance(reference, lambda denoise, x, grid: epd_sampler(denoise, x, grid, table), sigmas)
    assert found < factor * min(_classical(reference, options.nfe).values())


@pytest.mark.parametrize(
    ("start", "num_points", "train"),
    [("ipndm:2", 0, "grid"), ("dpm2", 1, "history,grid"), ("ipndm", 2, "positions,direction_history")],
)
def test_what_is_not_named_stays_as_the_start_has_it(tmp_path, start, num_points, train):
    options = dataclasses.replace(OPTIONS, num_steps=4, num_points=num_points, start=start, train=train, M=2)
    found, metadata = load_snapshot(carried_out(tmp_path, options, GuidedMixture(), PROMPTS))
    first, described = load_snapshot(tmp_path / "network-snapshot-000000.json")
    made = start_table(start, _grid(GuidedMixture(), 4), num_points)
    assert metadata["learned"] == described["learned"] == train.split(",")
    assert ("sigmas" in metadata) == ("grid" in train)
    for name, entries in found.columns().items():
        given = first.columns().get(name, torch.zeros_like(entries))
        assert name not in first.columns() or first.columns()[name].equal(made.columns()[name])
        assert entries.equal(given) == (name not in train.split(","))
    last = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()][-1]
    names = {"positions": "r", "grid": "sigmas"}
    assert {names.get(name, name) for name in train.split(",")} < last.keys()


def test_what_comes_out_is_the_best_of_the_checks(tmp_path):
    folder = tmp_path / "run"
    options = dataclasses.replace(OPTIONS, trajectories=16, total_kimg=0.48, lr=1.0)  # so large a step does harm
    snapshot = carried_out(folder, options, GuidedMixture(), PROMPTS)
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(31))
    checks = [line for line in lines if "held_out" in line]
    assert [line["update"] for line in checks] == [0, 10, 20, 30]
    best = min(checks, key=lambda line: line["held_out"])
    table, _ = load_snapshot(snapshot)
    torch.testing.assert_close(table.weights.sort().values, torch.tensor(best["w"]).double().sort().values)
    assert snapshot.name == "network-snapshot-000480.pkl"
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [f"network-snapshot-{seen}.{kind}" for seen in ("000000", "000480") for kind in ("json", "pkl")]
        + ["stats.jsonl"]
    )


class Interrupted(Exception):
    pass


class _Stopping(GuidedMixture):
    """Stops for good after so many calls."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def denoise(self, x, sigma, conditioning):
        self.calls -= 1
        if self.calls < 0:
            raise Interrupted
        return super().denoise(x, sigma, conditioning)


WITH_POINTS = {"scale_dir": 0.05, "train": "positions,weights,scale_dir"}
WITHOUT_POINTS = {"num_steps": 5, "num_points": 0, "train": "history,grid"}


@pytest.mark.parametrize(("changes", "expected"), [(WITH_POINTS, 8), (WITHOUT_POINTS, 6)])
def test_interruptions_anywhere_do_not_change_the_result(tmp_path, changes, expected):
    options = dataclasses.replace(
        OPTIONS, trajectories=12, M=2, batch=3, batch_gpu=4, total_kimg=0.036, afs=True, **changes
    )
    whole = carried_out(tmp_path / "whole", options, GuidedMixture(), PROMPTS)
    interruptions = 0
    for calls in range(15, 150, 17):
        folder = tmp_path / f"stopped-{calls % 2}"
        try:
            carried_out(folder, options, _Stopping(calls), PROMPTS)
        except Interrupted:
            interruptions += 1
            assert not is_finished(folder, options)
    assert interruptions == expected
    for number in {calls % 2 for calls in range(15, 150, 17)}:
        folder = tmp_path / f"stopped-{number}"
        if not is_finished(folder, options):
            carried_out(folder, options, GuidedMixture(), PROMPTS)
        for file in (whole.with_suffix(".json"), whole.parent / "stats.jsonl"):
            assert (folder / file.name).read_bytes() == file.read_bytes()
        assert is_finished(folder, options)


def test_a_full_disk_costs_no_distillation(tmp_path, monkeypatch, caplog):
    """The teacher's states and the first two updates find no room, nor do the rows of these."""
    options = dataclasses.replace(OPTIONS, trajectories=12, M=2, batch=3, batch_gpu=4, total_kimg=0.036)
    whole = carried_out(tmp_path / "whole", options, GuidedMixture(), PROMPTS)
    refused = []

    def full_at_first(write, error):
        def written(path, content):
            if len(refused) < 5:
                refused.append(path.name)
                raise error
            return write(path, content)

        return written

    full = InputError("cannot be written (No space left on device)")
    monkeypatch.setattr(distillation_run, "write_tensors", full_at_first(distillation_run.write_tensors, full))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(run_folder, "append_whole", full_at_first(run_folder.append_whole, full))
    snapshot = carried_out(tmp_path / "full", options, GuidedMixture(), PROMPTS)
    assert refused == ["teacher.pt", "stats.jsonl", "training-state.pt", "stats.jsonl", "training-state.pt"]
    assert caplog.text.count("No space left on device") == 5
    for file in (whole.with_suffix(".json"), whole.parent / "stats.jsonl"):
        assert (snapshot.parent / file.name).read_bytes() == file.read_bytes()
    assert is_finished(snapshot.parent, options)


def test_a_disk_that_is_full_at_the_end_of_a_distillation_is_an_error(tmp_path, monkeypatch):
    options = dataclasses.replace(OPTIONS, trajectories=12, M=2, batch=3, batch_gpu=4, total_kimg=0.036)

    def full(path, content):
        raise InputError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(distillation_run, "write_tensors", full)
    with pytest.raises(InputError, match=r"training-state\.pt: cannot be written"):
        carried_out(tmp_path, options, GuidedMixture(), PROMPTS)
    assert not is_finished(tmp_path, options)


@pytest.mark.parametrize("changes", [WITH_POINTS, WITHOUT_POINTS])
def test_what_is_held_out_is_neither_searched_nor_trained_on(tmp_path, monkeypatch, changes):
    given = {}
    make, find = distillation_run.Refinement, distillation_run.search

    def recorded(task, student, training, held_out, **settings):
        given.update(training=training.states, held_out=held_out.states)
        return make(task, student, training, held_out, **settings)

    def searched(task, trajectories, num_points):
        given.update(searched=trajectories.states)
        return find(task, trajectories, num_points)

    monkeypatch.setattr(distillation_run, "Refinement", recorded)
    monkeypatch.setattr(distillation_run, "search", searched)
    options = dataclasses.replace(OPTIONS, trajectories=8, M=1, total_kimg=0.008, **changes)
    carried_out(tmp_path, options, GuidedMixture(), PROMPTS)
    starts = {name: {tuple(state.flatten().tolist()) for state in states[0]} for name, states in given.items()}
    assert len(starts["held_out"]) == options.held_out
    assert len(starts["training"]) == options.trajectories - options.held_out
    assert starts["searched"] <= starts["training"]
    assert starts["training"].isdisjoint(starts["held_out"])


@pytest.mark.parametrize("removed", ["teacher.pt", "training-state.pt"])
def test_a_run_that_ends_while_it_tidies_up_leaves_nothing_behind(tmp_path, monkeypatch, removed):
    options, unlink = dataclasses.replace(OPTIONS, trajectories=8, M=1, total_kimg=0.008), Path.unlink

    def interrupted(path, **options):
        if path.name == removed:
            raise Interrupted
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(Interrupted):
            carried_out(tmp_path, options, GuidedMixture(), PROMPTS)
    if not is_finished(tmp_path, options):
        carried_out(tmp_path, options, GuidedMixture(), PROMPTS)
    assert not list(tmp_path.glob("*.pt"))


def test_a_damaged_state_is_named(tmp_path):
    options = dataclasses.replace(OPTIONS, trajectories=8, M=1, total_kimg=0.064)
    with pytest.raises(Interrupted):
        carried_out(tmp_path, options, _Stopping(55), PROMPTS)
    (tmp_path / "training-state.pt").write_bytes(b"rubbish")
    with pytest.raises(InputError, match=r"training-state\.pt: the state of the run is corrupt.*remove it"):
        carried_out(tmp_path, options, GuidedMixture(), PROMPTS)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("training-state.pt", ("best_loss",), "low"),
        ("training-state.pt", ("best",), {"r_params": torch.zeros(1)}),
        ("training-state.pt", ("refinement",), None),
        ("training-state.pt", ("refinement", "done"), 1.5),
        ("training-state.pt", ("refinement", "parameters"), {}),
        ("training-state.pt", ("refinement", "optimizer"), {"state": {0: {"exp_avg": 3}}}),
        ("teacher.pt", ("states",), None),
        ("teacher.pt", ("states",), torch.zeros(2, 3)),
        ("teacher.pt", ("prompts",), torch.zeros(2)),
    ],
)
def test_a_state_with_other_things_in_their_place_is_refused(tmp_path, name, place, value):
    options = dataclasses.replace(OPTIONS, trajectories=8, M=1, total_kimg=0.064)
    with pytest.raises(Interrupted):
        carried_out(tmp_path, options, _Stopping(55), PROMPTS)
    state = part = torch.load(tmp_path / name, weights_only=True)
    for parent in place[:-1]:
        part = part[parent]
    assert place[-1] in part
    part[place[-1]] = value
    torch.save(state, tmp_path / name)
    with pytest.raises(InputError, match=re.escape(name)):
        carried_out(tmp_path, options, GuidedMixture(), PROMPTS)


def test_a_teacher_that_leaves_the_numbers_is_reported(tmp_path):
    denoiser = GuidedMixture()
    denoiser.default_guidance_scale = 1e30
    options = dataclasses.replace(OPTIONS, guidance_rate=None, trajectories=4)
    with pytest.raises(InputError, match="teacher dpm2 left the range of numbers"):
        carried_out(tmp_path / "run", options, denoiser, PROMPTS)


def test_prompts_that_the_model_does_not_know_are_named(tmp_path):
    with pytest.raises(InputError, match="unknown classes"):
        carried_out(tmp_path / "run", OPTIONS, GuidedMixture(), ["a dog"])
    assert not (tmp_path / "run").exists()


def test_folders_are_numbered_and_named_after_the_options(tmp_path):
    assert next_folder(tmp_path / "none", OPTIONS).name == "00000-mixture-3-4-epd-dpm2-9-discrete"
    (tmp_path / "00007-other").mkdir()
    (tmp_path / "20260101-000000-run").mkdir()
    afs = dataclasses.replace(OPTIONS, afs=True, schedule_type="polynomial", schedule_rho=7.0)
    assert next_folder(tmp_path, afs).name == "00008-mixture-3-3-epd-dpm2-9-poly7-afs"


def test_runs_that_start_together_get_numbers_of_their_own(tmp_path):
    barrier = Barrier(8)

    def claim(number):
        options = dataclasses.replace(OPTIONS, M=1 + number % 4)  # half of them would have another one's very name
        barrier.wait()
        return [claim_folder(tmp_path, options) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        claimed = [folder for folders in pool.map(claim, range(8)) for folder in folders]
    assert sorted(folder.name[:5] for folder in claimed) == [f"{number:05d}" for number in range(40)]
    assert sorted(tmp_path.iterdir()) == sorted(claimed)


def test_a_folder_that_cannot_be_made_leaves_no_claim(tmp_path):
    with pytest.raises(InputError, match="File name too long"):
        claim_folder(tmp_path, dataclasses.replace(OPTIONS, dataset_name="x" * 300))
    assert not list(tmp_path.iterdir())


def test_a_folder_holds_its_options_or_is_not_there(tmp_path, monkeypatch):
    assert load_options(claim_folder(tmp_path, OPTIONS)) == OPTIONS

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match="No space left"):
        claim_folder(tmp_path, OPTIONS)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_number_that_a_killed_process_claimed_is_passed_over(tmp_path):
    (tmp_path / "00000").mkdir()
    assert claim_folder(tmp_path, OPTIONS).name.startswith("00001-")
