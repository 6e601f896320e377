"""What a distillation is told: the options of `train.py`, what is usual where they are silent, and their file."""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from errors import InputError
from models.denoiser import Denoiser
from models.options import CHANGING, ModelOptions
from models.registry import default_guidance_scale
from solvers import network_evaluations
from training.distillation import HELD_OUT_SHARE, SEARCHED_POSITIONS, SEARCHED_TRAJECTORIES, Target
from training.networks import Plain
from training.parameters import GRID, PARTS, named_parts
from training.runs.configuration import SHOWN
from training.solver import MODEL_OF_DATASET, MODEL_OPTIONS, USUAL_BACKEND, Schedule
from training.starts import NEAR_EULER, check_start

OPTIONS = "training_options.json"
LARGEST_OPTIONS = 2**16  # bytes; a run's options have some hundred

# Between two looks at the held-out trajectories.
UPDATES_PER_CHECK = 10

SEARCH = "search"
"""The start that is found interval by interval, from the teacher (`training.distillation.search`)."""
WITHOUT_POINTS = "ddim"  # the start without points where nothing is searched
SCALES = ("scale_dir", "scale_time")
DISTILLABLE = tuple(name for name in PARTS if name != "guidance")
"""What a distillation can learn of a solver; `_check_learned` says why not guidance."""


@dataclass(frozen=True)
class Options:
    """What a distillation is told, by the public EPD code base's names where it has them.

    dataset_name: the model's world. model_path: folder, file or registered name, None for what dataset_name stands for.
    num_steps: grid points. num_points: K. sampler_tea, M: the teacher, and its extra steps in each interval. afs,
    scale_dir, scale_time: the student's, 0 or the bound of a scale. guidance_rate: None for the model's own.
    schedule_type, schedule_rho: of the grid, at first. sigma_max: the noise level that it begins at, None for the
    model's largest, as where a teacher is followed. trajectories: how many the teacher is followed on; a quarter of
    them is held out. batch: trajectories an update. batch_gpu: trajectories at once on the device. total_kimg:
    thousands of trajectories that all updates together see. lr, coslr: Adam's step size, and whether it decays. target:
    what the last states are compared as. prompt_file: None with init_only, and of an unconditional model. init_only:
    write a start, train nothing. start: SEARCH, or one of `training.starts`. train: what is learned, of DISTILLABLE;
    None with init_only. The others: see `models.options.ModelOptions`.
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
    start: str
    train: str | None
    lora: str | None = None
    vae: str | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    without_t5: bool = False
    sigma_max: float | None = None

    @property
    def model(self) -> str:
        """What `load_denoiser` is asked for."""
        return self.model_path or MODEL_OF_DATASET.get(self.dataset_name, self.dataset_name)

    @property
    def model_options(self) -> ModelOptions:
        """And how."""
        return ModelOptions(**{name: getattr(self, name) for name in CHANGING})

    @property
    def learned(self) -> tuple[str, ...]:
        """What is learned."""
        return () if self.train is None else named_parts(self.train)

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
        return named + ("" if self.sigma_max is None else f"-from{self.sigma_max:g}") + ("-afs" if self.afs else "")

    def sigmas(self, denoiser: Denoiser, extra_steps: int = 0) -> Tensor:
        """The student's noise levels with so many more in each interval, float64; with `M` more they are the teacher's.

        Every schedule spaces its points evenly in some variable of its own, so each (extra_steps + 1)-th is the
        student's. Raises InputError where the schedule does not suit the model.
        """
        points = (self.num_steps - 1) * (extra_steps + 1) + 1
        return Schedule(self.schedule_type, self.schedule_rho, self.sigma_max).sigmas(points, denoiser)

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
            **({"learned": list(self.learned)} if self.learned else {}),
            **known,
            **({} if self.sigma_max is None else {"sigma_max": self.sigma_max}),
        }

    def evaluations(self) -> dict[str, int]:
        """Network evaluations of one latent, by phase, without the doubling by guidance and by a gradient."""
        teacher = network_evaluations(self.sampler_tea, (self.num_steps - 1) * (self.M + 1) + 1).total
        student = network_evaluations("epd", self.num_steps, num_points=self.num_points, afs=self.afs).total
        searched = min(SEARCHED_TRAJECTORIES, self.trajectories - self.held_out) if self.start == SEARCH else 0
        curves = (self.num_steps - 1) * (1 + SEARCHED_POSITIONS) if self.num_points else 0
        checks = 1 + -(-self.updates // UPDATES_PER_CHECK)
        return {
            "teacher": self.trajectories * teacher,
            "search": searched * (curves + student),
            "refinement": self.updates * self.batch * student,
            "held-out checks": checks * self.held_out * student,
        }


def settled(told: Mapping[str, Any]) -> dict[str, str | None]:
    """The options `start` and `train`, of all options; None among them stands for what is usual with the others.

    Raises:
        InputError: they cannot go together.
    """
    points, start = told["num_points"], told["start"]
    bounded = [name for name in SCALES if told[name]]
    if told["init_only"]:
        if told["train"] is not None:
            raise InputError(f"--train {told['train']}: --init-only trains nothing; leave one of them out")
        start = start or (NEAR_EULER if points else WITHOUT_POINTS)
        if start == SEARCH:
            raise InputError(f"--start {SEARCH} is found from the teacher's trajectories: leave --init-only out")
        check_start(start, points)
        return {"start": start, "train": None}
    if (first := told.get("sigma_max")) is not None:
        raise InputError(
            f"--sigma_max {first:g}: a teacher begins at the model's own; give it with --init-only, and "
            "tune by a reward from there"
        )
    usual = ["positions", "weights", *bounded] if points else ["history", GRID]
    learned = _able(named_parts(told["train"]) if told["train"] else usual, told)
    _check_learned(learned, told, bounded)
    searched = _able(["positions", "weights"] if points else ["history"], told)
    if start is None:
        start = SEARCH if {*searched} <= {*learned} else NEAR_EULER if points else WITHOUT_POINTS
    if start != SEARCH:
        check_start(start, points)
    elif not {*searched} <= {*learned}:
        raise InputError(
            f"--start {SEARCH} finds {' and '.join(searched)}, which --train {','.join(learned)} leaves out"
        )
    return {"start": start, "train": ",".join(learned)}


def _able(names: Sequence[str], told: Mapping[str, Any]) -> list[str]:
    """Those of the names of which something can vary in such a table."""
    return [name for name in names if PARTS[name].free(told["num_steps"] - 1, told["num_points"])]


def _check_learned(learned: Sequence[str], told: Mapping[str, Any], bounded: Sequence[str]) -> None:
    if not learned:
        able = ", ".join(_able(DISTILLABLE, told)) or "nothing"
        raise InputError(
            f"--train {told['train'] or 'is silent'}: nothing of it can vary with --num_steps {told['num_steps']} and "
            f"--num_points {told['num_points']}; {able} can"
        )
    if "guidance" in learned:
        raise InputError(
            "--train guidance: a distilled solver follows its teacher, which has one guidance scale; whether another "
            "is better only a reward can say (python -m training.ppo.launch)"
        )
    for name in SCALES:
        if (name in learned) != (name in bounded):
            raise InputError(
                f"--train {','.join(learned)} and --{name} {told[name]:g}: a scale is learned within its bound: give "
                f"both, for example --{name} 0.05 and {name} in --train, or neither"
            )


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
        if "train" not in told:  # an older file, which had no choice where it trained
            told |= {"start": told.get("start", NEAR_EULER) if told.get("init_only") else SEARCH, "train": None}
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
