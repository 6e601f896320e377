"""A distillation as a run: what it was told, its folder, its progress, and how it goes on after an interruption.

A run's folder `<number>-<dataset>-<num_steps>-<nfe>-<student>-<teacher>-<M>-<schedule>` holds

    training_options.json              everything it was told
    network-snapshot-000000.{pkl,json} the table that the search found, or with --init-only the cold start
    network-snapshot-<n>.{pkl,json}    the table at the end, n the number of trajectories that updates have seen
    stats.jsonl                        a JSON object for the search, and one for each update, its held-out check in it

and, until it is finished, teacher.pt (the teacher's states) and training-state.pt, from which `resume` goes on.
"""

from __future__ import annotations

import json
import math
import re
import sys
import types
import typing
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from errors import InputError
from files import only_writer, removed_if_it_fails, write_atomically
from models.denoiser import Denoiser
from models.options import ModelOptions
from models.randomness import generator_of
from models.registry import default_guidance_scale
from solvers import EPDTable, network_evaluations
from training.distillation import (
    HELD_OUT_SHARE,
    SEARCHED_POSITIONS,
    SEARCHED_TRAJECTORIES,
    Refinement,
    Target,
    Task,
    Trajectories,
    search,
    teacher_schedule,
    teacher_trajectories,
)
from training.networks import EPD_predictor, Plain
from training.runs.checkpoint import fitting, read_tensors, write_tensors
from training.runs.configuration import SHOWN
from training.runs.run_folder import MetricsLog
from training.snapshot import load_snapshot, save_snapshot
from training.solver import MODEL_OF_DATASET, MODEL_OPTIONS, USUAL_BACKEND

OPTIONS, STATS, TEACHER, STATE = "training_options.json", "stats.jsonl", "teacher.pt", "training-state.pt"

STATE_KEYS, TEACHER_KEYS = frozenset({"refinement", "best_loss", "best"}), frozenset({"states", "prompts"})

REMEDY = "remove it, and the run starts this part again"
LARGEST_OPTIONS = 2**16  # bytes; a run's options have some hundred

# Between two looks at the held-out trajectories.
UPDATES_PER_CHECK = 10


@dataclass(frozen=True)
class Options:
    """What a distillation is told, by the public EPD code base's names where it has them.

    dataset_name: the model's world. model_path: folder, file or registered name, None for what dataset_name stands for.
    num_steps: grid points. num_points: K. sampler_tea, M: the teacher, and its extra steps in each interval. afs,
    scale_dir, scale_time: the student's. guidance_rate: None for the model's own. schedule_type, schedule_rho: of the
    grid. trajectories: how many the teacher is followed on; a quarter of them is held out. batch: trajectories an
    update. batch_gpu: trajectories at once on the device. total_kimg: thousands of trajectories that all updates
    together see. lr, coslr: Adam's step size, and whether it decays. target: what the last states are compared as.
    prompt_file: None with init_only. init_only: write a start, train nothing. start: which (`training.starts`). What
    follows it: see `models.options.ModelOptions`.
    """

    dataset_name: str
    model_path: str | None
    num_steps: int
    num_points: int
    sampler_stu: Literal["epd"]
    sampler_tea: str
    M: int
    afs: bool
    scale_dir: float
    scale_time: float
    guidance_rate: float | None
    schedule_type: str
    schedule_rho: float
    trajectories: int
    batch: int
    batch_gpu: int
    total_kimg: float
    lr: float
    coslr: bool
    target: Target
    recompute: bool
    seed: int
    prompt_file: str | None
    init_only: bool
    start: str = "near_euler"
    lora: str | None = None
    vae: str | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    without_t5: bool = False

    @property
    def model(self) -> str:
        """What `load_denoiser` is asked for."""
        return self.model_path or MODEL_OF_DATASET.get(self.dataset_name, self.dataset_name)

    @property
    def model_options(self) -> ModelOptions:
        """And how."""
        return ModelOptions(
            self.lora, self.vae, self.height, self.width, self.negative_prompt, without_t5=self.without_t5
        )

    @property
    def nfe(self) -> int:
        """Evaluations in sequence, before guidance."""
        return network_evaluations("epd", self.num_steps, num_points=self.num_points, afs=self.afs).parallel

    @property
    def description(self) -> str:
        """The run folder's name without its number."""
        schedule = {"polynomial": f"poly{self.schedule_rho:g}", "time_uniform": f"uni{self.schedule_rho:g}"}
        teacher = (self.start.replace(":", ""),) if self.init_only else (self.sampler_tea, self.M)
        parts = (self.dataset_name, self.num_steps, self.nfe, self.sampler_stu, *teacher)
        named = "-".join(map(str, (*parts, schedule.get(self.schedule_type, self.schedule_type))))
        return named + ("-afs" if self.afs else "")

    @property
    def updates(self) -> int:
        """How many updates the refinement makes."""
        return round(1000 * self.total_kimg / self.batch)

    @property
    def held_out(self) -> int:
        """How many trajectories no update sees."""
        return max(1, round(HELD_OUT_SHARE * self.trajectories))

    def metadata(self, denoiser: Denoiser | None) -> dict[str, Plain]:
        """What the snapshots say about their table; of a model that was not loaded, what only it knows is None.

        Its guidance is then the usual one of its family, and, where there is no model, of Stable Diffusion.
        """
        known = (
            {"sigma_min": None, "sigma_max": None, "img_resolution": None}
            if denoiser is None
            else {
                "sigma_min": denoiser.sigma_min,
                "sigma_max": denoiser.sigma_max,
                "img_resolution": denoiser.image_size[0],
                **({} if denoiser.backend == USUAL_BACKEND else {"backend": denoiser.backend}),
            }
        )
        own = default_guidance_scale(self.model) if denoiser is None else denoiser.default_guidance_scale
        guidance = own if self.guidance_rate is None else self.guidance_rate
        keys = ("dataset_name", "sampler_stu", "sampler_tea", "M", "schedule_type", "schedule_rho", "afs")
        return {
            **{key: getattr(self, key) for key in (*keys, "scale_dir", "scale_time")},
            "guidance_type": "uncond" if guidance == 1 else "cfg",
            "guidance_rate": guidance,
            **({"model_path": self.model_path} if self.model_path else {}),
            **({MODEL_OPTIONS: changes} if (changes := self.model_options.changes()) else {}),
            **known,
        }

    def evaluations(self) -> dict[str, int]:
        """Network evaluations of one latent, by phase, without the doubling by guidance and by a gradient."""
        teacher = network_evaluations(self.sampler_tea, (self.num_steps - 1) * (self.M + 1) + 1).total
        student = network_evaluations("epd", self.num_steps, num_points=self.num_points, afs=self.afs).total
        searched = min(SEARCHED_TRAJECTORIES, self.trajectories - self.held_out)
        checks = 1 + -(-self.updates // UPDATES_PER_CHECK)
        return {
            "teacher": self.trajectories * teacher,
            "search": searched * ((self.num_steps - 1) * (1 + SEARCHED_POSITIONS) + student),
            "refinement": self.updates * self.batch * student,
            "held-out checks": checks * self.held_out * student,
        }


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
                        return claim.rename(folder)
                claim.rmdir()
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be made ({error.strerror})") from error


def load_options(folder: Path) -> Options:
    """What the run in `folder` was told; whether each value has its type is checked, not whether it is in range.

    Raises:
        InputError: there is no distillation, or its options are damaged.
    """
    file = folder / OPTIONS
    try:
        with file.open("rb") as stream:
            told = json.loads(stream.read(LARGEST_OPTIONS))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: no readable options of a distillation ({error})") from error
    kinds = typing.get_type_hints(Options)
    if isinstance(told, dict):
        told = {field.name: field.default for field in fields(Options) if field.default is not MISSING} | told
    if not isinstance(told, dict) or told.keys() != kinds.keys():
        raise InputError(f"{file}: no options of a distillation: they are {', '.join(kinds)}, and no others")
    for key, kind in kinds.items():
        if not _has_kind(told[key], kind):
            raise InputError(f"{file}: {key} is {SHOWN.repr(told[key])}, which it cannot be: the file is damaged")
    return Options(**told)


def _has_kind(value: object, kind: Any) -> bool:
    """Whether a value that JSON gave is of the type of an option."""
    members = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_has_kind(value, member) for member in members)
    if members:  # of a Literal
        return value in members
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind and (kind is not str or value.isprintable())


def write_start(folder: Path, options: Options, table: EPDTable, denoiser: Denoiser | None) -> Path:
    """A run without training: a table to start from (`training.starts`). Returns the snapshot."""
    return save_snapshot(folder / "network-snapshot-000000.pkl", table, options.metadata(denoiser))


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
        InputError: prompts that the model cannot take, or a schedule that does not suit it.
    """
    lesson = Lesson(_teacher_sigmas(options, denoiser), *_drawn(options, prompts))
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
            _searched(folder, options, task, training),
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
    refinement.predictor.load_state_dict(_load(folder / STATE, STATE_KEYS)["best"])
    table, _ = refinement.predictor.table().detach().sorted_by_position()
    snapshot = save_snapshot(_last_snapshot(folder, options), table, options.metadata(denoiser))
    (folder / STATE).unlink()
    (folder / TEACHER).unlink()
    return snapshot


def is_finished(folder: Path, options: Options) -> bool:
    """Whether there is nothing left to do."""
    if options.init_only:
        return (folder / "network-snapshot-000000.json").exists()
    return _last_snapshot(folder, options).exists() and not (folder / STATE).exists()


def _last_snapshot(folder: Path, options: Options) -> Path:
    return folder / f"network-snapshot-{options.updates * options.batch:06d}.pkl"


def _teacher_sigmas(options: Options, denoiser: Denoiser) -> Tensor:
    """The teacher's grid; every (M + 1)-th point is the student's."""
    try:
        return teacher_schedule(
            options.schedule_type,
            options.num_steps,
            options.M,
            denoiser.sigma_min,
            denoiser.sigma_max,
            options.schedule_rho,
            denoiser,
        )
    except ValueError as error:
        raise InputError(f"schedule_type {options.schedule_type}: {error}") from error


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
    write_tensors(file, {"states": trajectories.states.cpu(), "prompts": lesson.prompts})
    return trajectories


def _searched(folder: Path, options: Options, task: Task, training: Trajectories) -> EPD_predictor:
    """The predictor to refine: with the table that the search finds, or has found."""
    file = folder / "network-snapshot-000000.pkl"
    metadata = options.metadata(task.denoiser)
    if not file.exists():
        found = search(task, training.select(range(min(SEARCHED_TRAJECTORIES, len(training)))), options.num_points)
        ones = torch.ones_like(found.weights)
        scales = {key: ones if getattr(options, key) else None for key in ("scale_dir", "scale_time")}
        save_snapshot(file, EPDTable(found.positions, found.weights, **scales), metadata)
    return EPD_predictor.from_table(load_snapshot(file)[0], metadata)


def _refine(folder: Path, refinement: Refinement, bar: tqdm) -> None:
    """All updates that are left; the state is on disk after each, the best parameters with it."""
    if (folder / STATE).exists():
        state = _load(folder / STATE, STATE_KEYS)
        with fitting(folder / STATE, REMEDY):
            best_loss, best = float(state["best_loss"]), dict(state["best"])
            if best:
                refinement.predictor.load_state_dict(best)  # as at the end
            refinement.load_state_dict(state["refinement"])
    else:
        best_loss, best = math.inf, {}
    stats = MetricsLog(folder / STATS, "update")
    stats.rewind(refinement.done if best else -1)
    while not best or refinement.done < refinement.updates:
        line: dict[str, Plain] = {}
        if best:
            update = refinement.step()
            line = {"loss": update.loss, "lr": update.learning_rate}
        if refinement.done % UPDATES_PER_CHECK == 0 or refinement.done == refinement.updates:
            table, loss = refinement.table(), refinement.held_out_loss()
            line |= {"held_out": loss, "r": table.positions.tolist(), "w": table.weights.tolist()}
            if not best and not math.isfinite(loss):
                raise InputError(
                    f"{folder}: the held-out loss of the first table is {loss}: the teacher or the search diverged"
                )
            if loss < best_loss:
                best_loss, best = loss, refinement.state_dict()["parameters"]
            bar.set_postfix(held_out=f"{loss:.4f}", best=f"{best_loss:.4f}")
        line = {"update": refinement.done, "trajectories": refinement.done * refinement.batch, **line}
        stats.append(line)
        write_tensors(folder / STATE, {"refinement": refinement.state_dict(), "best_loss": best_loss, "best": best})


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
