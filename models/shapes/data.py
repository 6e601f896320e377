"""Rendered scenes as arrays: the data sets that the models of the shapes world are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from errors import InputError, first_line, is_too_little_memory
from files import replacing
from models.fingerprints import fingerprint
from models.shapes import scenes

NUMBERS_OF_OBJECTS = np.arange(1, scenes.MOST_OBJECTS + 1)
PROBABILITIES = np.array([0.30, 0.26, 0.20, 0.10, 0.06, 0.05, 0.03])  # of one object to seven


Variant = Callable[[scenes.Scene, scenes.Picture], tuple[scenes.Scene, scenes.Picture]]

DRAWING_CODE = (Path(scenes.__file__), Path(__file__))
"""Files whose change may change what is drawn."""


@dataclass(frozen=True)
class RenderedScenes:
    """images uint8 [N, 64, 64, 3]; captions: N strings, `captions[i]` describes `images[i]`."""

    images: np.ndarray
    captions: list[str]


def as_drawn(scene: scenes.Scene, picture: scenes.Picture) -> tuple[scenes.Scene, scenes.Picture]:
    """The world as it is."""
    return scene, picture


def render_scenes(
    split: scenes.Split, number: int, seed: int, *, variant: Variant = as_drawn, progress: bool = True
) -> RenderedScenes:
    """Draw `number` scenes of a split, or of a variant of the world; the same arguments give the same scenes."""
    random = np.random.default_rng([seed, scenes.SPLITS.index(split)])
    images = np.empty((number, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3), dtype=np.uint8)
    captions = []
    for index in tqdm(range(number), desc=f"rendering {split} scenes", disable=not progress):
        scene = scenes.draw_scene(random, split, int(random.choice(NUMBERS_OF_OBJECTS, p=PROBABILITIES)))
        scene, picture = variant(scene, scenes.imagine(scene, random))
        images[index] = scenes.draw(picture)
        captions.append(scene.caption())
    return RenderedScenes(images, captions)


@contextmanager
def reading_scratch(file: Path) -> Iterator[None]:
    """Raise InputError where a file that a command keeps for itself turns out in the block to be damaged or foreign."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # what its reader trips over can be anything
        if is_too_little_memory(error):
            raise
        raise InputError(f"{file}: cannot be read ({first_line(error)}); remove it, and it is made anew") from error


def cached_scenes(folder: Path, split: scenes.Split, number: int, seed: int) -> RenderedScenes:
    """`render_scenes`, kept in `folder` between runs of the same code."""
    file = folder / f"scenes-{split}-{number}-seed{seed}-{fingerprint(DRAWING_CODE)[:12]}.npz"
    if not file.exists():
        rendered = render_scenes(split, number, seed)
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, images=rendered.images, captions=np.array(rendered.captions))
    with reading_scratch(file), np.load(file, allow_pickle=False) as stored:
        return RenderedScenes(stored["images"], stored["captions"].tolist())
