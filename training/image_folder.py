"""A folder of generated images: a PNG for each, with its story inside, and a line for each in images.jsonl."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from tqdm import tqdm

from errors import InputError
from files import append_whole, write_atomically
from models.denoiser import Denoiser
from models.generate import decode
from models.options import AS_IT_IS, ModelOptions
from models.pictures import as_png, contact_sheet, file_stem, opened_picture, to_pixels
from training.networks import Plain
from training.solver import Solver

LOG_NAME = "images.jsonl"
SHEET_NAME = "grid.png"
KEY = "drawn as"  # of the entry that names, in an image of an evaluation, all that it depends on
DECODED_AT_ONCE = 16  # images
# What JSON allows inside a text and many readers take for the end of a line.
LINE_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


@dataclass(frozen=True)
class ImageRecord:
    """One line of images.jsonl; evaluations are an image's, before guidance, which doubles them unless it is 1.

    guidance: None where the table has a scale of its own for each evaluation. model_options: how the model was loaded;
    None where that was as it comes.
    """

    file: str
    prompt: str
    seed: int
    model: str
    solver: str
    schedule: str
    num_steps: int
    guidance: float | None
    parallel_evaluations: int
    total_evaluations: int
    predictor: str | None
    predictor_sha256: str | None
    finite: bool
    model_options: Mapping[str, Plain] | None = None


@dataclass(frozen=True)
class ImageRequest:
    """What is to be drawn: every prompt with every seed, or `paired`, prompt i with seed i.

    solver: settled for the model. model: the name or path by which that was asked for. model_options: how it was
    loaded. dtype: of the latents.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    solver: Solver
    model: str
    batch_size: int
    dtype: torch.dtype
    paired: bool = False
    model_options: ModelOptions = AS_IT_IS

    def pairs(self) -> list[tuple[int, str, int]]:
        """The images in order: number of the prompt, prompt, seed."""
        if self.paired:
            numbers = range(len(self.prompts))
            return list(zip(numbers, self.prompts, self.seeds, strict=True))
        return [(number, prompt, seed) for number, prompt in enumerate(self.prompts) for seed in self.seeds]


def unused_folder(folder: Path) -> Path:
    """The folder, or, where it holds images already, the first of `<folder>-2`, `<folder>-3`, ... that does not."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain([folder], numbered) if not _holds_images(one))


def _holds_images(folder: Path) -> bool:
    return (folder / LOG_NAME).exists() or any(folder.glob("*.png"))


def draw(
    request: ImageRequest, denoiser: Denoiser, folder: Path, *, sheet: bool, note: Callable[[str], None]
) -> list[ImageRecord]:
    """Draw every image of the request into `folder`, with images.jsonl and, if asked for, a contact sheet grid.png.

    Files of the same names are replaced, each at once; images and their lines appear batch by batch. An image whose
    latents are not finite is written as it decodes with zeros in their place, one that the decoder gives no numbers for
    is black there; both are marked in their records and reported through `note`. Raises InputError where a file cannot
    be written.
    """
    pairs = request.pairs()
    records: list[ImageRecord] = []
    write_atomically(folder / LOG_NAME, b"")  # what it said of images that are replaced now
    kept: list[np.ndarray] = []
    exploded = undecoded = 0
    with tqdm(total=len(pairs), unit="image") as bar:
        for start in range(0, len(pairs), request.batch_size):
            batch = pairs[start : start + request.batch_size]
            _, prompts, seeds = zip(*batch, strict=True)
            latents = request.solver.latents(denoiser, prompts, seeds, dtype=request.dtype)
            drawn = decode(denoiser, latents, DECODED_AT_ONCE)
            exploded += int((~drawn.solved).sum())
            undecoded += int((drawn.solved & ~drawn.decoded).sum())
            pixels = to_pixels(drawn.images)
            for (number, prompt, seed), is_finite in zip(batch, drawn.fine.tolist(), strict=True):
                records.append(_record(request, number, prompt, seed, finite=is_finite))
            _write_images(folder, pixels, records[start:])
            _log(folder, records[start:])
            kept.extend(pixels if sheet else ())
            bar.update(len(batch))
    if sheet:
        columns = ["its own seed"] if request.paired else [f"seed {seed}" for seed in request.seeds]
        rows = [kept[start : start + len(columns)] for start in range(0, len(kept), len(columns))]
        write_sheet(folder / SHEET_NAME, rows, request.prompts, columns)
    remedy = "; use --dtype bfloat16 or float32" if denoiser.dtype == torch.float16 else ""
    overflowed = f"the decoder overflowed in {str(denoiser.dtype).removeprefix('torch.')}{remedy}"
    for lost, reason in ((exploded, "the solver exploded there"), (undecoded, overflowed)):
        if lost:
            note(f"{lost} of {len(records)} images are not finite: {reason} (see `finite` in {LOG_NAME})")
    return records


class SolverFolders:
    """A folder of images for each solver that an evaluation compares, written part by part, in whatever order."""

    def __init__(self, root: Path, request: ImageRequest) -> None:
        """`request`: paired, with any solver in it."""
        self.root, self._request = root, request

    def folder(self, solver: Solver) -> Path:
        """Where a solver's images lie."""
        scale = "own" if solver.guidance_scale is None else f"{solver.guidance_scale:g}"
        name = f"{solver.label}-{solver.grid_name}-nfe{solver.evaluations.parallel:02d}-g{scale}"
        return self.root / re.sub(r"[^\w.-]+", "_", name)

    def holds(self, solver: Solver, rows: slice, key: str) -> bool:
        """Whether the images of these prompts are all there, written under that name: others had other weights."""
        files = (self._record(solver, row, finite=True).file for row in range(rows.start, rows.stop))
        return all(_key_in(self.folder(solver) / file) == key for file in files)

    def write(self, solver: Solver, rows: slice, key: str, pixels: np.ndarray, finite: Sequence[bool]) -> None:
        """Write the images uint8 [n, H, W, 3] of these prompts."""
        numbered = zip(range(rows.start, rows.stop), finite, strict=True)
        records = [self._record(solver, row, finite=is_finite) for row, is_finite in numbered]
        _write_images(self.folder(solver), pixels, records, {KEY: key})

    def write_log(self, solver: Solver, finite: Sequence[bool]) -> None:
        """Write the images.jsonl of a solver's N images."""
        write_atomically(self.folder(solver) / LOG_NAME, b"")
        _log(self.folder(solver), [self._record(solver, row, finite=is_fine) for row, is_fine in enumerate(finite)])

    def _record(self, solver: Solver, row: int, *, finite: bool) -> ImageRecord:
        request = replace(self._request, solver=solver)
        return _record(request, row, request.prompts[row], request.seeds[row], finite=finite)


def _log(folder: Path, records: Sequence[ImageRecord]) -> None:
    """Append records to images.jsonl: all their lines or none."""
    texts = (json.dumps(asdict(record), ensure_ascii=False).translate(LINE_BREAKS) for record in records)
    try:
        append_whole(folder / LOG_NAME, "".join(text + "\n" for text in texts).encode())
    except OSError as error:
        raise InputError(f"{folder / LOG_NAME}: cannot be written ({error.strerror})") from error


def write_sheet(
    path: Path, rows: Sequence[Sequence[np.ndarray]], row_captions: Sequence[str], column_captions: Sequence[str]
) -> None:
    """Write a contact sheet (`models.pictures.contact_sheet`) as a PNG file, at once."""
    write_atomically(path, as_png(contact_sheet(rows, row_captions, column_captions)))


def _record(request: ImageRequest, number: int, prompt: str, seed: int, *, finite: bool) -> ImageRecord:
    solver, origin = request.solver, request.solver.origin
    return ImageRecord(
        file=f"{number:05d}-{file_stem(prompt)}-seed{seed:06d}.png",
        prompt=prompt,
        seed=seed,
        model=request.model,
        model_options=request.model_options.changes() or None,
        solver=solver.label if origin is None else solver.sampler,
        schedule=solver.grid_name,
        num_steps=solver.num_steps,
        guidance=solver.guidance_scale,
        parallel_evaluations=solver.evaluations.parallel,
        total_evaluations=solver.evaluations.total,
        predictor=None if origin is None else str(origin.file),
        predictor_sha256=None if origin is None else origin.sha256,
        finite=finite,
    )


def _key_in(file: Path) -> str | None:
    """The name under which an image was written; None where there is none, or it is damaged."""
    try:
        with opened_picture(file) as image:
            return image.info.get(KEY)
    except InputError:
        return None


def _write_images(
    folder: Path,
    images: np.ndarray,
    records: Sequence[ImageRecord],
    more: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write images [n, H, W, 3], side by side: to compress one takes about as long as a GPU takes to draw it."""

    def write(image: np.ndarray, record: ImageRecord) -> None:
        described = {key: value for key, value in asdict(record).items() if value is not None and key != "file"}
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}
        write_atomically(folder / record.file, as_png(image, {**texts, **more}))

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, images, records))  # the list, so that what one raises is raised
