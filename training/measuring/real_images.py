"""Real images that generated ones are held against: a folder of them, or a file of their statistics.

A statistics file is a `.npz` with `mu` and `sigma`, as clean-fid, EDM and the public EPD code keep them; FID needs no
more. Files of `scripts.image_statistics` also say of what network and resizing they are, and may hold the features
themselves, which KID and CMMD need.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from errors import InputError, first_line
from files import write_atomically
from models import asset_table, clip, inception, pictures
from models.asset_table import fault_of
from models.devices import to_device
from models.inception import Inception, Resize
from models.pictures import SUFFIXES, image_files, in_colour, on_white, opened_picture, upright
from training.measuring.distances import Gaussian, cmmd_values, frechet_values, gaussian_of, kid_values

DISTANCES = ("fid", "kid", "cmmd")
FEWEST_FOR_FID = 2048
"""Images below which a Fréchet distance of InceptionV3's 2,048 features is mostly bias."""
FETCH_CLIP = "python -m models.assets fetch clip336"
MAKE = "python -m scripts.image_statistics FOLDER"
SHOWN = 3  # file names in a message
LARGEST_UNPACKED = 2**28  # bytes of a compressed file; mu and sigma of 2,048 features take 34 million
EXTRACTING_CODE = (*(Path(module.__file__) for module in (clip, inception, pictures)), Path(__file__))

Note = Callable[[str], object]


class Extractor(Protocol):
    """What sees features in images.

    name: under which features are kept. fingerprint: of the network and of how images come to it, for files that
    outlive the code. code: the source files whose change may change features.
    """

    name: str
    fingerprint: str
    code: tuple[Path, ...]

    def features(self, pixels: Tensor) -> Tensor:
        """Features [N, D] float32 of images uint8 [N, 3, H, W], on the extractor's device."""
        ...


class InceptionFeatures(Inception):
    """Features for FID and KID; those of another resizing go by another name."""

    code = EXTRACTING_CODE


class ClipFeatures:
    """Unit-length image features of CLIP ViT-L/14 at 336 pixels, for CMMD.

    Images come to the network as `clip.preprocess` has them: with antialiasing, and cut to a square where they are
    none. The paper's code resizes without either.
    """

    name = "clip"
    code = EXTRACTING_CODE

    def __init__(self, device: torch.device | str) -> None:
        """Load it. Raises InputError where a file is missing or another, or there is too little memory."""
        self.device = torch.device(device)
        self.fingerprint = " ".join(str(asset.digest) for asset in asset_table.CLIP_336)
        files = clip_files()
        for path, asset in zip(files, asset_table.CLIP_336, strict=True):
            if fault := fault_of(asset, path, asset.digest):
                raise InputError(f"{path} is not {asset.name}: {fault}. Move it away and fetch it:  {FETCH_CLIP}")
        self._model = clip.load_transformers_checkpoint(files[0].parent).requires_grad_(False).to(self.device)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Unit-length features [N, D] float32 of images uint8 [N, 3, H, W], on the network's device."""
        images = to_device(pixels, self.device).float() / 255
        inputs = clip.preprocess(images, self._model.config.vision_config.image_size)
        return functional.normalize(clip.image_features(self._model, inputs).float(), dim=1)


def clip_files() -> list[Path]:
    """Where CMMD's CLIP lies. Raises InputError where a file is missing."""
    files = [asset_table.ROOT / asset.path for asset in asset_table.CLIP_336]
    if absent := [str(path) for path in files if not path.is_file()]:
        raise InputError(f"CMMD needs files that are not there: {', '.join(absent)}. Fetch them:  {FETCH_CLIP}")
    return files


def parse_distances(text: str) -> list[str]:
    """The distinct distances of a list with commas. Raises InputError for one that is not of `DISTANCES`."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in names if name not in DISTANCES]:
        raise InputError(f"unknown distance {unknown[0]!r}; known are {', '.join(DISTANCES)}, separated by commas")
    return names


def say_few_for_fid(count: int, note: Note) -> None:
    """Warn where there are too few images, drawn or real ones."""
    if count < FEWEST_FOR_FID:
        note(
            f"FID of {count} images, fewer than {FEWEST_FOR_FID:,}, is mostly bias: compare it at equal numbers only, "
            "or take --distances kid,cmmd, which have none or little"
        )


def load_extractors(distances: Sequence[str], resize: Resize, device: torch.device | str) -> list[Extractor]:
    """What the distances, of `DISTANCES`, need. Raises InputError where files are missing or wrong."""
    inception = [InceptionFeatures(device, resize)] if {"fid", "kid"} & set(distances) else []
    return [*inception, *([ClipFeatures(device)] if "cmmd" in distances else [])]


# ---------------------------------------------------------------------------------------------------------------------
# A folder


def folder_features(
    folder: Path, extractors: Sequence[Extractor], batch: int, note: Note, advance: Note = int
) -> dict[str, Tensor]:
    """Features [N, D], float32 on the CPU, of the images in a folder and all below it, by extractor.

    Each image comes to the extractors in its own size. What cannot be read is named, skipped and counted. `advance` is
    told of files that were looked at.

    Raises:
        InputError: there is no such folder, or it holds fewer than two images that can be read.
    """
    found: dict[str, list[Tensor]] = {extractor.name: [] for extractor in extractors}
    sizes: set[tuple[int, ...]] = set()
    broken: list[str] = []
    for images in _batches(_read(real_files(folder), broken, advance), batch):
        sizes.add(tuple(images.shape[-2:]))
        for extractor in extractors:
            found[extractor.name].append(extractor.features(images).cpu())
    if broken:
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        note(f"{folder}: {len(broken)} files are skipped: {'; '.join(broken[:SHOWN])}{more}")
    count = len(torch.cat(next(iter(found.values())))) if sizes else 0
    if count < 2:
        raise InputError(f"{folder}: {count} images can be read; a distance needs at least 2 (and {FEWEST_FOR_FID:,})")
    if len(sizes) > 1:
        note(f"{folder}: {count} images of {len(sizes)} sizes, each resized to what the networks read")
    return {name: torch.cat(parts) for name, parts in found.items()}


def real_files(folder: Path) -> list[Path]:
    """The image files of a folder. Raises InputError where there is no such folder, or no image in it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder of real images")
    files, _ = image_files(folder)
    if not files:
        raise InputError(f"{folder}: holds no image ({', '.join(SUFFIXES)})")
    return files


def _read(files: Sequence[Path], broken: list[str], advance: Note) -> Iterator[Tensor]:
    for file in files:
        advance(1)
        try:
            with opened_picture(file) as image:
                pixels = np.array(on_white(in_colour(upright(image))))
        except InputError as error:
            broken.append(str(error))
            continue
        yield torch.from_numpy(pixels).movedim(-1, 0)


def _batches(images: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Stacks [n, 3, H, W] of at most `size` neighbours of one shape."""
    for _, alike in groupby(images, key=lambda image: image.shape):
        while stack := list(islice(alike, size)):
            yield torch.stack(stack)


# ---------------------------------------------------------------------------------------------------------------------
# A file


@dataclass(frozen=True)
class RealImages:
    """What is known of real images.

    source: where from, for people. gaussian: of InceptionV3's features. features: [M, D] by extractor, where they were
    kept. count: M, where it is known. made_by: fingerprint by extractor, where it is known.
    """

    source: str
    gaussian: Gaussian | None
    features: Mapping[str, Tensor]
    count: int | None
    made_by: Mapping[str, str]

    @classmethod
    def of(cls, source: str, features: Mapping[str, Tensor], extractors: Sequence[Extractor]) -> RealImages:
        """Of features [M, D] by extractor."""
        seen = next((part for name, part in features.items() if name.startswith("inception")), None)
        made_by = {extractor.name: extractor.fingerprint for extractor in extractors}
        count = len(next(iter(features.values())))
        return cls(source, None if seen is None else gaussian_of(seen), features, count, made_by)

    def check(self, distances: Sequence[str], extractors: Sequence[Extractor]) -> None:
        """Raise InputError where they are of another network, size or resizing, or lack what a distance needs."""
        for extractor in extractors:
            for name, maker in self.made_by.items():
                if name.split("_")[0] == extractor.name.split("_")[0] and maker != extractor.fingerprint:
                    raise InputError(
                        f"{self.source}: is of {name} ({maker}), and {extractor.name} ({extractor.fingerprint}) is "
                        f"asked for: make it again ({MAKE}), or choose its --resize"
                    )
        if "fid" in distances and self.gaussian is None:
            raise InputError(f"{self.source}: holds no mu and sigma, which FID needs: make it again ({MAKE})")
        for distance, name in (("kid", "inception"), ("cmmd", "clip")):
            if distance in distances and not any(kept.startswith(name) for kept in self.features):
                raise InputError(
                    f"{self.source}: holds no features of {name}, which {distance.upper()} needs: name a folder of "
                    f"images, or make a file with them ({MAKE} --distances {distance})"
                )
        for extractor in extractors:
            self._check_width(extractor)

    def _check_width(self, extractor: Extractor) -> None:
        width = extractor.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1]
        kind = extractor.name.split("_")[0]
        widths = [part.shape[1] for name, part in self.features.items() if name.startswith(kind)]
        if self.gaussian is not None and kind == "inception":
            widths.append(len(self.gaussian.mean))
        if other := next((found for found in widths if found != width), None):
            raise InputError(
                f"{self.source}: its statistics are of {other} features, and {extractor.name} has {width} here: they "
                f"are of another network; make them again ({MAKE})"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Of the numbers themselves."""
        digest = hashlib.sha256()
        for part in (*(self.gaussian or ()), *self.features.values()):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()

    def values(self, distance: str, features: Tensor) -> Tensor:
        """Values [N] (see `distances`) of one of `DISTANCES` of generated images' features [N, D], after `check`."""
        kept = [part for name, part in self.features.items() if name.startswith("clip") == (distance == "cmmd")]
        match distance:
            case "fid":
                return frechet_values(features, self.gaussian)
            case "kid":
                return kid_values(features, kept[0])
            case _:
                return cmmd_values(features, kept[0])

    def save(self, path: Path, distances: Sequence[str]) -> None:
        """Write what the distances need as a `.npz`, whole or not at all. Raises InputError where it cannot be."""
        content: dict[str, Any] = {f"made_by_{name}": said for name, said in self.made_by.items()}
        if self.gaussian is not None:
            content |= {"mu": self.gaussian.mean.numpy(), "sigma": self.gaussian.covariance.numpy()}
        for name, part in self.features.items():
            if name.startswith("clip") or "kid" in distances:
                content[f"features_{name}"] = part.numpy()
        buffer = io.BytesIO()
        np.savez(buffer, count=self.count, **content)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, made_with: str = "") -> RealImages:
        """Read a statistics file; no code of it is run.

        made_with: options of the command that makes the one that is wanted, for the message where there is none.

        Raises InputError where it is none.
        """
        try:
            with ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > max(path.stat().st_size, LARGEST_UNPACKED):
                raise ValueError(f"it unpacks to {unpacked:,} bytes; write it with numpy.savez, uncompressed")
            with np.load(path, allow_pickle=False) as file:
                content = dict(file)
        except FileNotFoundError:
            made = f"{MAKE}{made_with} --out {path}"
            raise InputError(f"{path}: there is no such statistics file; make it:  {made}") from None
        except Exception as error:  # damaged archives raise many kinds
            raise InputError(f"{path} is no readable statistics file: {first_line(error)}; make it:  {MAKE}") from None
        prefix = "features_"
        features = {
            name.removeprefix(prefix): torch.from_numpy(part)
            for name, part in content.items()
            if name.startswith(prefix) and part.ndim == 2 and part.dtype == np.float32 and np.isfinite(part).all()
        }
        made_by = {
            name.removeprefix("made_by_"): str(said) for name, said in content.items() if name.startswith("made_by_")
        }
        count = int(content["count"]) if "count" in content and content["count"].ndim == 0 else None
        return cls(str(path), _gaussian_in(content, path), features, count, made_by)


def _gaussian_in(content: Mapping[str, np.ndarray], path: Path) -> Gaussian | None:
    if not content.keys() & {"mu", "sigma"}:
        return None
    mean, covariance = content.get("mu", np.empty(0)), content.get("sigma", np.empty(0))
    numbers = all(np.issubdtype(part.dtype, np.floating) and np.isfinite(part).all() for part in (mean, covariance))
    if not numbers or mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"{path}: mu is {[*mean.shape]} and sigma {[*covariance.shape]}; they must be finite numbers [D] and [D, D]"
        )
    return Gaussian(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double())
