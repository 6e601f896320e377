"""Samplers side by side: what each does to the same prompts and the same noise, measured once and kept on disk.

Prompts are taken in parts. A part of a sampler is drawn, measured by every judge in one pass over its images and kept
before the next begins, so that memory does not grow with the prompts, a run that was stopped goes on where it was, and
several processes share the parts out, and what no whole part is left of for each, by the folder that they keep them
in. Latents and what each judge says of them are
kept apart, each under the hash of everything that it depends on, down to the weights and the code that made it: another
reward, verifier or metric judges the latents that are there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from errors import InputError
from models.denoiser import Denoiser
from models.fingerprints import fingerprint
from models.generate import bounded, decode
from models.pictures import to_pixels
from training.image_folder import SolverFolders
from training.measuring.real_images import Extractor
from training.networks import Plain
from training.runs.checkpoint import read_tensors, write_tensors
from training.solver import Schedule, Solver, classical_solver

# A solver of order 2 at 200 evaluations in steps that are uniform in the model's own time: what is left of its error is
# far below that of 20 evaluations; and it has no coefficients that grow where guidance bends the path, as order 3 has.
REFERENCE_SOLVER = "dpmpp:2"
REFERENCE_STEPS = 200
REFERENCE_SCHEDULE = Schedule("discrete", 1.0)

PART = 128  # prompts of a part: what a kill loses at most, of one sampler
PREVIEWS = 6  # images of each solver that are kept for sheets, at most a part

# Files whose change may change latents, and what is measured of them, whatever the model; see `Denoiser.code`.
ROOT = Path(__file__).resolve().parents[2]
SAMPLING_CODE = [ROOT / "solvers.py", ROOT / "training" / "solver.py"]
SAMPLING_CODE += [ROOT / "models" / f"{name}.py" for name in ("denoiser", "generate", "randomness")]
JUDGING_CODE = [Path(__file__).resolve(), ROOT / "models" / "pictures.py"]
# Whose networks are run: another version may compute otherwise.
LIBRARIES = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}


def reference_solver(denoiser: Denoiser, guidance_scale: float, steps: int = REFERENCE_STEPS) -> Solver:
    """What all distances are taken to."""
    label = f"reference ({REFERENCE_SOLVER}, {steps} steps, {REFERENCE_SCHEDULE})"
    solver = replace(classical_solver(REFERENCE_SOLVER, steps + 1, REFERENCE_SCHEDULE), label=label)
    return solver.guided(guidance_scale).on(denoiser)


class Judge(Protocol):
    """Says something of each image.

    name: of the judge, no other's. features: the name of the features that it gives, None for none. fingerprint: of all
    that what it says depends on but its name, the images and prompts: weights, and code but for the denoiser's.
    """

    name: str
    features: str | None
    fingerprint: str

    def judge(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Values [N] by metric, and features [N, D] by name, of images [N, 3, H, W] in [0, 1]; on the CPU."""
        ...


class FeatureJudge:
    """Keeps what an extractor sees in the images, as 8-bit files would hold them."""

    def __init__(self, extractor: Extractor) -> None:
        """Asks `extractor`, whose name is the judge's and that of the features."""
        self.name = self.features = extractor.name
        self.fingerprint, self._extractor = f"{extractor.fingerprint} {fingerprint(extractor.code)}", extractor

    def judge(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `Judge`."""
        pixels = torch.from_numpy(to_pixels(images)).movedim(-1, 1)
        return {self.name: self._extractor.features(pixels).cpu()}


@dataclass(frozen=True)
class Setting:
    """What all samplers share.

    seeds: one for each prompt. model_fingerprint: of the model's files. dtype: of the latents. previews: how many of
    the first images are kept for looking at, at most `PART`.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    model_fingerprint: str
    batch_size: int
    dtype: torch.dtype
    previews: int

    @property
    def parts(self) -> list[slice]:
        """The prompts' parts, in order."""
        count = len(self.prompts)
        return [slice(start, min(start + PART, count)) for start in range(0, count, PART)]


@dataclass(frozen=True, eq=False)
class Measured:
    """What one sampler did on the N prompts.

    values: [N] float64 by metric name. exploded: bool [N], latents not finite or beyond the limit (they are clamped
    into it before anything else is done with them), or lost by the decoder (black). previews: uint8 [P, H, W, 3].
    features: reads the features [N, D] of a name from where they are kept. key: the name of all of it.
    """

    values: Mapping[str, Tensor]
    exploded: Tensor
    previews: Tensor
    features: Callable[[str], Tensor]
    key: str


class Batch(NamedTuple):
    """Images of one batch, [n, ...]: latents within the limit, images in [0, 1], pixels uint8 [n, H, W, 3], exploded.

    rows: which of all prompts they are.
    """

    rows: slice
    latents: Tensor
    images: Tensor
    pixels: Tensor
    exploded: Tensor


class _Job(NamedTuple):
    """Something that is kept of a part: its description, and what finds it in a batch."""

    description: dict[str, Plain]
    judge: Callable[[Batch], dict[str, Tensor]]


class Store:
    """Tensors on disk, each set under the hash of a description of all that it depends on."""

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        """`note` is told of files that cannot be read; what they held is computed again."""
        self.folder = folder
        self._note = note

    def fetch(self, description: Mapping[str, Plain], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is kept under the description, or what `compute` gives, which is then kept."""
        kept = self.read(description)
        if kept is not None:
            return kept
        computed = compute()
        self.keep(description, computed)
        return computed

    def read(self, description: Mapping[str, Plain]) -> dict[str, Tensor] | None:
        """What is kept under the description; None where there is nothing, or it cannot be read."""
        file = self._file(description)
        if file.is_file():
            try:
                return read_tensors(file, "kept result")
            except InputError as error:
                self._note(f"{error}; it is computed again")
        return None

    def keep(self, description: Mapping[str, Plain], tensors: dict[str, Tensor]) -> None:
        """Keep tensors under the description."""
        write_tensors(self._file(description), tensors)

    def drop(self, description: Mapping[str, Plain]) -> None:
        """Keep nothing under the description any more."""
        self._file(description).unlink(missing_ok=True)

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
        judges: Sequence[Judge],
        setting: Setting,
        store: Store,
        advance: Callable[[int], object],
        *,
        reference: Solver | None,
        writer: SolverFolders | None = None,
        processes: int = 1,
    ) -> None:
        """Nothing is computed yet. `advance` is told of network evaluations: of how many latents, at each call.

        Without a reference (see `reference_solver`) there are no distances to it, and its many evaluations are saved.
        `processes`: how many share the work out, see `rows_of`.
        """
        self.denoiser, self.judges, self.setting, self.store = denoiser, judges, setting, store
        self.reference_solver = reference
        self._advance, self._writer, self._processes = advance, writer, processes
        self._sampling_code = fingerprint([*SAMPLING_CODE, *denoiser.code])
        self._judging_code = fingerprint([*JUDGING_CODE, *denoiser.code])
        self._reference: tuple[slice, dict[int, Batch]] = (slice(0, 0), {})  # a part, and its batches by first row

    def rows_of(self, rank: int) -> list[slice]:
        """The prompts of one process: whole parts in turn, and its share of those that are left over."""
        whole = len(self.setting.parts) - len(self._left_over)
        return [*self.setting.parts[rank : whole : self._processes], *self._shares(rank)]

    @property
    def _left_over(self) -> list[slice]:
        """The last parts, fewer than there are processes."""
        parts = self.setting.parts
        return parts[len(parts) // self._processes * self._processes :]

    def _shares(self, rank: int) -> list[slice]:
        """An even share of the parts that are left over, cut where they end."""
        if not (left := self._left_over):
            return []
        start, number = left[0].start, left[-1].stop - left[0].start
        begin, end = (start + number * place // self._processes for place in (rank, rank + 1))
        cut = [slice(max(begin, part.start), min(end, part.stop)) for part in left]
        return [rows for rows in cut if rows.start < rows.stop]

    def evaluations_ahead(self, solvers: Sequence[Solver], rows: Sequence[slice] | None = None) -> int:
        """How many latents the network will be asked about for the reference and these: none for what is kept.

        rows: parts of the setting, or shares of them, that are to be worked on; None for all parts.
        """
        asked = solvers if self.reference_solver is None else (self.reference_solver, *solvers)
        ahead = {
            key_of(description): solver.evaluations.total * (some.stop - some.start)
            for solver in asked
            for some in (self.setting.parts if rows is None else rows)
            if not self.store.holds(description := self._described(solver, some))
            and not self.store.holds(self._described(solver, self._part_of(some)))
        }
        return sum(ahead.values())

    def work(self, solver: Solver, rows: slice) -> None:
        """Draw and judge a part of the setting, or a share of one, as far as that is not kept, and keep it."""
        wanted, whole = self._jobs(solver, rows), self._jobs(solver, self._part_of(rows))
        jobs = [
            job
            for name, job in wanted.items()
            if not self.store.holds(job.description) and not self.store.holds(whole[name].description)
        ]
        key = key_of(whole["images"].description)
        writing = self._writer is not None and not self._writer.holds(solver, rows, key)
        if not jobs and not writing:
            return
        found: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in jobs]
        for batch in self._batches(solver, rows):
            for job, gathered in zip(jobs, found, strict=True):
                for name, values in job.judge(batch).items():
                    gathered[name].append(values)
            if writing:
                self._writer.write(solver, batch.rows, key, batch.pixels.numpy(), (~batch.exploded).tolist())
        for job, gathered in zip(jobs, found, strict=True):
            self.store.keep(job.description, {name: torch.cat(values) for name, values in gathered.items()})

    def join(self, solvers: Sequence[Solver]) -> None:
        """Keep what all processes found on their shares of a part as the part's, whoever asks for it next."""
        every = [rows for rank in range(self._processes) for rows in self._shares(rank)]
        for solver, part in itertools.product(solvers, self._left_over):
            shares = [rows for rows in every if self._part_of(rows) == part]
            if shares == [part]:
                continue
            pieces = [self._descriptions(solver, rows) for rows in shares]
            for name, whole in self._descriptions(solver, part).items():
                if not self.store.holds(whole):
                    found = [self.store.read(piece[name]) for piece in pieces]
                    if None in found:
                        continue
                    self.store.keep(whole, {key: torch.cat([one[key] for one in found]) for key in found[0]})
                for piece in pieces:
                    self.store.drop(piece[name])

    def measure(self, solver: Solver) -> Measured:
        """Everything about a sampler; from the store where it is there."""
        kept: dict[str, list[Tensor]] = defaultdict(list)
        for part in self.setting.parts:
            self.work(solver, part)
            for name, values in self.judged(solver, part).items():
                kept[name].append(values)
        whole = {name: torch.cat(values) for name, values in kept.items()}
        reference = None if self.reference_solver is None else self._described(self.reference_solver)
        description = {
            "kind": "measured",
            "latents": self._described(solver),
            "reference": reference,
            "judges": {judge.name: judge.fingerprint for judge in self.judges},
            "code": self._judging_code,
        }
        exploded, previews = whole.pop("exploded"), whole.pop("previews")
        return Measured(whole, exploded, previews, lambda name: self._features(solver, name), key_of(description))

    def judged(self, solver: Solver, part: slice) -> dict[str, Tensor]:
        """Values [n] by metric of a part, `exploded` and `previews` with them; without features."""
        kept: dict[str, Tensor] = {}
        for job in self._jobs(solver, part).values():
            kept |= self._kept(solver, part, job)
        for judge in self.judges:
            kept.pop(judge.features, None)
        return kept

    def reference(self) -> Measured:
        """The reference measured as if it were a sampler; its distances to itself are 0."""
        if self.reference_solver is None:
            raise ValueError("this evaluation was made without a reference")
        return self.measure(self.reference_solver)

    def features(self, name: str, images: Callable[[slice], Tensor], described: Mapping[str, Plain]) -> Tensor:
        """Features [N, D] of that name of other images, [n, 3, H, W] for a part of the prompts, kept part by part."""
        judge = self._judge_with(name)
        size, prompts = self.setting.batch_size, self.setting.prompts

        def compute(part: slice) -> dict[str, Tensor]:
            shown, texts = images(part), prompts[part]
            told = [judge.judge(shown[at : at + size], texts[at : at + size]) for at in range(0, len(shown), size)]
            return {name: torch.cat([batch[name] for batch in told])}

        found = []
        for part in self.setting.parts:
            description = {
                "kind": "features",
                "judge": [judge.name, judge.fingerprint],
                "images": {**described, "prompts": list(prompts[part]), "first": part.start},
                "code": self._judging_code,
            }
            found.append(self.store.fetch(description, lambda part=part: compute(part))[name])
        return torch.cat(found)

    def pixels(self, solver: Solver, rows: Sequence[int]) -> Tensor:
        """Images uint8 [n, H, W, 3] of prompts by their numbers, decoded again from what is kept."""
        found = []
        for row in rows:
            part = self._part_of(slice(row, row + 1))
            latents = self._latents(solver, part)[row - part.start][None].to(self.denoiser.device)
            found.append(torch.from_numpy(to_pixels(decode(self.denoiser, latents).images)))
        return torch.cat(found)

    def _part_of(self, rows: slice) -> slice:
        """The part of the setting that these prompts, a part or a share of one, belong to."""
        return next(part for part in self.setting.parts if part.start <= rows.start < part.stop)

    def _latents(self, solver: Solver, rows: slice) -> Tensor:
        """Latents [n, C, H, W] of a part or a share of one, on the CPU, kept."""
        part = self._part_of(rows)
        if rows != part and (kept := self.store.read(self._described(solver, part))) is not None:
            return kept["latents"][rows.start - part.start : rows.stop - part.start]
        setting = self.setting

        def draw() -> dict[str, Tensor]:
            latents = solver.latents(
                self.denoiser,
                setting.prompts[rows],
                setting.seeds[rows],
                batch_size=setting.batch_size,
                dtype=setting.dtype,
                asked=self._advance,
            )
            return {"latents": latents.cpu()}

        return self.store.fetch(self._described(solver, rows), draw)["latents"]

    def _judge_with(self, features: str) -> Judge:
        return next(judge for judge in self.judges if judge.features == features)

    def _features(self, solver: Solver, name: str) -> Tensor:
        judge = self._judge_with(name).name
        parts = self.setting.parts
        return torch.cat([self._kept(solver, part, self._jobs(solver, part)[judge])[name] for part in parts])

    def _described(self, solver: Solver, part: slice = slice(None)) -> dict[str, Plain]:
        """All that a solver's latents of a part depend on."""
        setting = self.setting
        return {
            "kind": "latents",
            "model": setting.model_fingerprint,
            "code": self._sampling_code,
            "device": self.denoiser.device.type,
            "network dtype": str(self.denoiser.dtype),
            **LIBRARIES,
            "dtype": str(setting.dtype),
            "prompts": list(setting.prompts[part]),
            "seeds": list(setting.seeds[part]),
            **solver.described(),
        }

    def _descriptions(self, solver: Solver, rows: slice) -> dict[str, dict[str, Plain]]:
        """Of all that is kept of a part or a share of one."""
        jobs = self._jobs(solver, rows)
        return {"latents": self._described(solver, rows)} | {name: job.description for name, job in jobs.items()}

    def _jobs(self, solver: Solver, part: slice) -> dict[str, _Job]:
        """All that is to be kept of a part, or a share of one, beside its latents."""
        latents = self._described(solver, part)
        previews = max(0, self.setting.previews - part.start)
        base = {"latents": latents, "code": self._judging_code}

        def look(batch: Batch) -> dict[str, Tensor]:
            first = max(0, self.setting.previews - batch.rows.start)
            return {"exploded": batch.exploded, "previews": batch.pixels[:first].clone()}

        jobs = {"images": _Job({"kind": "images", "previews": previews, **base}, look)}
        for judge in self.judges:
            jobs[judge.name] = _Job(
                {"kind": "judged", "judge": [judge.name, judge.fingerprint], **base},
                lambda batch, judge=judge: judge.judge(batch.images, self.setting.prompts[batch.rows]),
            )
        if self.reference_solver is not None:
            reference = self._described(self.reference_solver, part)
            jobs["reference"] = _Job(
                {"kind": "distances", "reference": reference, **base}, partial(self._distances, part)
            )
        return jobs

    def _kept(self, solver: Solver, part: slice, job: _Job) -> dict[str, Tensor]:
        """What is kept of one job, or is found again."""

        def compute() -> dict[str, Tensor]:
            told = [job.judge(batch) for batch in self._batches(solver, part)]
            return {key: torch.cat([batch[key] for batch in told]) for key in told[0]}

        return self.store.fetch(job.description, compute)

    def _batches(self, solver: Solver, part: slice) -> Iterator[Batch]:
        """The images of a part, decoded once."""
        kept = self._latents(solver, part)
        for start in range(part.start, part.stop, self.setting.batch_size):
            rows = slice(start, min(start + self.setting.batch_size, part.stop))
            latents = kept[rows.start - part.start : rows.stop - part.start].to(self.denoiser.device)
            within, solved = bounded(latents)
            images, _, whole = decode(self.denoiser, within)
            yield Batch(rows, within, images, torch.from_numpy(to_pixels(images)), (~(solved & whole)).cpu())

    def _distances(self, part: slice, batch: Batch) -> dict[str, Tensor]:
        """To the reference of the same noise, [n] each, of latents within the limit and of their pixels as uint8.

        `part`: that the batch is of, or a share of one.
        """
        reference = self._reference_at(part, batch.rows)
        return {
            "latent_rms": _rms(batch.latents - reference.latents),
            "pixel_rms": _rms((batch.pixels.float() - reference.pixels.float()) / 255),
        }

    def _reference_at(self, part: slice, rows: slice) -> Batch:
        """The reference's batch, without its images; those of one part, or a share of one, are held."""
        held, batches = self._reference
        if held != part:
            drawn = self._batches(self.reference_solver, part)
            batches = {batch.rows.start: batch._replace(images=batch.images[:0]) for batch in drawn}
            self._reference = part, batches
        return batches[rows.start]


def _rms(difference: Tensor) -> Tensor:
    """Root mean square over all but the first dimension: float64 [N]."""
    return difference.flatten(1).double().square().mean(dim=1).sqrt().cpu()
