"""Images to learn from: a person's own folders, rendered scenes, samples of a DDPM; and how they are shared out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from errors import InputError
from models.pictures import SUFFIXES, image_files, in_colour, on_white, opened_picture, upright
from models.randomness import generator_of
from models.shapes.data import render_scenes

SHOWN = 3  # file names in a message
FEWEST = 20  # images that can be shared out and say something


@dataclass(frozen=True)
class ImageSet:
    """images: uint8 [N, 3, H, W]. notes: one line for each thing that a reader should know about them."""

    images: Tensor
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Shares:
    """Images uint8 [n, 3, H, W] that have no image in common: for the reward model, the judge, and for neither.

    copies: how many images were left out for being equal to another one.
    """

    reward: Tensor
    judge: Tensor
    heldout: Tensor
    copies: int


def read_folder(folder: Path, key: str, size: tuple[int, int], limit: int, *, threads: int, seed: int) -> ImageSet:
    """Read the images of a folder and all folders in it: PNG, JPEG, WebP. What is hidden is passed over, and counted.

    Images of another size are cut to the wanted aspect about their centre and resized; those of another mode become
    RGB (transparency on white). Both is said once. Files that cannot be decoded are skipped and named.

    Args:
        folder: where to look.
        key: the configuration's name for it, for messages.
        size: (H, W) in pixels.
        limit: most images; where there are more, these are drawn by `seed`.
        threads: that decode, at least one.
        seed: of the draw.

    Raises:
        InputError: there is no such folder, or fewer than `FEWEST` images in it can be read.
    """
    if not folder.is_dir():
        raise InputError(f"{key}={folder}: there is no such folder")
    files, hidden = image_files(folder)
    if not files:
        raise InputError(f"{key}={folder}: holds no image ({', '.join(SUFFIXES)})")
    order = np.random.default_rng(seed).permutation(len(files))[:limit]
    chosen = [files[index] for index in sorted(order)]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        decoded = list(pool.map(lambda file: _decode(file, size), chosen))
    read = [result for result in decoded if isinstance(result, _Decoded)]
    broken = [result for result in decoded if isinstance(result, str)]
    notes = [f"{key}: {len(read)} images of the {len(files)} in {folder}"]
    if hidden:
        notes.append(
            f"{key}: {len(hidden)} hidden images are passed over, as in {Counter(hidden).most_common(1)[0][0]}"
        )
    if broken:
        named = "; ".join(broken[:SHOWN])
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        notes.append(f"{key}: {len(broken)} files cannot be read and are skipped: {named}{more}")
    if len(read) < FEWEST:
        raise InputError(f"{key}={folder}: {len(read)} images can be read, at least {FEWEST} are needed\n" + notes[-1])
    notes += _conversions(key, size, read)
    return ImageSet(torch.from_numpy(np.stack([item.pixels for item in read])).movedim(-1, 1), tuple(notes))


@dataclass(frozen=True)
class _Decoded:
    pixels: np.ndarray  # uint8 [H, W, 3]
    size: tuple[int, int]  # as it was: (height, width)
    mode: str  # as it was


def _decode(file: Path, size: tuple[int, int]) -> _Decoded | str:
    """The image, or why it cannot be read."""
    try:
        with opened_picture(file) as image:
            fitted = ImageOps.fit(in_colour(upright(image)), (size[1], size[0]), Image.Resampling.BICUBIC)
            return _Decoded(np.asarray(on_white(fitted)), (image.height, image.width), image.mode)
    except InputError as error:
        return str(error)


def _conversions(key: str, size: tuple[int, int], read: Sequence[_Decoded]) -> list[str]:
    sizes = Counter(item.size for item in read if item.size != size)
    modes = Counter(item.mode for item in read if item.mode != "RGB")
    notes = []
    if sizes:
        (height, width), _ = sizes.most_common(1)[0]
        notes.append(
            f"{key}: {sizes.total()} images of {len(sizes)} other sizes (most often {height}x{width}) are cut "
            f"about the centre and resized to {size[0]}x{size[1]}"
        )
    if modes:
        notes.append(f"{key}: {modes.total()} images of mode {', '.join(sorted(modes))} are converted to RGB")
    return notes


def render_images(number: int, size: tuple[int, int], seed: int) -> ImageSet:
    """Scenes of the shapes world, averaged down (or enlarged) to `size` (H, W)."""
    scenes = torch.from_numpy(render_scenes("train", number, seed, progress=False).images).movedim(-1, 1)
    resized = functional.interpolate(scenes.float(), size, mode="bilinear", antialias=True)
    return ImageSet(resized.round().byte(), (f"real images: {number} rendered scenes of the shapes world",))


def shares(images: Tensor, heldout_share: float, seed: int, name: str = "images") -> Shares:
    """Share images [N, 3, H, W] out by chance: `heldout_share` for nobody, the rest half and half; of equal ones one.

    Raises:
        InputError: fewer than `FEWEST` of the images, called `name`, differ from each other.
    """
    first_of: dict[bytes, int] = {}
    for row, image in enumerate(images):
        first_of.setdefault(hashlib.sha256(image.numpy().tobytes()).digest(), row)
    distinct = images[list(first_of.values())]
    number = len(distinct)
    if number < FEWEST:
        raise InputError(f"{name}: {number} of the {len(images)} images differ from each other, at least {FEWEST} must")
    heldout = max(2, round(heldout_share * number))
    half = (number - heldout) // 2
    parts = torch.randperm(number, generator=generator_of(seed)).split([half, number - heldout - half, heldout])
    return Shares(*(distinct[rows] for rows in parts), copies=len(images) - number)


def under_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] blended with normal noise, each by a weight from 0.05 to 1 of the noise; clamped.

    Weights near 0.05 are the more frequent: that little noise is what a trained DDPM leaves.
    """
    weight = 0.05 + 0.95 * torch.rand(len(images), 1, 1, 1, generator=generator).square()
    noise = 0.5 + 0.5 * torch.randn(images.shape, generator=generator)
    return torch.lerp(images, noise, weight).clamp(0, 1)


def faded(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, 3, H, W], each blended with the colour of one pixel of it, by a weight from 0.5 to 1 of that colour.

    Without them an empty image, which no DDPM draws at first, was rated as real as real ones, and so was all that
    a fine-tuned DDPM drew in the end.
    """
    pixels = images.flatten(2)  # [N, 3, H * W]
    places = torch.randint(pixels.shape[2], (len(images), 1, 1), generator=generator)
    colour = pixels.gather(2, places.expand(-1, 3, -1)).unsqueeze(3)  # [N, 3, 1, 1]
    return torch.lerp(images, colour, 0.5 + 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator))


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, 3, H, W] in [0, 1], each by chance mirrored either way, made a negative, its channels reordered.

    Where real and other images are changed alike, a classifier of them still tends to a ratio of densities, of the
    changed images (arXiv 2006.10738, section 3).
    """
    mirrored, upside_down, negative = torch.rand(3, len(images), 1, 1, 1, generator=generator) < 0.5
    orders = torch.rand(images.shape[:2], generator=generator).argsort(1)  # [N, 3]
    images = torch.where(mirrored, images.flip(3), images)
    images = torch.where(upside_down, images.flip(2), images)
    images = torch.where(negative, 1 - images, images)
    return images[torch.arange(len(images)).unsqueeze(1), orders]


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return images.float() / 255
