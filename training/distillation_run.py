"""A distillation as a run: what it was told, its folder, its progress, and how it goes on after an interruption.

A run's folder `<number>-<dataset>-<num_steps>-<nfe>-<student>-<teacher>-<M>-<schedule>` holds

    training_options.json              everything it was told
    network-snapshot-000000.json       the solver that the search found, or another start
    network-snapshot-<n>.json          the solver at the end, n the number of trajectories that updates have seen
    stats.jsonl                        a JSON object for the search, and one for each update, its held-out check in it

beside each solver a .pkl where the public code base can hold it, and, until it is finished, teacher.pt (the teacher's
states) and training-state.pt, from which `resume` goes on.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from errors import InputError
from files import move, only_writer, removed_if_it_fails, write_atomically
from models.denoiser import Denoiser
from models.randomness import generator_of
from solvers import EPDTable
from training.distillation import (
    SEARCHED_TRAJECTORIES,
    Refinement,
    Task,
    Trajectories,
    search,
    teacher_trajectories,
)
from training.distillation_options import OPTIONS, SCALES, SEARCH, UPDATES_PER_CHECK, Options
from training.networks import Plain
from training.parameters import GRID, SolverParameters
from training.runs.checkpoint import fitting, read_tensors, write_tensors
from training.runs.run_folder import MetricsLog
from training.snapshot import GRID as SIGMAS
from training.snapshot import JSON_KEYS, load_snapshot, save_snapshot
from training.solver import check_afs
from training.starts import start_table

log = logging.getLogger(__name__)

STATS, TEACHER, STATE = "stats.jsonl", "teacher.pt", "training-state.pt"
START = "network-snapshot-000000.json"  # the table that a run begins at, or all that one without training makes

STATE_KEYS, TEACHER_KEYS = frozenset({"refinement", "best_loss", "best"}), frozenset({"states", "prompts"})

REMEDY = "remove it, and the run starts this part again"


def next_folder(root: Path, options: Options) -> Path:
    """The numbered folder that a run started now would have, not made."""
    taken = [re.match(r"\d{5}(?=-|$)", path.name) for path in root.iterdir()] if root.is_dir() else []
    number = max((int(match[0]) for match in taken if match), default=-1) + 1
    return root / f"{number:05d}-{options.description}"


def claim_folder(root: Path, options: Options) -> Path:
    """Make the next numbered folder, with the options in it; of runs that are started together each gets its number.

    A folder named by the number alone is the claim to it: only one process can make it, and renames it once it has seen
    that nobody was done with the same number before.

    Raises:
        InputError: it cannot be made; then there is none.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            folder = next_folder(root, options)
            claim = folder.with_name(folder.name.partition("-")[0])
            with suppress(FileExistsError):
                claim.mkdir()
                with removed_if_it_fails(claim):
                    if not any(root.glob(f"{claim.name}-*")):
                        write_atomically(claim / OPTIONS, (json.dumps(asdict(options), indent=2) + "\n").encode())
                        move(claim, folder)
                        return folder
                claim.rmdir()
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be made ({error.strerror})") from error


def untrained_table(options: Options, denoiser: Denoiser | None) -> EPDTable:
    """The table that `options.start` names, with scales 1 where the options ask for scales.

    `denoiser` gives the grid where the start depends on it (`training.starts.needs_grid`); otherwise it may be None.
    Raises InputError for a schedule that does not suit the model.
    """
    any_grid = torch.linspace(2, 1, options.num_steps, dtype=torch.float64)
    sigmas = any_grid if denoiser is None else options.sigmas(denoiser)
    return _with_scales(start_table(options.start, sigmas, options.num_points), options)


def _with_scales(table: EPDTable, options: Options) -> EPDTable:
    ones = {name: torch.ones_like(table.positions) for name in SCALES if getattr(options, name) and table.num_points}
    return replace(table, **ones)


@dataclass(frozen=True)
class Lesson:
    """What the teacher is to show: its grid, float64 [(num_steps - 1) (M + 1) + 1], and a prompt and a noise seed for
    each trajectory.
    """

    sigmas: Tensor
    prompts: list[str]
    seeds: list[int]


def prepare(options: Options, denoiser: Denoiser, prompts: list[str]) -> Lesson:
    """Draw the trajectories' prompts and seeds from `prompts`.

    Raises:
        InputError: prompts that the model cannot take, or a schedule, a guidance or an AFS that does not suit it.
    """
    if options.afs:
        check_afs(denoiser)
    if options.guidance_rate is not None:
        denoiser.check_guidance(options.guidance_rate)
    lesson = Lesson(options.sigmas(denoiser, options.M), *_drawn(options, prompts))
    denoiser.validate_prompts(lesson.prompts)
    return lesson


def distil(folder: Path, options: Options, denoiser: Denoiser, lesson: Lesson) -> Path:
    """Carry out a run from its start, or from where it was interrupted; returns the last snapshot.

    Interruptions do not change the result.

    Raises:
        InputError: an AFS that does not suit the model, a teacher or a training that diverges, files that cannot be
            written or read, or another process works in the folder.
    """
    with only_writer(folder):
        return _distil(folder, options, denoiser, lesson)


def _distil(folder: Path, options: Options, denoiser: Denoiser, lesson: Lesson) -> Path:
    with tqdm(total=sum(options.evaluations().values()), unit="evaluation", smoothing=0.05) as bar:
        task = Task(
            denoiser=denoiser,
            guidance_scale=options.guidance_rate,
            sigmas=lesson.sigmas[:: options.M + 1],
            afs=options.afs,
            target=options.target,
            micro_batch=options.batch_gpu,
            recompute=options.recompute,
            progress=bar.update,
        )
        bar.set_description("teacher")
        trajectories = _taught(folder / TEACHER, task, options.sampler_tea, lesson)
        training = trajectories.select(range(len(trajectories) - options.held_out))
        held_out = trajectories.select(range(len(training), len(trajectories)))
        bar.set_description("search")
        refinement = Refinement(
            task,
            _started(folder, options, task, training),
            training,
            held_out,
            batch=options.batch,
            updates=options.updates,
            learning_rate=options.lr,
            cosine=options.coslr,
            seed=options.seed,
        )
        bar.set_description("refinement")
        _refine(folder, refinement, bar)
    refinement.student.load_state_dict(_load(folder / STATE, STATE_KEYS)["best"])
    table, sigmas = refinement.solver()
    own = {SIGMAS: sigmas.tolist()} if GRID in options.learned else {}
    snapshot = save_snapshot(_last_snapshot(folder, options), table, options.metadata(denoiser) | own)
    (folder / TEACHER).unlink(missing_ok=True)
    (folder / STATE).unlink()  # last: a run without it is finished, and nobody would tidy up after it
    return snapshot


def is_finished(folder: Path, options: Options) -> bool:
    """Whether there is nothing left to do."""
    if options.init_only:
        return (folder / START).exists()
    return _last_snapshot(folder, options).exists() and not (folder / STATE).exists()


def _last_snapshot(folder: Path, options: Options) -> Path:
    return folder / f"network-snapshot-{options.updates * options.batch:06d}.json"


def _drawn(options: Options, prompts: list[str]) -> tuple[list[str], list[int]]:
    """A prompt and a noise seed for each trajectory; every prompt is drawn before one is drawn again."""
    generator = generator_of(options.seed)
    rounds = -(-options.trajectories // len(prompts))
    order = [index for _ in range(rounds) for index in torch.randperm(len(prompts), generator=generator).tolist()]
    seeds = torch.randint(2**62, (options.trajectories,), generator=generator) % 2**32
    return [prompts[index] for index in order[: options.trajectories]], seeds.tolist()


def _taught(file: Path, task: Task, sampler: str, lesson: Lesson) -> Trajectories:
    """The teacher's trajectories, from the file if they are there."""
    if file.exists():
        state = _load(file, TEACHER_KEYS)
        if state["prompts"] != lesson.prompts:
            raise InputError(f"{file}: belongs to other prompts; the prompt file has changed since the run began")
        shape = (len(task.sigmas), len(lesson.prompts), *task.denoiser.latent_shape)
        if not isinstance(state["states"], Tensor) or state["states"].shape != shape:
            raise InputError(f"{file}: its states are no tensor of shape {[*shape]}; {REMEDY}")
        return Trajectories(lesson.prompts, state["states"].to(task.denoiser.device, torch.float32))
    trajectories = teacher_trajectories(task, sampler, lesson.sigmas, lesson.prompts, lesson.seeds)
    with _outlived():
        write_tensors(file, {"states": trajectories.states.cpu(), "prompts": lesson.prompts})
    return trajectories


def _started(folder: Path, options: Options, task: Task, training: Trajectories) -> SolverParameters:
    """The student to refine: what the search finds, or has found, or the start that the options name."""
    file = folder / START
    if not file.exists():
        if options.start == SEARCH:
            shown = training.select(range(min(SEARCHED_TRAJECTORIES, len(training))))
            table = _with_scales(search(task, shown, options.num_points), options)
        else:
            table = untrained_table(options, task.denoiser)
        save_snapshot(file, table, options.metadata(task.denoiser))
    bounds = {name: getattr(options, name) for name in SCALES}
    return SolverParameters(load_snapshot(file)[0], task.sigmas, options.learned, bounds)


def _refine(folder: Path, refinement: Refinement, bar: tqdm) -> None:
    """All updates that are left; the state is on disk after each, the best parameters with it."""
    if (folder / STATE).exists():
        state = _load(folder / STATE, STATE_KEYS)
        with fitting(folder / STATE, REMEDY):
            best_loss, best = float(state["best_loss"]), dict(state["best"])
            if best:
                refinement.student.load_state_dict(best)  # as at the end
            refinement.load_state_dict(state["refinement"])
    else:
        best_loss, best = math.inf, {}
    stats = MetricsLog(folder / STATS, "update")
    stats.rewind(refinement.done if best else -1)
    while not best or refinement.done < refinement.updates:
        line: dict[str, Plain] = {}
        if best:
            mean_loss, rate = refinement.step()
            line = {"loss": mean_loss, "lr": rate}
        if refinement.done % UPDATES_PER_CHECK == 0 or refinement.done == refinement.updates:
            loss = refinement.held_out_loss()
            line |= {"held_out": loss, **_learned_numbers(refinement)}
            if not best and not math.isfinite(loss):
                raise InputError(
                    f"{folder}: the held-out loss of the first table is {loss}: the teacher or the start diverged"
                )
            if loss < best_loss:
                best_loss, best = loss, refinement.state_dict()["parameters"]
            bar.set_postfix(held_out=f"{loss:.4f}", best=f"{best_loss:.4f}")
        line = {"update": refinement.done, "trajectories": refinement.done * refinement.batch, **line}
        state = {"refinement": refinement.state_dict(), "best_loss": best_loss, "best": best}
        with _outlived():
            stats.append(line)
        with nullcontext() if refinement.done == refinement.updates else _outlived():  # the last is read again
            write_tensors(folder / STATE, state)


@contextmanager
def _outlived() -> Iterator[None]:
    """A distillation outlives a disk that is full for a while: what cannot be written now is said and passed over."""
    try:
        yield
    except InputError as error:
        log.warning("%s", error)


def _learned_numbers(refinement: Refinement) -> dict[str, Plain]:
    """The learned columns, by the names that they have in snapshots."""
    table, sigmas = refinement.solver()
    columns = {**table.columns(), GRID: sigmas}
    names = {**JSON_KEYS, GRID: SIGMAS}
    return {names[name]: columns[name].tolist() for name in refinement.student.learned}


def _load(file: Path, keys: frozenset[str]) -> dict[str, Any]:
    """What `write_tensors` wrote: a dict of these keys.

    Raises:
        InputError: it is damaged, or holds something else.
    """
    try:
        state = read_tensors(file, "state of the run")
    except InputError as error:
        raise InputError(f"{error}; {REMEDY}") from error
    if not isinstance(state, dict) or state.keys() != keys:
        raise InputError(f"{file}: does not hold {', '.join(sorted(keys))}; {REMEDY}")
    return state
