"""An exact verifier: which parts of a caption hold in an image (for this world what GenEval, arXiv 2310.11513, is for
photographs).

It tells the background by its tones and its pattern by its waves, finds the objects as connected regions of other
colours, and explains each by the drawing that fits it best, out of every shape, rotation, fill and colour. It is not
learned, never a training reward, and how reward hacking is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby, permutations
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
REFINEMENTS = np.array([[0, 0, 0, np.radians(5)], [0, 0, 0.4, 0], [0.4, 0, 0, 0], [0, 0.4, 0, 0]])  # see `_distances`
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
    """What lies behind the objects: the names of its colour and its pattern, its colours [64, 64, 3] in 0..255, and
    where the objects are [64, 64].
    """

    name: str
    pattern: str
    pixels: np.ndarray
    foreground: np.ndarray


_TONES = np.array(list(BACKGROUNDS.values()), dtype=float)  # [5, 2, 3]
_BLUR = ndimage.gaussian_filter1d(np.eye(IMAGE_SIZE), 4, axis=0)  # of one direction


def _tones(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where pixels [3, P] stand between each background's tones, [5, P] from -0.3 to 1.3, and how far from there."""
    first, line = _TONES[:, 0], _TONES[:, 1] - _TONES[:, 0]
    along, length = line @ planes - (line * first).sum(axis=1)[:, None], (line**2).sum(axis=1)[:, None]
    tones = np.clip(along / length, -0.3, 1.3)
    squares = (planes**2).sum(axis=0) - 2 * first @ planes + (first**2).sum(axis=1)[:, None]
    return tones, np.sqrt(np.maximum(squares - tones * (2 * along - tones * length), 0))


def found_background(pixels: np.ndarray) -> Background:
    """The background of an image [64, 64, 3] in 0..255."""
    tones, distances = _tones(np.ascontiguousarray(pixels.reshape(-1, 3).T))
    best = (distances < BACKGROUND_DISTANCE).sum(axis=1).argmax()
    tones, foreground = (one[best].reshape(pixels.shape[:2]) for one in (tones, distances > FOREGROUND_DISTANCE))
    clear = ~ndimage.binary_dilation(foreground, iterations=2)
    # Behind the objects: the tones around them.
    weight, around = _BLUR @ np.stack([clear, np.where(clear, tones, 0.0)]) @ _BLUR.T
    filled = np.where(ndimage.binary_dilation(foreground), around / (weight + 1e-6), tones)
    behind = _TONES[best, 0] + filled[..., None] * (_TONES[best, 1] - _TONES[best, 0])
    return Background(list(BACKGROUNDS)[best], found_pattern(tones, clear), behind, foreground)


@cache
def _waves() -> list[np.ndarray]:
    """Plane waves along a row and down a column, complex64 [64, angles * frequencies] each; an image's are products."""
    angles, frequencies = (grid.ravel() for grid in np.meshgrid(_WAVE_ANGLES, _WAVE_FREQUENCIES, indexing="ij"))
    steps = 2j * np.pi * frequencies * np.stack([np.cos(angles), np.sin(angles)])
    return [np.exp(step * np.arange(IMAGE_SIZE)[:, None]).astype(np.complex64) for step in steps]


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
    along, down = _waves()
    rows = (field @ along.view(np.float32)).view(np.complex64)  # [64, angles * frequencies]
    shares = 2 * np.abs(np.einsum("yw,yw->w", rows, down)) ** 2 / (len(rest) * (rest**2).sum())
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


@cache
def _tables() -> np.ndarray:
    """`signed_distance` of each shape over [-1.5, 1.5]^2, float32 [8, 513, 513]."""
    return np.stack([signed_distance(shape, _TABLE_X, _TABLE_Y) for shape in SHAPES]).astype(np.float32)


def _distances(window: _Window, shapes: Sequence[int], places: np.ndarray) -> np.ndarray:
    """Signed distances in pixels, float32 [N, P], to shapes (numbers [N]) at `places`, float64 [N, 4]: x, y, radius and
    angle; they are those of the nearest points of the tables.
    """
    x, y, radius, angle = places.T
    scale = (_TABLE_CELLS / (_TABLE_REACH * radius)).astype(np.float32)
    right, down = scale * (np.cos(angle), np.sin(angle))
    turns = np.array([[-down, right, down * x - right * y], [right, down, -right * x - down * y]])  # [2, 3, N]
    offsets = turns.transpose(0, 2, 1) @ np.stack([window.x, window.y, np.ones_like(window.x)])  # [2, N, P]
    row, column = np.clip(_TABLE_CELLS + 0.5 + offsets, 0, 2 * _TABLE_CELLS).astype(np.intp)
    cells = (np.asarray(shapes)[:, None] * len(_TABLE_X) + row) * len(_TABLE_X) + column
    return radius.astype(np.float32)[:, None] * _tables().take(cells)


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
    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    top, left = max(rows[0] - 3, 0), max(columns[0] - 3, 0)  # two pixels about the region, and their neighbours
    near = np.s_[top : rows[-1] + 4, left : columns[-1] + 4]
    pixels, region, empty = pixels[near], region[near], background.pixels[near]
    others = ndimage.binary_dilation(background.foreground[near] & ~region)
    # Pixels at an object's edge count from about half coverage on, however much its colour differs from the background.
    contrast = np.linalg.norm(pixels - empty, axis=-1)
    solid = ndimage.binary_fill_holes(region & (contrast > EDGE_SHARE * np.median(contrast[region])))
    rows, columns = np.nonzero(ndimage.binary_dilation(solid, iterations=2) & ~(others & ~solid))
    behind = empty[rows, columns]
    numbers = (left + columns + 0.5, top + rows + 0.5, pixels[rows, columns] - behind, behind)
    x, y, difference, behind = (array.astype(np.float32) for array in numbers)  # enough, and twice as fast
    return _Window(x, y, solid[rows, columns], difference, behind)


@cache
def _evenly(number: int, end: float) -> np.ndarray:
    """`number` values from 0 on, `end` left out, float32."""
    return (np.arange(number) * end / number).astype(np.float32)


@cache
def _rotations() -> list[np.ndarray]:
    """What is laid upon a region, R shapes: numbers [R], without their holes [R], share of the table and centroid (x,
    y) [3, R] of these, and rotations, float32 [R].
    """
    angles = [_evenly(max(round(SYMMETRY[shape] / _ANGLE_STEP), 1), SYMMETRY[shape]) for shape in SHAPES]
    shapes = np.repeat(np.arange(len(SHAPES)), [len(some) for some in angles])
    solid = np.where(shapes == SHAPES.index("ring"), SHAPES.index("circle"), shapes)
    measures = [(inside.mean(), _TABLE_X[inside].mean(), _TABLE_Y[inside].mean()) for inside in _tables() <= 0]
    return [shapes, solid, np.array(measures)[solid].T, np.concatenate(angles)]


def _silhouettes(window: _Window) -> list[tuple[str, np.ndarray]]:
    """The shapes that, with the region's area and centroid, cover it best, the best one first, and the places [2, 4] of
    each in its two best rotations (a circle has one).
    """
    shapes, solid, (share, centroid_x, centroid_y), angles = _rotations()
    radius = np.sqrt(window.inside.sum() / (share * (2 * _TABLE_REACH) ** 2))
    shift_x, shift_y = turned(radius * centroid_x, radius * centroid_y, -angles)
    x, y = window.x[window.inside].mean() - shift_x, window.y[window.inside].mean() - shift_y
    places = np.stack([x, y, radius, angles], axis=1)
    misfits = ((np.clip(0.5 - _distances(window, solid, places), 0, 1) - window.inside) ** 2).mean(axis=1)
    of_shapes = [np.flatnonzero(shapes == shape) for shape in range(len(SHAPES))]
    ranked = sorted((rows[np.argsort(misfits[rows])[:2]] for rows in of_shapes), key=lambda rows: misfits[rows[0]])
    return [(SHAPES[shapes[rows[0]]], places[rows]) for rows in ranked[:LIKELY_SHAPES]]


def explain(pixels: np.ndarray, region: np.ndarray, background: Background) -> FoundObject:
    """The drawing that fits a region best.

    Args:
        pixels: [64, 64, 3] in 0..255.
        region: [64, 64] boolean.
        background: of the same image.
    """
    window = _window(pixels, region, background)
    tried = [(shape, fill, place) for shape, stands in _silhouettes(window) for place in stands for fill in FILLS]
    tried = [one for one in tried if one[1] != "outlined" or one[0] not in NEVER_OUTLINED]
    kinds, places = [one[:2] for one in tried], np.array([one[2] for one in tried])
    misfits, colours = _fits(window, kinds, places)
    best = [min(rows, key=misfits.__getitem__) for _, rows in groupby(range(len(kinds)), lambda row: kinds[row][0])]
    close = [row for row in best if misfits[row] <= CLOSE * misfits[best].min()]
    kinds, places, misfits, colours = [kinds[row] for row in close], places[close], misfits[close], colours[close]
    # Rotation, radius and centre, one after the other, are let go where the misfit falls.
    for step in np.concatenate([REFINEMENTS, REFINEMENTS / 2]):
        moved = places[:, None] + np.stack([-step, step])  # [N, 2, 4]
        fits = _fits(window, [kind for kind in kinds for _ in moved[0]], moved.reshape(-1, 4))
        values = moved, *(array.reshape(-1, 2) for array in fits)
        better = values[1] < misfits[:, None]
        rows, ways = np.flatnonzero(better.any(axis=1)), better[better.any(axis=1)].argmax(axis=1)
        places[rows], misfits[rows], colours[rows] = (array[rows, ways] for array in values)
    best = misfits.argmin()
    (shape, fill), place = kinds[best], Placement(*places[best].tolist())
    size = "small" if place.radius < SIZE_BORDER else "large"
    return FoundObject(SceneObject(size, fill, list(COLOURS)[colours[best]], shape), place, float(misfits[best]))


def _brightnesses(window: _Window, fill: str, symmetry: float, places: np.ndarray) -> np.ndarray:
    """Brightness [N, V, P] of the fill in every way that a caption leaves open: stripes turned and moved, light."""
    x, y, radius, angle = places.astype(np.float32).T[..., None, None]
    across, down = window.x - x, window.y - y
    if fill == "shaded":
        return shading(across, down, radius, _evenly(12, 2 * np.pi)[:, None])
    if fill == "striped":
        turn = symmetry or np.pi / 12
        turns = round(2 * np.pi / turn)
        turns //= gcd(turns, 2)  # half a turn moves stripes, as a phase does
        angles = angle[..., None] + _evenly(turns, turns * turn)[:, None, None]  # [N, T, 1, 1]
        height = turned(across[:, None], down[:, None], angles)[1]
        return stripes(height, _evenly(8, 2 * np.pi)[:, None]).reshape(len(places), -1, len(window.x))
    return np.ones((1, 1, 1))


def _fits(window: _Window, kinds: Sequence[tuple[str, str]], places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The misfits [N] of shapes in a fill (`kinds`) as they stand (`places`, see `_distances`), each in the colour and
    the variant that bring it nearest to the window, and the numbers of these colours [N].

    A pixel is drawn as a c + (1 - v) b, with its coverage v, a = v * brightness, the colour c and the background b. To
    a pixel that differs from the background by d, the square differences sum up to A |c|^2 - 2 c.B + C, with A, B and C
    the sums of a^2, a (d + v b) and |d + v b|^2: no drawing is needed for each colour.
    """
    centres = places[:, :2].astype(np.float32)  # as the pixels' are
    distance = _distances(window, [SHAPES.index(shape) for shape, _ in kinds], np.hstack([centres, places[:, 2:]]))
    misfits, colours = np.empty(len(kinds)), np.empty(len(kinds), dtype=int)
    alike = [(fill, SYMMETRY[shape] if fill == "striped" else 0.0) for shape, fill in kinds]  # in number of variants
    for fill, symmetry in set(alike):
        rows = [row for row, kind in enumerate(alike) if kind == (fill, symmetry)]
        coverage = np.clip(0.5 - (outline(distance[rows]) if fill == "outlined" else distance[rows]), 0, 1)  # [N, P]
        share = coverage[:, None] * _brightnesses(window, fill, symmetry, places[rows])  # [N, V, P]
        wanted = window.difference + coverage[..., None] * window.background  # [N, P, 3]
        squares = (
            (share**2).sum(axis=2)[..., None] * (PALETTE**2).sum(axis=1)
            - share @ wanted @ (2 * PALETTE.T)
            + (wanted.reshape(len(rows), -1) ** 2).sum(axis=1)[:, None, None]
        ).reshape(len(rows), -1)  # [N, V * 8]
        misfits[rows] = np.sqrt(np.maximum(squares.min(axis=1), 0) / len(window.x))
        colours[rows] = squares.argmin(axis=1) % len(PALETTE)
    return misfits, colours


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
    labels, _ = ndimage.label(background.foreground, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    regions = sorted(np.flatnonzero(sizes[1:] >= SMALLEST_REGION) + 1, key=lambda label: -sizes[label])
    return background, [explain(pixels, labels == label, background) for label in regions]


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
