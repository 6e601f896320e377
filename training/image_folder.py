"""A folder of generated images: a PNG for each, with its story inside, and a line for each in images.jsonl."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from errors import InputError
from files import write_atomically
from models.denoiser import Denoiser
from models.generate import generate
from models.pictures import contact_sheet, file_stem, png_text, to_pixels
from training.sampling import Plan, Predictor

LOG_NAME = "images.jsonl"
SHEET_NAME = "grid.png"
DECODED_AT_ONCE = 16  # images
# What JSON allows inside a text and many readers take for the end of a line.
LINE_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


@dataclass(frozen=True)
class ImageRecord:
    """One line of images.jsonl; evaluations are an image's, before guidance, which doubles them unless it is 1.

    guidance: None where the table has a scale of its own for each evaluation.
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


@dataclass(frozen=True)
class Job:
    """What is to be drawn: every prompt with every seed, or `paired`, prompt i with seed i.

    model: the name or path by which the model was asked for. predictor: the table's file, for the record. dtype: of the
    latents.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    plan: Plan
    model: str
    predictor: Predictor | None
    guidance_scale: float | None
    batch_size: int
    dtype: torch.dtype
    paired: bool = False

    def pairs(self) -> list[tuple[int, str, int]]:
        """The images in order: number of the prompt, prompt, seed."""
        if self.paired:
            numbers = range(len(self.prompts))
            return list(zip(numbers, self.prompts, self.seeds, strict=True))
        return [(number, prompt, seed) for number, prompt in enumerate(self.prompts) for seed in self.seeds]


def draw(job: Job, denoiser: Denoiser, folder: Path, *, sheet: bool, note: Callable[[str], None]) -> list[ImageRecord]:
    """Draw every image of the job into `folder`, with images.jsonl and, if asked for, a contact sheet grid.png.

    Files of the same names are replaced, each at once; images and their lines appear batch by batch. An image whose
    latents are not finite is written as it decodes with zeros in their place, one that the decoder gives no numbers for
    is black there; both are marked in their records and reported through `note`. Raises InputError where a file cannot
    be written.
    """
    pairs = job.pairs()
    records: list[ImageRecord] = []
    _log(folder, [], mode="w")  # what it said of images that are replaced now
    kept: list[np.ndarray] = []
    exploded = undecoded = 0
    with tqdm(total=len(pairs), unit="image") as bar:
        for start in range(0, len(pairs), job.batch_size):
            batch = pairs[start : start + job.batch_size]
            drawn = _drawn(job, denoiser, batch)
            exploded += int((~drawn.solved).sum())
            undecoded += int((drawn.solved & ~drawn.decoded).sum())
            finite = (drawn.solved & drawn.decoded).tolist()
            for (number, prompt, seed), image, is_finite in zip(batch, drawn.pixels, finite, strict=True):
                records.append(_record(job, number, prompt, seed, finite=is_finite))
                write_atomically(folder / records[-1].file, _png(image, records[-1]))
            _log(folder, records[start:], mode="a")
            kept.extend(drawn.pixels if sheet else ())
            bar.update(len(batch))
    if sheet:
        columns = ["its own seed"] if job.paired else [f"seed {seed}" for seed in job.seeds]
        rows = [kept[start : start + len(columns)] for start in range(0, len(kept), len(columns))]
        write_sheet(folder / SHEET_NAME, rows, job.prompts, columns)
    remedy = "; use --dtype bfloat16 or float32" if denoiser.dtype == torch.float16 else ""
    overflowed = f"the decoder overflowed in {str(denoiser.dtype).removeprefix('torch.')}{remedy}"
    for lost, reason in ((exploded, "the solver exploded there"), (undecoded, overflowed)):
        if lost:
            note(f"{lost} of {len(records)} images are not finite: {reason} (see `finite` in {LOG_NAME})")
    return records


def _log(folder: Path, records: Sequence[ImageRecord], *, mode: str) -> None:
    """Write records to images.jsonl, anew (mode w) or at its end (a)."""
    texts = (json.dumps(asdict(record), ensure_ascii=False).translate(LINE_BREAKS) for record in records)
    lines = "".join(text + "\n" for text in texts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG_NAME).open(mode, encoding="utf-8", newline="\n") as file:
            file.write(lines)
    except OSError as error:
        raise InputError(f"{folder / LOG_NAME}: cannot be written ({error.strerror})") from error


def write_sheet(
    path: Path, rows: Sequence[Sequence[np.ndarray]], row_captions: Sequence[str], column_captions: Sequence[str]
) -> None:
    """Write a contact sheet (`models.pictures.contact_sheet`) as a PNG file, at once."""
    buffer = io.BytesIO()
    contact_sheet(rows, row_captions, column_captions).save(buffer, format="png")
    write_atomically(path, buffer.getvalue())


class _Drawn(NamedTuple):
    """pixels: uint8 [n, H, W, 3]. solved, decoded: bool [n], whether the latents, and the image of them, are finite."""

    pixels: np.ndarray
    solved: Tensor
    decoded: Tensor


def _drawn(job: Job, denoiser: Denoiser, batch: Sequence[tuple[int, str, int]]) -> _Drawn:
    """The images of (number, prompt, seed)."""
    latents = generate(
        denoiser,
        [prompt for _, prompt, _ in batch],
        [seed for _, _, seed in batch],
        job.plan.solve,
        job.plan.sigmas,
        guidance_scale=job.guidance_scale,
        batch_size=job.batch_size,
        progress=False,
        dtype=job.dtype,
    )
    with torch.no_grad():
        images = denoiser.decode(latents.nan_to_num(0.0, 0.0, 0.0), DECODED_AT_ONCE)
    solved, decoded = (part.isfinite().flatten(1).all(dim=1).cpu() for part in (latents, images))
    return _Drawn(to_pixels(images), solved, decoded)


def _record(job: Job, number: int, prompt: str, seed: int, *, finite: bool) -> ImageRecord:
    return ImageRecord(
        file=f"{number:05d}-{file_stem(prompt)}-seed{seed:06d}.png",
        prompt=prompt,
        seed=seed,
        model=job.model,
        solver=job.plan.label if job.predictor is None else job.plan.solver,
        schedule=str(job.plan.grid),
        num_steps=len(job.plan.sigmas),
        guidance=job.guidance_scale,
        parallel_evaluations=job.plan.evaluations.parallel,
        total_evaluations=job.plan.evaluations.total,
        predictor=None if job.predictor is None else str(job.predictor.file),
        predictor_sha256=None if job.predictor is None else job.predictor.sha256,
        finite=finite,
    )


def _png(image: np.ndarray, record: ImageRecord) -> bytes:
    described = {key: value for key, value in asdict(record).items() if value is not None and key != "file"}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png", pnginfo=png_text(texts))
    return buffer.getvalue()
