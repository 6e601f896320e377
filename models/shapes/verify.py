"""An exact verifier: which parts of a caption hold in an image (for this world what GenEval, arXiv 2310.11513, is for
photographs).

It tells the background by its tones and its pattern by its waves, finds the objects as connected regions of other
colours, and explains each by the drawing that fits it best, out of every shape, rotation, fill and colour. It is not
learned, never a training reward, and how reward hacking is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import permutations
from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage, optimize
from torch import Tensor

from models.shapes.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    FILLS,
    IMAGE_SIZE,
    NEVER_OUTLINED,
    RELATIONS,
    SHAPES,
    SIZES,
    SYMMETRY,
    Group,
    Placement,
    SceneObject,
    outline,
    parse,
    shading,
    signed_distance,
    stripes,
    turned,
    wave,
)

BACKGROUND_DISTANCE = 22.0  # of a pixel's colour to the line between a background's tones: below it, it may be that one
FOREGROUND_DISTANCE = 32.0  # above it, a pixel is part of an object; Euclidean in 0..255
EDGE_SHARE = 0.5  # of an object's usual contrast to the background: from there on a pixel lies inside
SMALLEST_REGION = 12  # pixels; smaller specks are no objects
LARGEST_MISFIT = 46.0  # root mean square in 0..255 over an object: above it the region is no known object
PLAIN_VARIATION = 0.11  # standard deviation of the tones, light aside: below it a background is plain
WAVE_SHARE = 0.55  # of the variation that one wave (stripes) or two crossing ones (checks) must explain
CROSSING_SHARE = 0.3  # what the weaker of two crossing waves must have of the stronger one
PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)  # [8, 3]
SIZE_BORDER = (SIZES["small"][1] + SIZES["large"][0]) / 2  # radius in pixels

LIKELY_SHAPES = 3  # by their silhouettes: these are drawn
CLOSE = 1.3  # times the smallest misfit: the drawings up to there are moved about
REFINEMENTS = {"angle": np.radians(5), "radius": 0.4, "x": 0.4, "y": 0.4}  # radians and pixels
_ANGLE_STEP = np.radians(10)  # between the rotations that are tried
_WAVE_ANGLES = np.arange(44) * np.pi / 44
_WAVE_FREQUENCIES = np.arange(1 / 16, 1 / 8.4, 1 / 256)  # a pixel


@dataclass(frozen=True)
class FoundObject:
    """What the verifier sees: the best explanation, its place, and its misfit (root mean square in 0..255)."""

    item: SceneObject
    placement: Placement
    misfit: float

    @property
    def known(self) -> bool:
        """Whether it is an object of this world at all."""
        return self.misfit <= LARGEST_MISFIT


@dataclass(frozen=True)
class Verdict:
    """Which parts of the caption hold.

    parts: count; background and pattern, relation where they are named; for each object i `object i` (something of
    this world stands for it) and, where it is named, `object i size|fill|colour|shape`.
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


class Background(NamedTuple):
    """What lies behind the objects: the names of its colour and its pattern, its colours [64, 64, 3], how far the
    image is from its tones [64, 64], both in 0..255, and where the objects are [64, 64].
    """

    name: str
    pattern: str
    pixels: np.ndarray
    distance: np.ndarray
    foreground: np.ndarray


def _tones(pixels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels [..., 3] stand between a background's tones, [...] from -0.3 to 1.3, and how far from there."""
    first, second = np.array(BACKGROUNDS[name], dtype=float)
    line = second - first
    tones = np.clip((pixels - first) @ line / (line @ line), -0.3, 1.3)
    return tones, np.linalg.norm(pixels - first - tones[..., None] * line, axis=-1)


def found_background(pixels: np.ndarray) -> Background:
    """The background of an image [64, 64, 3] in 0..255."""
    candidates = {name: _tones(pixels, name) for name in BACKGROUNDS}
    name = max(candidates, key=lambda name: float((candidates[name][1] < BACKGROUND_DISTANCE).mean()))
    tones, distance = candidates[name]
    foreground = distance > FOREGROUND_DISTANCE
    clear = ~ndimage.binary_dilation(foreground, iterations=2)
    first, second = np.array(BACKGROUNDS[name], dtype=float)
    # Behind the objects: the tones around them.
    weight = ndimage.gaussian_filter(clear.astype(float), 4) + 1e-6
    around = ndimage.gaussian_filter(np.where(clear, tones, 0.0), 4) / weight
    filled = np.where(ndimage.binary_dilation(foreground), around, tones)
    return Background(
        name, found_pattern(tones, clear), first + filled[..., None] * (second - first), distance, foreground
    )


@cache
def _waves() -> np.ndarray:
    """Plane waves [angles * frequencies, 4096], complex64."""
    angles, frequencies = np.meshgrid(_WAVE_ANGLES, _WAVE_FREQUENCIES, indexing="ij")
    return np.exp(1j * wave(angles.ravel(), 1 / frequencies.ravel())).reshape(angles.size, -1).astype(np.complex64)


def found_pattern(tones: np.ndarray, clear: np.ndarray) -> str:
    """The name of a background's pattern, from its tones [64, 64] where no object is (`clear`, [64, 64])."""
    if clear.sum() < 100:
        return "plain"
    y, x = np.nonzero(clear)
    seen = tones[clear]
    light = np.stack([np.ones(len(seen)), x, y], axis=1)
    rest = seen - light @ np.linalg.lstsq(light, seen, rcond=None)[0]
    if rest.std() < PLAIN_VARIATION:
        return "plain"
    field = np.zeros(clear.shape, dtype=np.float32)
    field[clear] = rest
    # Share of the variation that each wave explains: waves are nearly orthogonal over many pixels.
    shares = 2 * np.abs(_waves() @ field.ravel()) ** 2 / (len(rest) * (rest**2).sum())
    shares = shares.reshape(len(_WAVE_ANGLES), len(_WAVE_FREQUENCIES))
    crossing = np.roll(shares, len(_WAVE_ANGLES) // 2, axis=0)  # the wave at right angles
    pairs = np.where(np.minimum(shares, crossing) > CROSSING_SHARE * np.maximum(shares, crossing), shares + crossing, 0)
    if shares.max() >= WAVE_SHARE:
        return "striped"
    return "checkered" if pairs.max() >= WAVE_SHARE else "cloudy"


# --------------------------------------------------------------------------------------------------------------------
# Objects

_TABLE_REACH = 1.5
_TABLE_CELLS = 256  # from the middle of a table to its border: a pixel of a large object has 14
_TABLE_Y, _TABLE_X = (_TABLE_REACH / _TABLE_CELLS) * np.mgrid[
    -_TABLE_CELLS : _TABLE_CELLS + 1, -_TABLE_CELLS : _TABLE_CELLS + 1
]
_SOLID = {shape: "circle" if shape == "ring" else shape for shape in SHAPES}  # without its hole


@cache
def _table(shape: str) -> np.ndarray:
    """`signed_distance` [513, 513] over [-1.5, 1.5]^2, float32."""
    return signed_distance(shape, _TABLE_X, _TABLE_Y).astype(np.float32)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels of offsets in a shape's own frame: that of the nearest point of the table."""
    scale = np.float32(_TABLE_CELLS / (_TABLE_REACH * radius))
    column, row = (
        np.clip(_TABLE_CELLS + 0.5 + scale * offset, 0, 2 * _TABLE_CELLS).astype(np.intp) for offset in (x, y)
    )
    return np.float32(radius) * _table(shape)[row, column]


@cache
def _area_and_centroid(shape: str) -> tuple[float, float, float]:
    """Area and centroid (x, y) of a shape of radius 1."""
    inside = _table(shape) <= 0
    return inside.mean() * (2 * _TABLE_REACH) ** 2, _TABLE_X[inside].mean(), _TABLE_Y[inside].mean()


class _Window(NamedTuple):
    """The P pixels about a region: their centres x, y [P], whether they are in the region once its holes are filled
    [P], how they differ from the background [P, 3], and the background [P, 3].
    """

    x: np.ndarray
    y: np.ndarray
    inside: np.ndarray
    difference: np.ndarray
    background: np.ndarray


def _window(pixels: np.ndarray, region: np.ndarray, background: Background) -> _Window:
    others = ndimage.binary_dilation(background.foreground & ~region)
    # Pixels at an object's edge count from about half coverage on, however much its colour differs from the background.
    contrast = np.linalg.norm(pixels - background.pixels, axis=-1)
    solid = ndimage.binary_fill_holes(region & (contrast > EDGE_SHARE * np.median(contrast[region])))
    rows, columns = np.nonzero(ndimage.binary_dilation(solid, iterations=2) & ~(others & ~solid))
    behind = background.pixels[rows, columns]
    inside = solid[rows, columns]
    numbers = (columns + 0.5, rows + 0.5, pixels[rows, columns] - behind, behind)
    x, y, difference, behind = (array.astype(np.float32) for array in numbers)  # enough, and twice as fast
    return _Window(x, y, inside, difference, behind)


@cache
def _evenly(number: int, end: float) -> np.ndarray:
    """`number` values from 0 on, `end` left out, float32."""
    return (np.arange(number) * end / number).astype(np.float32)


def _silhouettes(window: _Window, shape: str) -> list[tuple[float, Placement]]:
    """How badly each rotation of a shape, with the area and the centroid of the region, covers it, and how it then
    stands; the best one first.
    """
    area, centroid_x, centroid_y = _area_and_centroid(_SOLID[shape])
    radius = float(np.sqrt(window.inside.sum() / area))
    number = max(round(SYMMETRY[shape] / _ANGLE_STEP), 1)
    angles = _evenly(number, SYMMETRY[shape])[:, None]  # [A, 1]
    shift_x, shift_y = turned(radius * centroid_x, radius * centroid_y, -angles)
    x, y = window.x[window.inside].mean() - shift_x, window.y[window.inside].mean() - shift_y
    own = turned(window.x - x, window.y - y, angles)  # [A, P] each
    covered = np.clip(0.5 - _distance(_SOLID[shape], *own, radius), 0, 1)
    misfits = ((covered - window.inside) ** 2).mean(axis=1)
    return [
        (float(misfits[row]), Placement(float(x[row, 0]), float(y[row, 0]), radius, float(angles[row, 0])))
        for row in np.argsort(misfits)
    ]


def explain(pixels: np.ndarray, region: np.ndarray, background: Background) -> FoundObject:
    """The drawing that fits a region best.

    Args:
        pixels: [64, 64, 3] in 0..255.
        region: [64, 64] boolean.
        background: of the same image.
    """
    window = _window(pixels, region, background)
    silhouettes = {shape: _silhouettes(window, shape) for shape in SHAPES}
    likely = sorted(SHAPES, key=lambda shape: silhouettes[shape][0][0])[:LIKELY_SHAPES]
    drawn = [
        min(
            (found for _, place in silhouettes[shape][:2] for found in _drawings(window, shape, place, FILLS)),
            key=_misfit,
        )
        for shape in likely
    ]
    close = CLOSE * min(found.misfit for found in drawn)
    return min((_refined(window, found) for found in drawn if found.misfit <= close), key=_misfit)


def _refined(window: _Window, found: FoundObject) -> FoundObject:
    """The drawing after its rotation, radius and centre, one after the other, were let go where the misfit falls."""
    for name, step in [(name, step / scale) for scale in (1, 2) for name, step in REFINEMENTS.items()]:
        for direction in (-step, step):
            tried = replace(found.placement, **{name: getattr(found.placement, name) + direction})
            [drawing] = _drawings(window, found.item.shape, tried, (found.item.fill,))
            if drawing.misfit < found.misfit:
                found = drawing
                break
    return found


def _misfit(found: FoundObject) -> float:
    return found.misfit


def _brightnesses(window: _Window, shape: str, fill: str, placement: Placement) -> np.ndarray:
    """Brightness [V, P] of the fill in every way that a caption leaves open: stripes turned and moved, light."""
    across, down = window.x - placement.x, window.y - placement.y
    if fill == "shaded":
        return shading(across, down, placement.radius, _evenly(12, 2 * np.pi)[:, None])
    if fill == "striped":
        turn = SYMMETRY[shape] or np.pi / 12
        turns = round(2 * np.pi / turn)
        turns //= gcd(turns, 2)  # half a turn moves stripes, as a phase does
        angles = np.float32(placement.angle) + _evenly(turns, turns * turn)[:, None, None]
        phases = _evenly(8, 2 * np.pi)[:, None]
        return stripes(turned(across, down, angles)[1], phases).reshape(-1, len(across))
    return np.ones((1, len(across)))


def _drawings(window: _Window, shape: str, placement: Placement, fills: Sequence[str]) -> list[FoundObject]:
    """A shape as it stands, in each of the fills, in the colour and the variant that bring it nearest to the window.

    A pixel is drawn as a c + (1 - v) b, with its coverage v, a = v * brightness, the colour c and the background b. To
    a pixel that differs from the background by d, the square differences sum up to A |c|^2 - 2 c.B + C, with A, B and C
    the sums of a^2, a (d + v b) and |d + v b|^2: no drawing is needed for each colour.
    """
    size = "small" if placement.radius < SIZE_BORDER else "large"
    own = turned(window.x - placement.x, window.y - placement.y, placement.angle)
    distance = _distance(shape, *own, placement.radius)
    found = []
    for fill in fills:
        if fill == "outlined" and shape in NEVER_OUTLINED:
            continue
        coverage = np.clip(0.5 - (outline(distance) if fill == "outlined" else distance), 0.0, 1.0)  # [P]
        share = coverage * _brightnesses(window, shape, fill, placement)  # [V, P]
        wanted = window.difference + coverage[:, None] * window.background  # [P, 3]
        squares = (
            (share**2).sum(axis=1)[:, None] * (PALETTE**2).sum(axis=1)
            - 2 * share @ wanted @ PALETTE.T
            + (wanted**2).sum()
        )  # [V, 8]
        best = np.unravel_index(squares.argmin(), squares.shape)
        misfit = float(np.sqrt(max(squares[best], 0.0) / len(coverage)))
        found.append(FoundObject(SceneObject(size, fill, list(COLOURS)[best[1]], shape), placement, misfit))
    return found


def find_objects(image: Tensor) -> tuple[Background, list[FoundObject]]:
    """The background and every object in an image [3, 64, 64] in [0, 1], known or not, largest region first.

    Raises:
        ValueError: the image has another shape.
    """
    if tuple(image.shape) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"the verifier reads images of shape (3, {IMAGE_SIZE}, {IMAGE_SIZE}), not {tuple(image.shape)}"
        )
    pixels = 255 * torch.nan_to_num(image.detach().double().cpu()).clamp(0, 1).movedim(0, -1).numpy()
    background = found_background(pixels)
    labels, number = ndimage.label(background.foreground, structure=np.ones((3, 3)))
    regions = [labels == index for index in range(1, number + 1)]
    regions = sorted(
        (region for region in regions if region.sum() >= SMALLEST_REGION), key=lambda region: -region.sum()
    )
    return background, [explain(pixels, region, background) for region in regions]


def _object_parts(group: Group, found: FoundObject | None) -> dict[str, bool]:
    """What holds of one object of a group: that it is one of this world, and each named attribute."""
    known = found is not None and found.known
    named = [name for name in ATTRIBUTES if getattr(group, name) is not None]
    return {"": known} | {f" {name}": known and getattr(found.item, name) == getattr(group, name) for name in named}


def relation_holds(relation: str, first: FoundObject | None, second: FoundObject | None) -> bool:
    """Whether the first object stands past the second one in the relation's direction: by their mean radius, and more
    along it than across, so that of the four relations one holds at most. Without either object it does not hold.
    """
    if first is None or second is None:
        return False
    offset = np.array([first.placement.x - second.placement.x, first.placement.y - second.placement.y])
    direction = np.array(RELATIONS[relation])
    along, across = offset @ direction, abs(offset @ direction[::-1])
    return bool(along > max(across, 0.5 * (first.placement.radius + second.placement.radius)))


def verify(image: Tensor, caption: str) -> Verdict:
    """Say which parts of a caption hold in an image [3, 64, 64] in [0, 1].

    Found objects are matched to the named ones in the way that lets most of their parts hold, and of several such ways
    in one that lets the relation hold too.

    Raises:
        InputError: the caption is none of this world's.
        ValueError: the image has another shape.
    """
    scene = parse(caption)
    background, found = find_objects(image)
    parts = {"count": len(found) == scene.number_of_objects}
    if scene.background is not None:
        parts["background"] = background.name == scene.background
    if scene.pattern is not None:
        parts["pattern"] = background.pattern == scene.pattern
    wanted = [group for group in scene.groups for _ in range(group.number)]
    seen: list[FoundObject | None] = [*found, *[None] * max(len(wanted) - len(found), 0)]
    held = np.array([[sum(_object_parts(group, one).values()) for one in seen] for group in wanted])
    if scene.relation is None:
        matched = optimize.linear_sum_assignment(-held)[1]
    else:
        pairs = permutations(range(len(seen)), 2)
        stand = partial(relation_holds, scene.relation)
        matched = max(pairs, key=lambda pair: (held[0, pair[0]] + held[1, pair[1]], stand(*(seen[i] for i in pair))))
        parts["relation"] = stand(*(seen[index] for index in matched))
    for number, (group, index) in enumerate(zip(wanted, matched, strict=True), start=1):
        parts |= {f"object {number}{name}": holds for name, holds in _object_parts(group, seen[index]).items()}
    return Verdict(parts)
