"""Samplers side by side: what each does to the same prompts and the same noise, measured once and kept on disk.

Latents and what is measured of them are kept apart, each under the hash of everything that it depends on, down to the
weights and the code that made it. A second run with the same settings reads them back, one that was stopped goes on
where it was, and another reward, verifier or metric judges the latents that are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from errors import InputError
from models.denoiser import Denoiser
from models.fingerprints import fingerprint
from models.generate import bounded, decode
from models.pictures import to_pixels
from training.measuring.scoring import scores_by
from training.networks import Plain
from training.runs.checkpoint import read_tensors, write_tensors
from training.solver import Schedule, Solver, classical_solver

# A solver of order 2 at 200 evaluations in steps that are uniform in the model's own time: what is left of its error is
# far below that of 20 evaluations; and it has no coefficients that grow where guidance bends the path, as order 3 has.
REFERENCE_SOLVER = "dpmpp:2"
REFERENCE_STEPS = 200
REFERENCE_SCHEDULE = Schedule("discrete", 1.0)
REFERENCE_LABEL = f"reference ({REFERENCE_SOLVER}, {REFERENCE_STEPS} steps, {REFERENCE_SCHEDULE})"

PREVIEWS = 6  # images of each solver that are kept for sheets

# Files whose change may change latents, and what is measured of them, whatever the model; see `Denoiser.code`.
ROOT = Path(__file__).resolve().parents[2]
SAMPLING_CODE = [ROOT / "solvers.py", ROOT / "training" / "solver.py"]
SAMPLING_CODE += [ROOT / "models" / f"{name}.py" for name in ("denoiser", "generate", "randomness")]
JUDGING_CODE = [Path(__file__).resolve(), ROOT / "models" / "pictures.py"]


def reference_solver(denoiser: Denoiser, guidance_scale: float) -> Solver:
    """What all distances are taken to."""
    solver = classical_solver(REFERENCE_SOLVER, REFERENCE_STEPS + 1, REFERENCE_SCHEDULE)
    return solver.guided(guidance_scale).on(denoiser)


class Metric(NamedTuple):
    """A column of the table: its heading, which way is better, and what it is."""

    heading: str
    higher_is_better: bool
    meaning: str


METRICS: Mapping[str, Metric] = {
    "reward": Metric("preference reward", True, "mean score of the preference model, raw"),
    "verifier": Metric(
        "verifier score", True, "mean share of a caption's parts that the exact verifier confirms, in [0, 1]"
    ),
    "verified": Metric("whole caption", True, "share of images of which the verifier confirms the whole caption"),
    "frechet": Metric(
        "Fréchet distance",
        False,
        "between Gaussians fitted to unit-length image features of the preference model, squared feature units; the "
        "interval is that of its expectation at this number of images",
    ),
    "latent_rms": Metric(
        "latent RMS", False, "root mean square difference of the final latents from the reference of the same noise"
    ),
    "pixel_rms": Metric("pixel RMS", False, "the same of the 8-bit images, in units of the range [0, 1]"),
}
"""Every metric that an evaluation may have; `frechet` belongs to the set of images, each other one to an image."""


class ImageReward(Protocol):
    """A preference model with image features; `training.ppo.rewards.reward_hps.RewardHPS` is one."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [N] of images [N, 3, H, W] in [0, 1]."""
        ...

    def image_features(self, images: Tensor) -> Tensor:
        """Features [N, D]."""
        ...


Check = Callable[[Tensor, str], Mapping[str, float]]
"""An image [3, H, W] and its prompt to values by metric name: `verifier` and `verified`."""


@dataclass(frozen=True)
class Panel:
    """What judges the images. `check` is None where the model's world has no verifier. fingerprint: of all of it."""

    reward: ImageReward
    check: Check | None
    fingerprint: str


@dataclass(frozen=True)
class Setting:
    """What all samplers share.

    seeds: one for each prompt. model_fingerprint: of the model's files. dtype: of the latents. previews: how many of
    the first images are kept for looking at.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    model_fingerprint: str
    batch_size: int
    dtype: torch.dtype
    previews: int


@dataclass(frozen=True, eq=False)
class Measured:
    """What one sampler did on the N prompts.

    values: [N] float64 by metric name. features: [N, D] of unit length. exploded: bool [N], latents not finite or
    beyond the limit (they are clamped into it before anything else is done with them), or lost by the decoder (black).
    previews: uint8 [P, H, W, 3]. key: the name under which it is kept.
    """

    values: Mapping[str, Tensor]
    features: Tensor
    exploded: Tensor
    previews: Tensor
    key: str


class Store:
    """Tensors on disk, each set under the hash of a description of all that it depends on."""

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        """`note` is told of files that cannot be read; what they held is computed again."""
        self.folder = folder
        self._note = note

    def fetch(self, description: Mapping[str, Plain], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is kept under the description, or what `compute` gives, which is then kept."""
        file = self._file(description)
        if file.is_file():
            try:
                return read_tensors(file, "kept result")
            except InputError as error:
                self._note(f"{error}; it is computed again")
        computed = compute()
        write_tensors(file, computed)
        return computed

    def holds(self, description: Mapping[str, Plain]) -> bool:
        """Whether something is kept under the description."""
        return self._file(description).is_file()

    def _file(self, description: Mapping[str, Plain]) -> Path:
        return self.folder / f"{key_of(description)}.pt"


def key_of(description: Mapping[str, Plain]) -> str:
    """The name of what a description describes: equal for equal descriptions, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


class Evaluation:
    """Measures samplers of one model on one set of prompts and noises, if wanted against one reference."""

    def __init__(
        self,
        denoiser: Denoiser,
        panel: Panel,
        setting: Setting,
        store: Store,
        advance: Callable[[int], object],
        *,
        reference: Solver | None,
    ) -> None:
        """Nothing is computed yet. `advance` is told of network evaluations: of how many latents, at each call.

        Without a reference (see `reference_solver`) there are no distances to it, and its many evaluations are saved.
        """
        self.denoiser, self.panel, self.setting, self.store = denoiser, panel, setting, store
        self.reference_solver = reference
        self._advance = advance
        self._sampling_code = fingerprint([*SAMPLING_CODE, *denoiser.code])
        self._judging_code = fingerprint([*JUDGING_CODE, *denoiser.code])

    def evaluations_ahead(self, solvers: Sequence[Solver]) -> int:
        """How many latents the network will be asked about for the reference and these: none for what is kept."""
        asked = solvers if self.reference_solver is None else (self.reference_solver, *solvers)
        described = {key_of(self._described(solver)): solver for solver in asked}
        ahead = [solver for solver in described.values() if not self.store.holds(self._described(solver))]
        return len(self.setting.prompts) * sum(solver.evaluations.total for solver in ahead)

    def measure(self, solver: Solver) -> Measured:
        """Everything about a sampler; from the store where it is there."""
        description = {
            "kind": "measured",
            "latents": self._described(solver),
            "reference": None if self.reference_solver is None else self._described(self.reference_solver),
            "panel": self.panel.fingerprint,
            "code": self._judging_code,
            "previews": self.setting.previews,
        }
        kept = self.store.fetch(description, lambda: self._judged(self._latents(solver)))
        values = {name: kept[name] for name in METRICS if name in kept}
        return Measured(values, kept["features"], kept["exploded"], kept["previews"], key_of(description))

    def reference(self) -> Measured:
        """The reference measured as if it were a sampler; its distances to itself are 0."""
        return self.measure(self._required_reference())

    def features(self, images: Tensor, described: Mapping[str, Plain]) -> Tensor:
        """Unit-length features [N, D] of other images [N, 3, H, W], kept under their description."""
        description = {
            "kind": "features",
            "panel": self.panel.fingerprint,
            "images": dict(described),
            "code": self._judging_code,
        }
        return self.store.fetch(description, lambda: {"features": self._unit_features(images)})["features"]

    def _described(self, solver: Solver) -> dict[str, Plain]:
        """All that a solver's latents depend on."""
        setting = self.setting
        return {
            "kind": "latents",
            "model": setting.model_fingerprint,
            "code": self._sampling_code,
            "device": self.denoiser.device.type,
            "network dtype": str(self.denoiser.dtype),
            "torch": torch.__version__,
            "dtype": str(setting.dtype),
            "prompts": list(setting.prompts),
            "seeds": list(setting.seeds),
            **solver.described(),
        }

    def _latents(self, solver: Solver) -> Tensor:
        kept = self.store.fetch(self._described(solver), lambda: {"latents": self._generated(solver).cpu()})
        return kept["latents"].to(self.denoiser.device)

    def _required_reference(self) -> Solver:
        if self.reference_solver is None:
            raise ValueError("this evaluation was made without a reference")
        return self.reference_solver

    @cached_property
    def _reference_latents(self) -> Tensor:
        """[N, C, H, W], within the limit."""
        return bounded(self._latents(self._required_reference()))[0]

    @cached_property
    def _reference_pixels(self) -> Tensor:
        """uint8 [N, H, W, 3]"""
        chunks = self._reference_latents.split(self.setting.batch_size)
        return torch.cat([torch.from_numpy(to_pixels(decode(self.denoiser, chunk).images)) for chunk in chunks])

    def _generated(self, solver: Solver) -> Tensor:
        setting = self.setting
        return solver.latents(
            self.denoiser,
            setting.prompts,
            setting.seeds,
            batch_size=setting.batch_size,
            dtype=setting.dtype,
            asked=self._advance,
        )

    def _judged(self, latents: Tensor) -> dict[str, Tensor]:
        """Values [N] by metric, features, exploded and previews of latents [N, C, H, W]."""
        within, solved = bounded(latents)
        size = self.setting.batch_size
        parts = [self._judged_batch(within[start : start + size], start) for start in range(0, len(within), size)]
        judged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        pixels = judged.pop("pixels")
        return {
            **judged,
            **({} if self.reference_solver is None else self._distances(within, pixels)),
            "exploded": ~solved.cpu() | judged["exploded"],
            "previews": pixels[: self.setting.previews].clone(),
        }

    def _distances(self, latents: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """To the reference of the same noise, [N] each, of latents within the limit and of their pixels as uint8."""
        return {
            "latent_rms": _rms(latents - self._reference_latents),
            "pixel_rms": _rms((pixels.float() - self._reference_pixels.float()) / 255),
        }

    def _judged_batch(self, latents: Tensor, start: int) -> dict[str, Tensor]:
        images, _, whole = decode(self.denoiser, latents)
        prompts = self.setting.prompts[start : start + len(images)]
        scores = scores_by(self.panel.reward, images, prompts).double().cpu()
        if not scores.isfinite().all():
            raise InputError("the reward gives scores that are not finite for finite images: its weights are broken")
        judged = {
            "exploded": ~whole.cpu(),
            "pixels": torch.from_numpy(to_pixels(images)),
            "reward": scores,
            "features": self._unit_features(images),
        }
        if self.panel.check is not None:
            checks = [self.panel.check(image, prompt) for image, prompt in zip(images.cpu(), prompts, strict=True)]
            judged |= {name: torch.tensor([float(check[name]) for check in checks]).double() for name in checks[0]}
        return judged

    def _unit_features(self, images: Tensor) -> Tensor:
        return functional.normalize(self.panel.reward.image_features(images).double(), dim=1).cpu()


def _rms(difference: Tensor) -> Tensor:
    """Root mean square over all but the first dimension: float64 [N]."""
    return difference.flatten(1).double().square().mean(dim=1).sqrt().cpu()
