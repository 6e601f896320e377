"""The solver as one value, read once: all that turns a prompt and a seed into an image of a frozen model.

Replay, reinforcement learning, evaluation, export and the drawings take their images, their costs and their numbers
from a `Solver`; nothing else puts a table, a grid and a guidance scale together.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from errors import InputError
from models.denoiser import Conditioning, Denoiser, GuidanceKind
from models.devices import DTYPES, to_device
from models.fingerprints import file_sha256
from models.generate import Asked, Measure, conditioned, initial_noise
from models.options import AS_IT_IS, ModelOptions
from models.processes import per_row
from models.recent import RecentTensors
from models.registry import usual_half
from schedules import MODEL_TIMES, SCHEDULES, FlowTime, get_schedule
from solvers import (
    COLUMNS,
    SAMPLERS,
    Denoise,
    EPDTable,
    NetworkEvaluations,
    network_evaluations,
    num_steps_for,
    with_ipndm_history,
)
from training.networks import Plain
from training.snapshot import GRID, SNAPSHOT_NAME, find_snapshot, load_snapshot

log = logging.getLogger(__name__)

# The exponent that a schedule is commonly used with; the others have none.
USUAL_RHO = {"polynomial": 7.0, "time_uniform": 1.0, "discrete": 1.0}

CLASSICAL = tuple(name for name in SAMPLERS if name != "epd")
# What a classical solver is tried at: guided few-step sampling prefers smaller exponents than the usual 7.
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
# The public code base's name of the family of Stable Diffusion 1.x, the one that files without a `backend` mean.
USUAL_BACKEND = "ldm"


def model_of(dataset: str | None, backend: str | None) -> str | None:
    """The model that the public EPD code base means by the name of its data, for a family of models (None: `ldm`)."""
    if backend not in (None, USUAL_BACKEND) and dataset in MODEL_OF_DATASET:
        return backend
    return MODEL_OF_DATASET.get(dataset, dataset)


RANGE_KEYS = frozenset({"sigma_min", "sigma_max", "flowmatch_mu", "flowmatch_shift"})
"""The keys of a snapshot that say the range of its schedule."""

# The schedule of flow matching; how near a time or a level must be to a model's, as both have been through float32.
FLOW_MATCHING, NEAR = "flowmatch", 1e-4
APART = 2.0  # by this factor, noise levels lie outside a model's range; kindred models' ranges differ by less
LARGEST_MU = 50  # of a dynamic shift; FLUX.1 has 0.5 to 1.15

MODEL_OPTIONS = "model_options"
"""The key of a snapshot that says how its model was loaded; not there where that was as it comes."""
NETWORK_DTYPE = "network_dtype"
"""The key of a snapshot that says what its network computed in as it was tuned; not there where that was float32."""

# How the public code base calls the one EPD solver in its snapshots, and its plug-in for iPNDM.
EPD_NAMES = (None, "epd", "epd_parallel")
IPNDM = "ipndm"


class Schedule(NamedTuple):
    """A schedule of noise levels by name, with its exponent (1 where it has none).

    `first` is the noise level that it begins at, where that is not the model's largest.
    """

    schedule_type: str
    rho: float
    first: float | None = None

    def __str__(self) -> str:
        """As it is written on the command line: `discrete`, `discrete:2` where the exponent is not the usual one, and
        `discrete@5` where it begins at that noise level.
        """
        usual = self.rho == USUAL_RHO.get(self.schedule_type, 1.0)
        named = self.schedule_type if usual else f"{self.schedule_type}:{self.rho:g}"
        return named if self.first is None else f"{named}@{self.first:g}"

    @property
    def is_model_time(self) -> bool:
        """Whether it follows a model's own time, and so spans the model's whole range."""
        return self.schedule_type in MODEL_TIMES

    def sigmas(
        self,
        num_steps: int,
        denoiser: Denoiser | FlowTime,
        sigma_range: tuple[float | None, float | None] = (None, None),
    ) -> Tensor:
        """Noise levels, float64 [num_steps]; least and largest are the model's where `sigma_range` is silent.

        Where the schedule has a `first` of its own, that is the largest.
        Raises InputError where the schedule does not suit the model.
        """
        low, high = sigma_range[0], self.first or sigma_range[1]
        low = denoiser.sigma_min if low is None else low
        high = denoiser.sigma_max if high is None else high
        try:
            return get_schedule(self.schedule_type, num_steps, low, high, rho=self.rho, denoiser=denoiser)
        except ValueError as error:
            raise InputError(f"schedule {self}, sigmas from {low:g} to {high:g}: {error}") from None


class Origin(NamedTuple):
    """The file that a solver was read from, and all that it says."""

    file: Path
    sha256: str
    metadata: Mapping[str, Plain]


@dataclass(frozen=True, eq=False)
class Solver:
    """A few-step solver: how it steps, at which noise levels, how strongly guided, and what it was made for.

    label: how it is called in tables. sampler: of `solvers.SAMPLERS`. num_steps: grid points.
    table: of the sampler epd, None for the others; one for all samples, or a batch, one for each. options: of the
    others, `max_order`. afs: the first evaluation is estimated, not made.
    schedule: names its noise levels; None where they are its own. sigmas: float64 [num_steps], or [B, num_steps], one
    grid a sample; None until `on` a model where a schedule names them. sigma_range: least and largest noise level of
    the schedule, None for the model's; of the public code base's flow matching the least is a time. flow_shift: that of
    the schedule flowmatch, None for the model's.
    guidance_scale: the one scale of all evaluations, 1 for none; None where the table has a column of its own, and
    until `on` a model where its default is meant. guidance_kind: what a scale does to the model, taken for classifier-
    free guidance until `on` one.
    model: what it was made for, by name or path; None where nothing says. model_options: how that was loaded. tuned_in:
    the half precision that the network had, by name, where one is told of. origin: the file it was read from, if any.
    """

    label: str
    sampler: str
    num_steps: int
    table: EPDTable | None = None
    options: Mapping[str, int] | None = None
    afs: bool = False
    schedule: Schedule | None = None
    sigmas: Tensor | None = None
    sigma_range: tuple[float | None, float | None] = (None, None)
    flow_shift: float | None = None
    guidance_scale: float | None = None
    guidance_kind: GuidanceKind = GuidanceKind.CLASSIFIER_FREE
    model: str | None = None
    model_options: ModelOptions = AS_IT_IS
    tuned_in: str | None = None
    origin: Origin | None = None

    @property
    def grid_name(self) -> str:
        """The schedule as it is written on the command line, `own` for noise levels of its own."""
        return "own" if self.schedule is None else str(self.schedule)

    @property
    def has_guidance_column(self) -> bool:
        """Whether the table has a scale of its own for each evaluation."""
        return self.table is not None and self.table.guidance is not None

    @property
    def where(self) -> str:
        """The file, for messages."""
        return self.label if self.origin is None else str(self.origin.file)

    @cached_property
    def evaluations(self) -> NetworkEvaluations:
        """What an image costs; rows count guidance as far as it is known: a scale still open counts as one."""
        scale = 1.0 if self.guidance_scale is None else self.guidance_scale
        if self.table is None:
            counted = network_evaluations(self.sampler, self.num_steps, afs=self.afs, guidance=scale)
        else:
            table = self.table if self.table.batch_size is None else self.table.select(0)
            counted = table.evaluations(afs=self.afs, guidance_scale=scale)
        return counted if self.guidance_kind.doubles else counted._replace(rows=counted.total)

    @property
    def first_rows(self) -> int:
        """Network rows of an image's evaluation at its start, by one table; none with AFS."""
        scale = self.table.guidance[0, 0].item() if self.has_guidance_column else self.guidance_scale
        return 0 if self.afs else 1 + (self.guidance_kind.doubles and scale not in (None, 1))

    @property
    def rows_at_start(self) -> int:
        """Most network rows of an image at an interval's start: two where that is, or may be, guided."""
        return 2 if self.guidance_kind.doubles and self.guidance_scale != 1 else 1

    @property
    def rows_at_once(self) -> int:
        """Most network rows of an image in one call: one for an interval's start, or its points; two where guided."""
        if not (self.guidance_kind.doubles and self.has_guidance_column):
            return self.rows_at_start * (1 if self.table is None else max(1, self.table.num_points))
        rows = 1 + (self.table.guidance != 1).int()  # [..., S, 1 + K]
        return int(torch.maximum(rows[..., 0], rows[..., 1:].sum(-1)).max())

    def on(self, denoiser: Denoiser) -> Solver:
        """The same solver with its noise levels and its guidance settled for a model.

        Raises InputError where nothing says the noise levels, they or the schedule do not suit the model, or the model
        is of another family than the solver was made for, has no guidance where the solver has, or is no place for AFS.
        """
        backend = None if self.origin is None else self.origin.metadata.get("backend")
        if backend is not None and backend != denoiser.backend:
            raise InputError(
                f"{self.where}: was made for a model of the family {backend}, and {denoiser.name} is of the family "
                f"{denoiser.backend}: choose a model of its family"
            )
        sigmas, schedule, scale = self.sigmas, self.schedule, self.guidance_scale
        if sigmas is not None:
            self._check_levels(sigmas, denoiser)
        try:
            if self.afs:
                check_afs(denoiser)
            if sigmas is None:
                sigmas = self._scheduled(denoiser)
                if not math.isclose(sigmas[0], denoiser.sigma_max, rel_tol=NEAR):
                    schedule = schedule._replace(first=schedule.first or self.sigma_range[1])
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from None
        if scale is None and not self.has_guidance_column:
            scale = denoiser.default_guidance_scale
            if self.origin is not None:
                log.warning("%s: does not say its guidance; the model's own is taken: %g", self.where, scale)
        denoiser.check_guidance(self.table.guidance if self.has_guidance_column else scale)
        return replace(self, sigmas=sigmas, schedule=schedule, guidance_scale=scale, guidance_kind=denoiser.guidance)

    def _check_levels(self, sigmas: Tensor, denoiser: Denoiser) -> None:
        """Raise InputError where noise levels of its own are none of the model's: it would draw from noise to noise."""
        if sigmas.max() > APART * denoiser.sigma_max or sigmas.min() < denoiser.sigma_min / APART:
            raise InputError(
                f"{self.where}: its noise levels go from {sigmas.max():g} to {sigmas.min():g}, those of "
                f"{denoiser.name} from {denoiser.sigma_max:g} to {denoiser.sigma_min:g}: choose a model like the one "
                "that it was made for"
            )

    def _scheduled(self, denoiser: Denoiser) -> Tensor:
        """The noise levels that the schedule names."""
        if self.schedule is None:
            raise InputError("does not say its schedule_type; name one with --schedule")
        low, high = self.sigma_range
        clock = denoiser
        if self.schedule.schedule_type == FLOW_MATCHING:
            if self.flow_shift is not None:
                clock = FlowTime(self.flow_shift, denoiser.time_min)
            if low is not None and math.isclose(low, clock.time_min, rel_tol=NEAR):
                low = None  # the time of the least level, as schedulers of flow matching call it
        return self.schedule.sigmas(self.num_steps, clock, (low, high))

    def options_for(self, model: str) -> ModelOptions:
        """How a model is to be loaded for it: as its own was, but that another model draws at a size of its own.

        Where a file of ours says how its model was loaded, that holds for any: it may have been moved.
        """
        recorded = self.origin is None or MODEL_OPTIONS in self.origin.metadata
        return self.model_options if recorded or model == self.model else AS_IT_IS

    def guided(self, scale: float) -> Solver:
        """The same with one guidance scale for all evaluations. Raises InputError where it has a column of its own."""
        if self.has_guidance_column:
            raise InputError(
                f"guidance {scale:g}: {self.where} has a scale of its own for each evaluation; leave the guidance out"
            )
        return replace(self, guidance_scale=scale)

    def on_schedule(self, schedule: Schedule) -> Solver:
        """The same at the noise levels of a named schedule; the range of a model's own time is left behind with it."""
        if self.schedule is not None and self.schedule != schedule and self.schedule.is_model_time:
            return replace(self, schedule=schedule, sigmas=None, sigma_range=(None, None), flow_shift=None)
        return replace(self, schedule=schedule, sigmas=None)

    def with_numbers(self, table: EPDTable, sigmas: Tensor | None) -> Solver:
        """The same with another table, and with noise levels of its own where some are given."""
        own = {} if sigmas is None else {"sigmas": sigmas, "schedule": None}
        scale = self.guidance_scale if table.guidance is None else None
        return replace(self, table=table, guidance_scale=scale, **own)

    def select(self, samples: slice) -> Solver:
        """The part of a batch of solvers; what all samples share stays."""
        table, sigmas = self.table, self.sigmas
        return replace(
            self,
            table=table.select(samples) if table is not None and table.batch_size is not None else table,
            sigmas=sigmas[samples] if sigmas is not None and sigmas.ndim == 2 else sigmas,
        )

    def solve(self, denoise: Denoise, noise: Tensor, first: Tensor | None = None) -> Tensor:
        """From standard normal noise [N, C, H, W] to latents; the solver is settled by `on`.

        first: of a table, its first estimate where it is known; see `solvers.epd_sampler`.
        """
        start = self.sigmas[..., 0]
        x = noise * (start if start.ndim == 0 else start.to(noise).view(-1, *[1] * (noise.ndim - 1)))
        if self.table is not None:
            return SAMPLERS["epd"](denoise, x, self.sigmas, self.table, afs=self.afs, first=first)
        return SAMPLERS[self.sampler](denoise, x, self.sigmas, afs=self.afs, **(self.options or {}))

    def latents(
        self,
        denoiser: Denoiser,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        batch_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        measure: Measure = nullcontext,
        asked: Asked = int,
        known: RecentTensors[Tensor] | None = None,
    ) -> Tensor:
        """One latent for every pair of a prompt and a seed: [N, C, H, W] in `dtype`, on the denoiser's device.

        At most `batch_size` are carried at once (None: all). A latent depends on its prompt, its seed and the solver
        only. The noise and the text embeddings are identical to the last bit in every batch; the network's matrix
        products may be summed in another order when the batch has another size, which moves latents by a few units of
        the last place a step. Differentiable in the solver's numbers, one evaluation of the network at a time
        (`models.generate.recomputed`). Samples of one prompt and one seed share their first evaluation (`_first`);
        `known` keeps these for later calls with the same model, whatever the table.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"need as many prompts as seeds, and at least one: got {len(prompts)} and {len(seeds)}")
        if self.sigmas is None or (self.guidance_scale is None and not self.has_guidance_column):
            raise ValueError(f"{self.where}: noise levels and guidance are not settled: solver.on(denoiser) is to draw")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        batches = []
        for start in range(0, len(prompts), batch_size or len(prompts)):
            rows = slice(start, start + (batch_size or len(prompts)))
            with measure("text"):
                conditioning = denoiser.encode(prompts[rows], self.guidance_scale)
            with measure("solver"):
                noise = initial_noise(seeds[rows], denoiser.latent_shape, device=denoiser.device, dtype=dtype)
                # The table stays on the host, where it is checked and multiplied out without a word to the device.
                denoise = conditioned(denoiser, conditioning, measure, asked, recompute=True)
                part = self.select(rows)
                first = part._first(denoiser, prompts[rows], seeds[rows], noise, measure, asked, known)
                batches.append(part.solve(denoise, noise, first))
        return torch.cat(batches)

    def _first(
        self,
        denoiser: Denoiser,
        prompts: Sequence[str],
        seeds: Sequence[int],
        noise: Tensor,
        measure: Measure,
        asked: Asked,
        known: RecentTensors[Tensor] | None,
    ) -> Tensor | None:
        """D(x, sigma_0) [N, C, H, W], asked once for samples of one prompt and one seed; None: the sampler is to ask.

        Where their tables begin at scales of their own, classifier-free guidance makes it the line through the
        estimates without and with the prompt, which are asked instead. It carries no gradient.
        """
        pairs = list(zip(prompts, seeds, strict=True))
        distinct = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
        sigma, alone = self.sigmas[..., 0].flatten(), len(distinct) == len(pairs)
        if self.table is None or self.afs or torch.is_grad_enabled() or (sigma != sigma[0]).any():
            return None
        conditioning = denoiser.encode([prompt for prompt, _ in distinct], self.guidance_scale)
        scales = None if self.table.guidance is None else self.table.guidance[..., 0, 0].flatten().cpu()
        one_scale = scales is None or bool((scales == scales[0]).all())
        if (alone and (known is None or not one_scale)) or not (one_scale or conditioning.unconditional):
            return None
        rows = to_device(torch.tensor([pairs.index(pair) for pair in distinct]), noise.device)
        places = to_device(torch.tensor([distinct[pair] for pair in pairs]), noise.device)
        x, count = noise[rows] * sigma[0], len(distinct)
        if not one_scale:
            halves = Conditioning(2 * count, conditioning.rows(count, unconditional=count), None, 1.0)
            both = conditioned(denoiser, halves, measure, asked)(torch.cat([x, x]), sigma[0])
            without, with_prompt = both[places], both[places + count]
            return torch.lerp(without, with_prompt, per_row(scales, both))
        guidance = () if scales is None else (scales[:1].double().expand(count),)
        key = repr((prompts, seeds, sigma[0].item(), self.guidance_scale, guidance and scales[0].item()))
        estimate = None if known is None else known.get(key)
        if estimate is None:
            estimate = conditioned(denoiser, conditioning, measure, asked)(x, sigma[0], *guidance)
            if known is not None:
                known.keep(key, estimate)
        return estimate[places]

    def described(self) -> dict[str, Plain]:
        """Plain values that say all that its latents depend on but the model, the prompts and the noise."""
        columns: dict[str, Plain] = {column.name: None for column in COLUMNS}
        columns |= {} if self.table is None else {name: rows.tolist() for name, rows in self.table.columns().items()}
        return {
            "solver": self.sampler,
            "sigmas": self.sigmas.tolist(),
            "guidance": self.guidance_scale,
            "settings": {**(columns if self.table is not None else self.options or {}), "afs": self.afs},
        }


def network_dtype(
    told: str | None, model: str, device: torch.device, solvers: Sequence[Solver], note: Callable[[str], object]
) -> torch.dtype:
    """What a model's network is to compute in: as `told`, by its name in `DTYPES`, or where nobody says as is usual.

    That is float32, and on CUDA the half precision that the solvers were tuned in, or, where they do not say one, the
    model's own, which `note` is told.
    """
    if told is not None:
        return DTYPES[told]
    if device.type != "cuda":
        return torch.float32
    tuned = {solver.tuned_in for solver in solvers}
    if len(tuned) == 1 and (name := tuned.pop()) is not None:
        note(f"network in {name}, as the solver was tuned in; --dtype names another")
        return DTYPES[name]
    half = usual_half(model)
    note(f"network in {str(half).removeprefix('torch.')}, usual on CUDA; --dtype names another")
    return half


def check_afs(denoiser: Denoiser) -> None:
    """Raise InputError where a model's first direction cannot be estimated without asking it."""
    if denoiser.sigma_max <= 1:
        raise InputError(
            f"AFS takes x / sqrt(1 + sigma^2) for the first direction, which presumes a noise level far above 1, and "
            f"{denoiser.name} (flow matching) starts at 1: use a solver without AFS"
        )


def load_solver(source: str | Path, root: str | Path = "exps", *, guidance: float | None = None) -> Solver:
    """Read the solver that a person means; see `training.snapshot.find_snapshot` for what `source` can be.

    `guidance` takes the place of the file's one scale.
    Raises InputError where there is none, the file is no snapshot, it was made for another sampler than EPD, it has a
    guidance column beside `guidance`, or it would drop every prompt and `guidance` does not say otherwise.
    """
    file = find_snapshot(source, root)
    table, metadata = load_snapshot(file)
    solver = solver_of(table, Origin(file, file_sha256(file), metadata))
    if guidance is not None:
        return solver.guided(guidance)
    if solver.guidance_scale == 0:
        raise InputError(
            f"{file}: guidance_rate is 0: it was made for an unconditional model, and no prompt would count; say which "
            "guidance is meant"
        )
    return solver


def solver_of(table: EPDTable, origin: Origin) -> Solver:
    """The solver of a table and of what its file says. Raises InputError where that cannot be used."""
    says = _Says(origin)
    sampler = says.text("sampler_stu")
    if sampler not in (*EPD_NAMES, IPNDM):
        raise InputError(f"{origin.file}: sampler_stu is {sampler!r}; only tables of the solver epd can be used")
    if sampler == IPNDM and table.direction_history is None:
        table = with_ipndm_history(table, says.order())
    own = origin.metadata.get(GRID)
    return Solver(
        label=_label(origin.file),
        sampler="epd",
        num_steps=table.num_steps,
        table=table,
        afs=says.afs(),
        schedule=None if own is not None else says.schedule(),
        sigmas=None if own is None else torch.tensor(own, dtype=torch.float64),
        sigma_range=(says.number("sigma_min"), says.number("sigma_max")),
        flow_shift=says.flow_shift(),
        guidance_scale=None if table.guidance is not None else says.guidance_scale(),
        model=says.model(),
        model_options=says.model_options(),
        tuned_in=says.half_precision(),
        origin=origin,
    )


class _Says(NamedTuple):
    """What a file says of its solver, by the keys of the public code base, each checked where it is read."""

    origin: Origin

    def text(self, key: str) -> str | None:
        return self._of_type(key, self.origin.metadata.get(key), (str, NoneType), "a text")

    def number(self, key: str) -> float | None:
        value = self._of_type(key, self.origin.metadata.get(key), (int, float, NoneType), "a number")
        return None if value is None else float(value)

    def afs(self) -> bool:
        return self._of_type("afs", self.origin.metadata.get("afs", False), (bool,), "true or false")

    def _of_type(self, key: str, value: Plain, kinds: tuple[type, ...], named: str) -> Plain:
        if type(value) not in kinds:
            raise self.fault(key, value, f"it must be {named}")
        return value

    def order(self) -> int:
        orders = MULTISTEP_ORDERS[IPNDM]
        value = self.number("max_order")
        if value not in (None, *orders):
            raise self.fault("max_order", value, f"the orders of {IPNDM} are {', '.join(map(str, orders))}")
        return orders[-1] if value is None else int(value)

    def schedule(self) -> Schedule | None:
        name, rho = self.text("schedule_type"), self.number("schedule_rho")
        if name is None:
            return None
        if name not in SCHEDULES:
            raise self.fault("schedule_type", name, f"known are {', '.join(SCHEDULES)}")
        return Schedule(name, rho if rho is not None and name in USUAL_RHO else USUAL_RHO.get(name, 1.0))

    def flow_shift(self) -> float | None:
        mu, shift = self.number("flowmatch_mu"), self.number("flowmatch_shift")
        if mu is not None:  # a dynamic shift, which took the place of the scheduler's own
            if not abs(mu) <= LARGEST_MU:
                raise self.fault("flowmatch_mu", mu, f"its size must be at most {LARGEST_MU}: the shift is exp(mu)")
            return math.exp(mu)
        if shift is not None and not shift > 0:
            raise self.fault("flowmatch_shift", shift, "it must be positive")
        return shift

    def guidance_scale(self) -> float | None:
        scale = self.number("guidance_rate")
        if self.text("guidance_type") == "uncond":
            return 0.0 if scale == 0 else 1.0
        return scale

    def model(self) -> str | None:
        return self.text("model_path") or model_of(self.text("dataset_name"), self.text("backend"))

    def model_options(self) -> ModelOptions:
        told = self.origin.metadata.get(MODEL_OPTIONS)
        if told is None and self.text("backend") not in (None, USUAL_BACKEND):
            told = self._public_size()
        return ModelOptions.from_changes({} if told is None else told, f"{self.origin.file}: {MODEL_OPTIONS}")

    def half_precision(self) -> str | None:
        name = self.text(NETWORK_DTYPE)
        if name not in (None, *DTYPES):
            raise self.fault(NETWORK_DTYPE, name, f"known are {', '.join(DTYPES)}")
        return name if name in ("float16", "bfloat16") else None

    def _public_size(self) -> dict[str, int]:
        """The size of the images as the public code base says it, where it does; that of backend ldm is no size."""
        config = self.origin.metadata.get("backend_config")
        side = config.get("resolution") if isinstance(config, dict) else None
        return {} if side is None else {"height": side, "width": side}

    def fault(self, key: str, value: Plain, remedy: str) -> InputError:
        return InputError(f"{self.origin.file}: {key} is {value!r}; {remedy}")


def _label(file: Path) -> str:
    """A short name: the number of the run that it lies in, otherwise that of the run or repository, or its own."""
    folder = file.parent.resolve()
    if folder.parent.name == "snapshots":  # of a hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return f"epd-{folder.parent.parent.name.split('--')[-1]}"
    run = folder.parent if folder.name == "export" else folder
    number = run.name.split("-")[0]
    name = run.name if SNAPSHOT_NAME.fullmatch(file.name) else file.stem
    return f"epd-{number if number.isdecimal() and len(number) == 5 else name}"


def classical_solver(name: str, num_steps: int, schedule: Schedule, *, afs: bool = False) -> Solver:
    """A classical sampler on `num_steps` grid points of a model's whole range.

    `name` is a sampler's, with an order for the multistep ones where not the highest is meant: `ddim`, `dpmpp:2`.
    Raises InputError for a name that is not known.
    """
    sampler, options = parse_classical(name)
    return Solver(name, sampler, num_steps, options=options, afs=afs, schedule=schedule)


def classical_solvers(
    names: Sequence[str], budgets: Sequence[int], schedules: Sequence[Schedule], *, note: Callable[[str], object]
) -> list[Solver]:
    """Classical solvers on every schedule, with each number of parallel evaluations.

    One that cannot spend exactly so many is left out, which `note` is told. Raises InputError for an unknown name.
    """
    solvers = []
    for name in names:
        sampler, _ = parse_classical(name)
        for budget in budgets:
            try:
                num_steps = num_steps_for(sampler, budget)
            except ValueError as error:
                note(f"left out: {error}")
                continue
            solvers += [classical_solver(name, num_steps, schedule) for schedule in schedules]
    return solvers


def parse_classical(name: str) -> tuple[str, dict[str, int]]:
    """Sampler and options (an order, or none) of `ddim`, `dpmpp`, `dpmpp:2`. Raises InputError for another text."""
    solver, colon, text = name.partition(":")
    if solver not in CLASSICAL:
        raise InputError(f"unknown solver {name!r}; known are {', '.join(SAMPLERS)}")
    orders = MULTISTEP_ORDERS.get(solver)
    if orders is None:
        if colon:
            raise InputError(f"solver {name!r}: {solver} has no order to choose; write {solver}")
        return solver, {}
    if colon and text not in map(str, orders):
        raise InputError(f"solver {name!r}: the orders of {solver} are {', '.join(map(str, orders))}")
    return solver, {"max_order": int(text) if colon else orders[-1]}


def parse_schedule(text: str) -> Schedule:
    """A schedule as people write it, `discrete`, `polynomial:5`, `discrete@5`. Raises InputError for another text."""
    spaced, at, level = text.strip().partition("@")
    name, colon, exponent = spaced.partition(":")
    if name not in SCHEDULES:
        raise InputError(f"unknown schedule {text!r}; known are {', '.join(SCHEDULES)}")
    if colon and name not in USUAL_RHO:
        raise InputError(f"schedule {text!r}: {name} has no exponent rho; write {name}")
    rho = _positive(exponent, text, "rho", f"{name}:2") if colon else USUAL_RHO.get(name, 1.0)
    return Schedule(name, rho, _positive(level, text, "the first noise level", f"{spaced}@5") if at else None)


def _positive(written: str, text: str, what: str, example: str) -> float:
    """A number of the schedule `text`. Raises InputError where it is none that is positive and finite."""
    try:
        number = float(written)
    except ValueError:
        raise InputError(f"schedule {text!r}: {what} is {written!r}; write a number, {example}") from None
    if not 0 < number < float("inf"):
        raise InputError(f"schedule {text!r}: {what} is {written}; it must be positive and finite")
    return number
