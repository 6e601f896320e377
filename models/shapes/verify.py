"""An exact verifier: which parts of a caption hold in an image (for this world what GenEval, arXiv 2310.11513, is for
photographs).

It finds the objects as connected regions that differ from the background, and explains each by the drawing that fits
it best, out of every shape, fill and colour at the place and size that the region has. It is not learned, never a
training reward, and how reward hacking is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, permutations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    IMAGE_SIZE,
    NEVER_OUTLINED,
    SHAPES,
    SIZES,
    STRIPE_PERIOD,
    Placement,
    Scene,
    SceneObject,
    coverage_and_brightness,
    filled,
    parse,
    signed_distance,
)

FOREGROUND_DISTANCE = 45.0  # of a pixel's colour to the background's, Euclidean in 0..255
SMALLEST_REGION = 10  # pixels; smaller specks are no objects
LARGEST_MISFIT = 34.0  # root mean square in 0..255 over an object's window: above it the region is no known object
PALETTE = np.array(list(COLOURS.values()), dtype=float)  # [8, 3]
# Pixels that stripes may stand higher than the renderer draws them, [6, 1].
STRIPE_HEIGHTS = np.arange(round(STRIPE_PERIOD))[:, None]
SIZE_BORDER = (SIZES["small"][1] + SIZES["large"][0]) / 2  # radius in pixels


@dataclass(frozen=True)
class FoundObject:
    """What the verifier sees: the best explanation, its place, and its misfit (root mean square in 0..255)."""

    item: SceneObject
    placement: Placement
    misfit: float


@dataclass(frozen=True)
class Verdict:
    """Which parts of the caption hold.

    parts: background, count, relation (two and three objects) and, for each object i, `object i
    size|fill|colour|shape`.
    """

    parts: dict[str, bool]

    @property
    def correct(self) -> bool:
        """Whether the whole caption holds."""
        return all(self.parts.values())

    @property
    def score(self) -> float:
        """The share of the parts that hold, in [0, 1]."""
        return sum(self.parts.values()) / len(self.parts)


def connected_regions(mask: np.ndarray) -> list[np.ndarray]:
    """Regions of a boolean mask [H, W] as masks, neighbours in eight directions, largest first; overlapping bounding
    boxes are joined.
    """
    height, width = mask.shape
    steps = [y * (width + 2) + x for y in (-1, 0, 1) for x in (-1, 0, 1)]
    left = set(np.flatnonzero(np.pad(mask, 1)).tolist())
    walks = []
    while left:
        walk = [left.pop()]
        for pixel in walk:  # which grows meanwhile
            for step in steps:
                if pixel + step in left:
                    left.remove(pixel + step)
                    walk.append(pixel + step)
        walks.append(walk)
    regions = []
    for walk in sorted(walks, key=max):
        region = np.zeros((height + 2, width + 2), dtype=bool)
        region.flat[walk] = True
        regions.append(region[1:-1, 1:-1])
    return sorted(_joined(regions), key=lambda region: -region.sum())


def _box(region: np.ndarray) -> tuple[int, int, int, int]:
    """left, top, right, bottom (exclusive) of a region."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _joined(regions: list[np.ndarray]) -> list[np.ndarray]:
    """Join regions whose boxes overlap: the pieces of one object, since objects keep a gap."""
    joined: list[np.ndarray] = []
    boxes: list[tuple[int, int, int, int]] = []
    for region in regions:
        whole, box = region, _box(region)
        while (met := next((index for index, other in enumerate(boxes) if _overlap(box, other)), None)) is not None:
            whole = whole | joined.pop(met)
            box = _box(whole)
            del boxes[met]
        joined.append(whole)
        boxes.append(box)
    return joined


def found_background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and colour [3] of the background: the median of the border of an image [H, W, 3] in 0..255."""
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    colour = np.median(border, axis=0)
    name = min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(colour - BACKGROUNDS[name])))
    return name, colour


@cache
def _extent(shape: str) -> tuple[float, float, float, float]:
    """left, top, right, bottom of a shape of radius 1 at the origin."""
    y, x = np.mgrid[-1.3:1.3:261j, -1.3:1.3:261j]
    item = SceneObject("small", "plain", "red", shape)
    inside = coverage_and_brightness(item, Placement(0.0, 0.0, 1.0), x, y)[0] >= 0.5
    return float(x[inside].min()), float(y[inside].min()), float(x[inside].max()), float(y[inside].max())


def _fitted_placement(shape: str, box: tuple[int, int, int, int]) -> Placement:
    """Centre and radius at which the shape fills a box best."""
    left, top, right, bottom = _extent(shape)
    radius = ((box[2] - box[0]) / (right - left) + (box[3] - box[1]) / (bottom - top)) / 2
    x = (box[0] + box[2]) / 2 - radius * (left + right) / 2
    y = (box[1] + box[3]) / 2 - radius * (top + bottom) / 2
    return Placement(x, y, radius)


class _Window(NamedTuple):
    """The P pixels about a region: their centres x, y [P], how they differ from the background [P, 3], the background
    [3], and the region's box in pixels.
    """

    x: np.ndarray
    y: np.ndarray
    difference: np.ndarray
    background: np.ndarray
    box: tuple[int, int, int, int]


def explain(pixels: np.ndarray, region: np.ndarray, background: np.ndarray) -> FoundObject:
    """The drawing that fits a region best.

    Args:
        pixels: [H, W, 3] in 0..255.
        region: [H, W] boolean.
        background: [3] in 0..255.
    """
    box = _box(region)
    left, top = max(box[0] - 2, 0), max(box[1] - 2, 0)
    shown = pixels[top : box[3] + 2, left : box[2] + 2]
    y, x = np.mgrid[top : top + shown.shape[0], left : left + shown.shape[1]] + 0.5
    window = _Window(x.ravel(), y.ravel(), (shown - background).reshape(-1, 3), background, box)
    drawings = [found for shape in SHAPES for found in _fitted_drawings(window, shape, _fills(shape), change=0.0)]
    # The radius matters less than shape and fill: try other radii for the best few only.
    likely = sorted(drawings, key=_misfit)[:5]
    refined = [
        found
        for shape in {found.item.shape: None for found in likely}
        for change in (-0.7, -0.35, 0.35)  # soft edges make a region up to a pixel too wide
        for found in _fitted_drawings(
            window, shape, [found.item.fill for found in likely if found.item.shape == shape], change
        )
    ]
    return min([*likely, *refined], key=_misfit)


def _misfit(found: FoundObject) -> float:
    return found.misfit


def _fills(shape: str) -> tuple[str, ...]:
    return tuple(fill for fill in FILLS if fill != "outlined" or shape not in NEVER_OUTLINED)


def _fitted_drawings(window: _Window, shape: str, fills: Sequence[str], change: float) -> list[FoundObject]:
    """A shape fitted into the window's box, its radius then changed by `change` pixels: one drawing for each fill, in
    the colour and with the height of the stripes that bring it nearest to the window. (The renderer lays the middle of
    a stripe through an object's centre; a caption does not say so, and stripes anywhere are stripes.)

    A pixel is drawn as a c + (1 - v) b, with its coverage v, a = v * brightness, the colour c and the background b. To
    a pixel that differs from the background by d, the square differences sum up to A |c|^2 - 2 c.B + C, with A, B and C
    the sums of a^2, a (d + v b) and |d + v b|^2: no drawing is needed for each colour.
    """
    placement = _fitted_placement(shape, window.box)
    placement = Placement(placement.x, placement.y, placement.radius + change)
    size = "small" if placement.radius < SIZE_BORDER else "large"
    across, down = window.x - placement.x, window.y - placement.y
    distance = placement.radius * signed_distance(shape, across / placement.radius, down / placement.radius)
    downs = [down + STRIPE_HEIGHTS if fill == "striped" else down[None] for fill in fills]  # each [heights, P]
    variants = [fill for fill, heights in zip(fills, downs, strict=True) for _ in heights]
    drawn = [
        np.broadcast_arrays(*filled(fill, placement.radius, distance[None], heights))
        for fill, heights in zip(fills, downs, strict=True)
    ]
    coverage, brightness = map(np.concatenate, zip(*drawn, strict=True))  # [V, P]
    share = coverage * brightness  # [V, P]
    products = share @ window.difference + (share * coverage).sum(axis=1)[:, None] * window.background  # B, [V, 3]
    rest = (
        (window.difference**2).sum()
        + 2 * coverage @ (window.difference @ window.background)
        + (coverage**2).sum(axis=1) * (window.background**2).sum()
    )  # C, [V]
    lengths = (PALETTE**2).sum(axis=1)  # [8]
    squares = (share**2).sum(axis=1)[:, None] * lengths - 2 * products @ PALETTE.T + rest[:, None]  # [V, 8]
    misfits = np.sqrt(squares.clip(min=0) / window.difference.size)
    names, best = list(COLOURS), squares.argmin(axis=1)
    drawings = [
        FoundObject(SceneObject(size, fill, names[colour], shape), placement, float(misfits[row, colour]))
        for row, (fill, colour) in enumerate(zip(variants, best, strict=True))
    ]
    return [min((found for found in drawings if found.item.fill == fill), key=_misfit) for fill in fills]


def find_objects(image: Tensor) -> tuple[str, list[FoundObject]]:
    """The background's name and every object in an image [3, 64, 64] in [0, 1], known or not, largest first.

    Raises:
        ValueError: the image has another shape.
    """
    if tuple(image.shape) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"the verifier reads images of shape (3, {IMAGE_SIZE}, {IMAGE_SIZE}), not {tuple(image.shape)}"
        )
    pixels = 255 * torch.nan_to_num(image.detach().double().cpu()).clamp(0, 1).movedim(0, -1).numpy()
    name, background = found_background(pixels)
    mask = np.linalg.norm(pixels - background, axis=-1) > FOREGROUND_DISTANCE
    regions = [region for region in connected_regions(mask) if region.sum() >= SMALLEST_REGION]
    return name, [explain(pixels, region, background) for region in regions]


def _relation_holds(scene: Scene, ordered: list[FoundObject]) -> bool:
    """Whether each object's centre lies past the one before it in the scene's direction, by their mean radius."""
    x_direction, y_direction = scene.direction()
    return all(
        x_direction * (after.placement.x - before.placement.x) + y_direction * (after.placement.y - before.placement.y)
        > 0.5 * (before.placement.radius + after.placement.radius)
        for before, after in pairwise(ordered)
    )


def _compare(scene: Scene, background: str, ordered: list[FoundObject | None]) -> dict[str, bool]:
    """The parts of the caption, given which found object stands for which named one."""
    parts = {"background": scene.background == background}
    for number, (wanted, found) in enumerate(zip(scene.objects, ordered, strict=True), start=1):
        for part in ("size", "fill", "colour", "shape"):
            known = found is not None and found.misfit <= LARGEST_MISFIT
            parts[f"object {number} {part}"] = known and getattr(found.item, part) == getattr(wanted, part)
    if scene.relation is not None:
        present = [found for found in ordered if found is not None]
        parts["relation"] = len(present) == len(ordered) and _relation_holds(scene, present)
    return parts


def verify(image: Tensor, caption: str) -> Verdict:
    """Say which parts of a caption hold in an image [3, 64, 64] in [0, 1].

    Found objects are matched to the named ones in the way that lets most parts hold.

    Raises:
        InputError: the caption is none of this world's.
        ValueError: the image has another shape.
    """
    scene = parse(caption)
    background, found = find_objects(image)
    number = len(scene.objects)
    candidates: list[FoundObject | None] = [*found[: number + 2], *[None] * max(number - len(found), 0)]
    best = max(
        (_compare(scene, background, list(order)) for order in permutations(candidates, number)),
        key=lambda parts: sum(parts.values()),
    )
    return Verdict({"count": len(found) == number, **best})
