"""Rendered scenes as arrays: the data sets that the models of the shapes world are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from files import replacing
from models.fingerprints import fingerprint
from models.shapes import scenes

# One-, two- and three-object scenes; the middle ones are the most frequent because relations are the hardest to learn.
NUMBERS_OF_OBJECTS = np.array(scenes.SUPPORTED_NUMBERS_OF_OBJECTS)
PROBABILITIES = np.array([0.3, 0.5, 0.2])

DRAWING_CODE = (Path(scenes.__file__), Path(__file__))
"""Files whose change may change what is drawn."""


@dataclass(frozen=True)
class RenderedScenes:
    """images uint8 [N, 64, 64, 3]; captions: N strings, `captions[i]` describes `images[i]`."""

    images: np.ndarray
    captions: list[str]


def render_scenes(split: scenes.Split, number: int, seed: int, *, progress: bool = True) -> RenderedScenes:
    """Draw `number` scenes of a split; the same arguments give the same scenes."""
    random = np.random.default_rng([seed, scenes.SPLITS.index(split)])
    images = np.empty((number, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3), dtype=np.uint8)
    captions = []
    for index in tqdm(range(number), desc=f"rendering {split} scenes", disable=not progress):
        scene = scenes.draw_scene(random, split, int(random.choice(NUMBERS_OF_OBJECTS, p=PROBABILITIES)))
        images[index] = scenes.draw(scene, scenes.place(scene, random))
        captions.append(scene.caption())
    return RenderedScenes(images, captions)


def cached_scenes(folder: Path, split: scenes.Split, number: int, seed: int) -> RenderedScenes:
    """`render_scenes`, kept in `folder` between runs of the same code."""
    file = folder / f"scenes-{split}-{number}-seed{seed}-{fingerprint(DRAWING_CODE)[:12]}.npz"
    if not file.exists():
        rendered = render_scenes(split, number, seed)
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, images=rendered.images, captions=np.array(rendered.captions))
    stored = np.load(file, allow_pickle=False)
    return RenderedScenes(stored["images"], stored["captions"].tolist())
