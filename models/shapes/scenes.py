"""Scenes as data: their captions, what a caption leaves open, an antialiased renderer, and the split into train,
validation and held-out.

A scene is one to three groups of objects, seven objects at most, on a background. A group has a number and a shape;
size, fill and colour may be named or left open. Two single objects may stand in a relation. The caption says this, in
one grammar:

    a small striped red star on a plain white background
    six small stars on a checkered gray background
    a large plain blue ring left of a small green heart on a background
    two yellow shapes, a small cross and a large shaded pink heart on a cloudy navy background

`parse` and `Scene.caption` are inverse to each other. Everything else is open, and is drawn by `imagine`: unnamed
attributes (for each object anew), places, radii within the size class, tilt, the phase of stripes and patterns,
the direction of the light. What is open makes the path from noise to image bend, as it does for photographs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from errors import InputError

IMAGE_SIZE = 64  # pixels, height and width
MOST_OBJECTS = 7
MOST_GROUPS = 3
OUTLINE_WIDTH = 2.9  # pixels
STRIPE_PERIOD = 6.6  # pixels: one bright and one dark stripe of an object
DARKENING = 0.55  # of dark stripes, and of the far side of a shaded object
GAP = 3.0  # pixels between two objects, and between an object and the border
TILT = np.radians(15)  # most that an object is rotated to either side
DENSEST = 0.47  # share of the image that circles about the objects, gaps included, may take

NUMBERS = ("a", "two", "three", "four", "five", "six", "seven")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (40, 165, 70),
    "cyan": (40, 205, 220),
    "blue": (45, 85, 225),
    "purple": (135, 50, 190),
    "pink": (245, 125, 195),
}
# Two tones each; a pattern runs from the first to the second.
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "white": ((252, 252, 252), (214, 216, 222)),
    "gray": ((172, 172, 172), (128, 130, 134)),
    "black": ((12, 12, 14), (58, 58, 64)),
    "beige": ((240, 224, 192), (208, 184, 144)),
    "navy": ((14, 20, 60), (44, 62, 120)),
}
PATTERNS = ("plain", "striped", "checkered", "cloudy")
SIZES: dict[str, tuple[float, float]] = {"small": (6.7, 7.8), "large": (11.0, 12.6)}  # radius in pixels
FILLS = ("plain", "striped", "outlined", "shaded")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in (*SHAPES, "shape")}
ANY_SHAPE = "shape"
NEVER_OUTLINED = ("circle", "ring", "cross", "moon")  # a circle would be a ring; the others' outlines run together
RELATIONS: dict[str, tuple[int, int]] = {  # direction from the second object to the first: (x, y), y downwards
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
INVISIBLE = {("navy", "blue"), ("navy", "purple")}  # their dark parts would vanish into the background

Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")


class SceneObject(NamedTuple):
    """One object as it is drawn: names out of `SIZES`, `FILLS`, `COLOURS` and `SHAPES`."""

    size: str
    fill: str
    colour: str
    shape: str

    def split(self) -> Split:
        """The part of the world that this composition of fill, colour and shape belongs to: a rule, never chance.

        For each fill and shape, one colour of eight is held out and one is for validation, so that every pair of words
        is seen in training.
        """
        code = list(COLOURS).index(self.colour) + 3 * SHAPES.index(self.shape) + 2 * FILLS.index(self.fill)
        residue = code % len(COLOURS)
        return "heldout" if residue == 0 else "validation" if residue == 1 else "train"


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "fill": FILLS,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
}


@dataclass(frozen=True)
class Group:
    """`number` objects (1 to 7) of which the caption names these attributes; None is left open."""

    number: int
    size: str | None
    fill: str | None
    colour: str | None
    shape: str | None

    def phrase(self) -> str:
        """The words for this group."""
        noun = self.shape or ANY_SHAPE
        named = (self.size, self.fill, self.colour, noun if self.number == 1 else PLURALS[noun])
        described = [word for word in named if word]
        article = "an" if self.number == 1 and described[0][0] in "aeiou" else NUMBERS[self.number - 1]
        return " ".join([article, *described])

    def admits(self, item: SceneObject) -> bool:
        """Whether an object has every attribute that is named."""
        return all(getattr(self, name) in (None, getattr(item, name)) for name in ATTRIBUTES)

    def split(self) -> Split:
        """That of the composition, where fill, colour and shape are all named; otherwise train."""
        if self.fill is None or self.colour is None or self.shape is None:
            return "train"
        return SceneObject("small", self.fill, self.colour, self.shape).split()


@dataclass(frozen=True)
class Scene:
    """What a caption says: one to three groups, the relation of two single objects or None, and the background's
    pattern and colour, each a name or None where it is left open.
    """

    groups: tuple[Group, ...]
    relation: str | None
    pattern: str | None
    background: str | None

    @property
    def number_of_objects(self) -> int:
        """1 to 7."""
        return sum(group.number for group in self.groups)

    def caption(self) -> str:
        """The caption of this scene; `parse` reads it back."""
        *others, last = [group.phrase() for group in self.groups]
        joined = f" {self.relation or 'and'} "
        text = joined.join([", ".join(others), last]) if others else last
        behind = " ".join(word for word in (self.pattern, self.background) if word)
        return f"{text} on a {behind} background" if behind else f"{text} on a background"

    def split(self) -> Split:
        """held-out or validation where any group is; held-out has precedence."""
        splits = {group.split() for group in self.groups}
        return "heldout" if "heldout" in splits else "validation" if "validation" in splits else "train"


@dataclass(frozen=True)
class Placement:
    """How one object stands: centre x and y (pixels, y downwards), radius (pixels), rotation (radians, clockwise) and
    the phase of its stripes (radians).
    """

    x: float
    y: float
    radius: float
    angle: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True)
class Picture:
    """A scene with everything decided, as it is drawn.

    items: objects and how they stand, in the groups' order. background: a name. tones: [64, 64], 0 for the
    background's first tone and 1 for its second. light: where it comes from, radians.
    """

    items: tuple[tuple[SceneObject, Placement], ...]
    background: str
    tones: np.ndarray
    light: float


@cache
def vocabulary() -> frozenset[str]:
    """Every word (and the comma) that a caption can hold."""
    phrases = [
        *NUMBERS,
        "an",
        *COLOURS,
        *BACKGROUNDS,
        *PATTERNS,
        *SIZES,
        *FILLS,
        *PLURALS,
        *PLURALS.values(),
        *RELATIONS,
        "on",
        "and",
        "background",
        ",",
    ]
    return frozenset(word for phrase in phrases for word in phrase.split())


def words(prompt: str) -> list[str]:
    """Lower-case words and punctuation marks of a prompt, in order."""
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", prompt.lower())


def unknown_words(prompt: str) -> list[str]:
    """Words of the prompt that no caption of this world holds, in order of appearance, each once."""
    return list(dict.fromkeys(word for word in words(prompt) if word not in vocabulary()))


def _one_of(names: Sequence[str]) -> str:
    return "|".join(names)


_GROUP = (
    rf"(an|{_one_of(NUMBERS)}) (?:({_one_of(list(SIZES))}) )?(?:({_one_of(FILLS)}) )?(?:({_one_of(list(COLOURS))}) )?"
    rf"({_one_of([*sorted(PLURALS.values()), *PLURALS])})"
)
_GROUP_PATTERN = re.compile(_GROUP)
_SCENE_PATTERN = re.compile(
    rf"(?P<groups>.+) on a (?:(?P<pattern>{_one_of(PATTERNS)}) )?"
    rf"(?:(?P<background>{_one_of(list(BACKGROUNDS))}) )?background"
)
_JOINT_PATTERN = re.compile(rf"(?:, | (and|{_one_of(list(RELATIONS))}) )")


def _parse_group(text: str) -> Group | None:
    match = _GROUP_PATTERN.fullmatch(text)
    if match is None:
        return None
    number, size, fill, colour, noun = match.groups()
    count = 1 if number == "an" else NUMBERS.index(number) + 1
    singular = noun if count == 1 else next((one for one, many in PLURALS.items() if many == noun), "")
    if singular not in PLURALS:
        return None
    return Group(count, size, fill, colour, None if singular == ANY_SHAPE else singular)


def _parse_scene(text: str) -> Scene | None:
    match = _SCENE_PATTERN.fullmatch(text)
    if match is None:
        return None
    phrases, joints = (_JOINT_PATTERN.split(match["groups"])[first::2] for first in (0, 1))
    groups = tuple(group for phrase in phrases if (group := _parse_group(phrase)) is not None)
    if len(groups) != len(phrases):
        return None
    relation = next((word for word in joints if word in RELATIONS), None)
    return Scene(groups, relation, match["pattern"], match["background"])


def parse(caption: str) -> Scene:
    """Read a caption.

    Raises:
        InputError: the text is no caption of this world, or one that no picture fits; unknown words are named.
    """
    caption = " ".join(caption.split())
    text = caption.lower()
    scene = _parse_scene(text)
    if scene is not None and scene.caption() == text:
        fault = impossible(scene)
        if fault is None:
            return scene
    else:
        strangers = unknown_words(caption)
        fault = f"unknown words: {', '.join(strangers)}" if strangers else "the words are known but their order is not"
    raise InputError(
        f"'{caption}' is no caption of the shapes world ({fault}); write for example "
        "'a large striped red star left of a small blue ring on a plain white background'"
    )


def impossible(scene: Scene) -> str | None:
    """Why no picture fits the scene, in words; None where one does."""
    if len(scene.groups) > MOST_GROUPS:
        return f"at most {MOST_GROUPS} groups of objects fit"
    if scene.number_of_objects > MOST_OBJECTS:
        return f"at most {MOST_OBJECTS} objects fit"
    if scene.relation is not None and [group.number for group in scene.groups] != [1, 1]:
        return f"'{scene.relation}' stands between two single objects"
    for group in scene.groups:
        if group.fill == "outlined" and group.shape in NEVER_OUTLINED:
            return f"no {group.shape} is outlined"
        if (scene.background, group.colour) in INVISIBLE:
            return f"{group.colour} is not seen on {scene.background}"
    if _density([_smallest_radius(group) for group in scene.groups for _ in range(group.number)]) > DENSEST:
        return "so many large objects do not fit"
    return None


def _smallest_radius(group: Group) -> float:
    return max(SIZES[group.size or "small"])


def _density(radii: Sequence[float]) -> float:
    return sum(np.pi * (radius + GAP / 2) ** 2 for radius in radii) / IMAGE_SIZE**2


# --------------------------------------------------------------------------------------------------------------------
# Drawing scenes at random

# How often a caption names an attribute, and a background its pattern and its colour.
NAMED = {"size": 0.6, "fill": 0.5, "colour": 0.8, "shape": 0.85, "pattern": 0.6, "background": 0.8}
RELATED = 0.6  # of the scenes of two single objects


def _parts(random: np.random.Generator, total: int) -> list[int]:
    """`total` objects shared out among one to three groups, in any order."""
    number = int(random.integers(1, min(total, MOST_GROUPS) + 1))
    borders = (
        np.sort(random.choice(np.arange(1, total), number - 1, replace=False)) if number > 1 else np.array([], int)
    )
    return np.diff([0, *borders, total]).tolist()


def _maybe(random: np.random.Generator, kind: str, names: Sequence[str]) -> str | None:
    return str(random.choice(names)) if random.random() < NAMED[kind] else None


def draw_scene(random: np.random.Generator, split: Split, number_of_objects: int) -> Scene:
    """Draw a possible scene of the split.

    A held-out scene names at least one held-out composition and none of the validation set; a validation scene
    likewise; so the three splits share no composition that only one of them may show.
    """
    while True:
        groups = []
        for number in _parts(random, number_of_objects):
            named = {kind: _maybe(random, kind, names) for kind, names in ATTRIBUTES.items()}
            groups.append(Group(number, **named))
        single = [group.number for group in groups] == [1, 1]
        relation = str(random.choice(list(RELATIONS))) if single and random.random() < RELATED else None
        pattern, background = (
            _maybe(random, "pattern", PATTERNS),
            _maybe(random, "background", list(BACKGROUNDS)),
        )
        scene = Scene(tuple(groups), relation, pattern, background)
        splits = {group.split() for group in groups}
        distinct = len({(group.size, group.fill, group.colour, group.shape) for group in groups}) == len(groups)
        if impossible(scene) is None and distinct and splits <= {"train", split} and (split in splits):
            return scene


def captions(
    split: Split, number: int, seed: int, numbers_of_objects: Sequence[int] = range(1, MOST_OBJECTS + 1)
) -> Iterator[str]:
    """Yield distinct captions of a split, the numbers of objects in turn; the same seed gives the same list.

    Raises:
        ValueError: the split does not hold so many; one held-out object makes some 2,000 captions, two make millions.
    """
    random = np.random.default_rng([seed, SPLITS.index(split)])
    seen: set[str] = set()
    for index in range(number):
        for _ in range(20_000):
            caption = draw_scene(random, split, numbers_of_objects[index % len(numbers_of_objects)]).caption()
            if caption not in seen:
                break
        else:
            raise ValueError(f"the {split} split has too few different captions for {number} of them")
        seen.add(caption)
        yield caption


def _decide_object(random: np.random.Generator, group: Group, background: str, roomy: bool) -> SceneObject:
    """An object of the group; what is not named is drawn so that no composition of another split appears by chance."""
    sizes = tuple(SIZES) if roomy else ("small",)
    while True:
        item = SceneObject(
            *(
                getattr(group, kind) or str(random.choice(names))
                for kind, names in (ATTRIBUTES | {"size": sizes}).items()
            )
        )
        visible = (background, item.colour) not in INVISIBLE
        known = not (item.fill == "outlined" and item.shape in NEVER_OUTLINED)
        if visible and known and (group.split() != "train" or item.split() == "train"):
            return item


def _place(random: np.random.Generator, radii: Sequence[float], direction: tuple[int, int] | None) -> np.ndarray | None:
    """Centres [N, 2] that keep the gaps, and for two objects the direction (from the second to the first); None where
    the first attempt at it does not succeed.
    """
    centres: list[np.ndarray] = []
    for radius in radii:
        for _ in range(60):
            centre = random.uniform(GAP + radius, IMAGE_SIZE - GAP - radius, 2)
            free = all(np.hypot(*(centre - c)) >= radius + r + GAP for c, r in zip(centres, radii, strict=False))
            if free and (not centres or direction is None or _stands(centres[0] - centre, direction, sum(radii))):
                centres.append(centre)
                break
        else:
            return None
    return np.array(centres)


def _stands(offset: np.ndarray, direction: tuple[int, int], radii: float) -> bool:
    """Whether an offset (x, y) lies clearly in a direction: by the objects' radii, and more along it than across."""
    along, across = offset @ np.array(direction), abs(offset @ np.array(direction[::-1]))
    return bool(along >= 0.9 * radii and along > 1.2 * across)


def imagine(scene: Scene, random: np.random.Generator) -> Picture:
    """Decide all that the caption leaves open."""
    background = scene.background
    while background is None:
        drawn = str(random.choice(list(BACKGROUNDS)))
        if all((drawn, group.colour) not in INVISIBLE for group in scene.groups):
            background = drawn
    pattern = scene.pattern or str(random.choice(PATTERNS))
    light = float(random.uniform(0, 2 * np.pi))
    direction = None if scene.relation is None else RELATIONS[scene.relation]
    members = [group for group in scene.groups for _ in range(group.number)]
    attempt = 0
    while True:
        # Unnamed sizes are free at first; where the objects do not fit, small.
        items = [_decide_object(random, group, background, attempt < 10) for group in members]
        radii = [float(random.uniform(*SIZES[item.size])) for item in items]
        order = np.argsort(radii)[::-1] if direction is None else np.arange(len(radii))  # large ones find a place first
        placed = _place(random, [radii[i] for i in order], direction) if _density(radii) <= DENSEST else None
        attempt += 1
        if placed is not None:
            break
    centres = placed[np.argsort(order)]
    placements = [
        Placement(float(x), float(y), radius, *random.uniform((-TILT, 0), (TILT, 2 * np.pi)).tolist())
        for (x, y), radius in zip(centres, radii, strict=True)
    ]
    return Picture(tuple(zip(items, placements, strict=True)), background, _tones(pattern, light, random), light)


# --------------------------------------------------------------------------------------------------------------------
# Backgrounds

_Y, _X = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5


def wave(angle: float | np.ndarray, period: float | np.ndarray) -> np.ndarray:
    """Phases [64, 64] (with the arguments' shape before it) of a plane wave, in radians, 0 at the corner."""
    angle, period = np.asarray(angle)[..., None, None], np.asarray(period)[..., None, None]
    return 2 * np.pi / period * (_X * np.cos(angle) + _Y * np.sin(angle))


STRIPE_PERIODS = (9.0, 15.0)  # pixels, of a background's stripes
CHECK_PERIODS = (15.0, 22.0)  # pixels: twice the side of a square
CLOUD_PERIODS = (12.0, 26.0)  # pixels


def _tones(pattern: str, light: float, random: np.random.Generator) -> np.ndarray:
    """A background [64, 64] between its two tones, 0 to 1, a little nearer to the second one towards the light."""
    slope = random.uniform(0.06, 0.16) * wave(light, 2 * np.pi * IMAGE_SIZE / 2)
    slope = slope - slope.mean()
    angle, first, second = random.uniform(0, 2 * np.pi, 3)
    if pattern == "plain":
        return np.clip(random.uniform(0.3, 0.7) + 1.6 * slope, 0, 1)
    if pattern == "striped":
        swing = np.tanh(1.6 * np.sin(wave(angle, random.uniform(*STRIPE_PERIODS)) + first)) / np.tanh(1.6)
    elif pattern == "checkered":
        period = random.uniform(*CHECK_PERIODS)
        squares = np.sin(wave(angle, period) + first) * np.sin(wave(angle + np.pi / 2, period) + second)
        swing = np.tanh(2.5 * squares) / np.tanh(2.5)
    else:
        swing = _clouds(random)
    return np.clip(0.5 + 0.4 * swing + slope, 0, 1)


def _clouds(random: np.random.Generator) -> np.ndarray:
    """A smooth random field [64, 64] whose waves have all directions and the periods `CLOUD_PERIODS`."""
    frequency = np.hypot(np.fft.fftfreq(IMAGE_SIZE)[:, None], np.fft.rfftfreq(IMAGE_SIZE))
    band = (frequency >= 1 / CLOUD_PERIODS[1]) & (frequency <= 1 / CLOUD_PERIODS[0])
    field = np.fft.irfft2(np.fft.rfft2(random.standard_normal((IMAGE_SIZE, IMAGE_SIZE))) * band)
    return np.tanh(1.1 * field / field.std())


# --------------------------------------------------------------------------------------------------------------------
# Shapes


def _regular(corners: int, inner: float, turn: float) -> np.ndarray:
    """Vertices [corners or 2*corners, 2] of a regular polygon (inner = 1) or star on the unit circle, the first one
    at the top.
    """
    number = corners if inner == 1.0 else 2 * corners
    angles = turn - np.pi / 2 + 2 * np.pi * np.arange(number) / number
    radius = np.where(np.arange(number) % 2 == 0, 1.0, inner)[:, None]
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    """Vertices [40, 2] of the classical heart curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t,
    scaled to radius 1.
    """
    t = 2 * np.pi * np.arange(40) / 40
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 16.5


def _cross(half_width: float) -> np.ndarray:
    """Vertices [12, 2] of an upright cross with arms of length 1."""
    w = half_width
    quarter = np.array([[w, -1.0], [w, -w], [1.0, -w]])
    turns = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in np.pi / 2 * np.arange(4)]
    return np.concatenate([quarter @ turn.T for turn in turns])


def _moon(inner: float, shift: float) -> np.ndarray:
    """Vertices [44, 2] of a crescent: the unit circle without a circle of radius `inner` about (shift, 0), moved so
    that its middle is the origin.
    """
    x = (1 - inner**2 + shift**2) / (2 * shift)  # where the circles meet
    outer_angle, inner_angle = np.arccos(x), np.arccos((x - shift) / inner)
    outer = np.linspace(outer_angle, 2 * np.pi - outer_angle, 24)
    back = np.linspace(2 * np.pi - inner_angle, inner_angle, 22)[1:-1]
    points = np.concatenate(
        [
            np.stack([np.cos(outer), np.sin(outer)], axis=1),
            np.stack([shift + inner * np.cos(back), inner * np.sin(back)], axis=1),
        ]
    )
    return 0.95 * (points + np.array([0.25, 0.0]))


POLYGONS: dict[str, np.ndarray] = {
    "square": 0.80 * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]),
    "triangle": _regular(3, 1.0, 0.0) * 1.05,
    "star": _regular(5, 0.44, 0.0) * 1.06,
    "cross": _cross(0.28),
    "heart": _heart(),
    "moon": _moon(0.84, 0.58),
}
# The rotation that brings a shape back onto itself; 0 for any.
SYMMETRY = {
    "circle": 0.0,
    "ring": 0.0,
    "square": np.pi / 2,
    "triangle": 2 * np.pi / 3,
    "star": 2 * np.pi / 5,
    "cross": np.pi / 2,
    "heart": 2 * np.pi,
    "moon": 2 * np.pi,
}


def _polygon_distance(x: np.ndarray, y: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Signed distance of the points (x, y), any shape, to a closed polygon [V, 2]; negative inside (even-odd rule)."""
    edges = np.roll(vertices, -1, axis=0) - vertices
    edge_x, edge_y = edges[:, :1], edges[:, 1:]  # [V, 1]
    offset_x, offset_y = x.ravel() - vertices[:, :1], y.ravel() - vertices[:, 1:]  # [V, P]
    position = np.clip((offset_x * edge_x + offset_y * edge_y) / (edge_x**2 + edge_y**2), 0.0, 1.0)
    squares = (offset_x - position * edge_x) ** 2 + (offset_y - position * edge_y) ** 2
    distance = np.sqrt(squares.min(axis=0))
    above = offset_y < 0
    crosses = above != np.roll(above, -1, axis=0)
    side = edge_x * offset_y - edge_y * offset_x
    inside = (crosses & ((side > 0) == (edge_y < 0))).sum(axis=0) % 2 == 1
    return np.where(inside, -distance, distance).reshape(x.shape)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape of radius 1 at the origin, negative inside; x and y of any equal
    shape, y downwards.
    """
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74) - 0.26
    return _polygon_distance(x, y, POLYGONS[shape])


def turned(x: np.ndarray, y: np.ndarray, angle: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets from an object's centre in the object's own frame, which is rotated by `angle` (clockwise as seen)."""
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def stripes(down: np.ndarray, phase: float | np.ndarray) -> np.ndarray:
    """Brightness of stripes at a height in an object's own frame, in pixels."""
    swing = np.clip(1.4 * np.sin(2 * np.pi * down / STRIPE_PERIOD + phase), -1, 1)
    return DARKENING + (1 - DARKENING) * (0.5 + 0.5 * swing)


def shading(across: np.ndarray, down: np.ndarray, radius: float, light: float | np.ndarray) -> np.ndarray:
    """Brightness of a shaded object at an offset from its centre (pixels, not rotated), under a light."""
    towards = (across * np.cos(light) + down * np.sin(light)) / radius
    return 1 - (1 - DARKENING) * np.clip(0.5 - 0.5 * towards, 0.0, 1.0)


def outline(distance: np.ndarray) -> np.ndarray:
    """From the signed distance of a shape to that of its outlined form, both in pixels."""
    return np.abs(distance + OUTLINE_WIDTH / 2) - OUTLINE_WIDTH / 2


def coverage_and_brightness(
    item: SceneObject, placement: Placement, light: float, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How far an object covers each pixel and how bright its colour is there, both in [0, 1].

    Args:
        item: the object; its colour does not matter here.
        placement: how it stands.
        light: where it comes from, radians.
        x: pixel centres, any shape.
        y: the same shape.
    """
    across, down = x - placement.x, y - placement.y
    own_x, own_y = turned(across, down, placement.angle)
    distance = placement.radius * signed_distance(item.shape, own_x / placement.radius, own_y / placement.radius)
    brightness = np.ones_like(distance)
    if item.fill == "outlined":
        distance = outline(distance)
    elif item.fill == "striped":
        brightness = stripes(own_y, placement.phase)
    elif item.fill == "shaded":
        brightness = shading(across, down, placement.radius, light)
    return np.clip(0.5 - distance, 0.0, 1.0), brightness


def draw(picture: Picture) -> np.ndarray:
    """Draw a picture: uint8 [64, 64, 3]."""
    first, second = np.array(BACKGROUNDS[picture.background], dtype=float)
    image = first + picture.tones[..., None] * (second - first)
    for item, placement in picture.items:
        reach = placement.radius * 1.2 + 2  # no shape reaches further
        left, top = (max(int(centre - reach), 0) for centre in (placement.x, placement.y))
        right, bottom = (int(centre + reach) + 1 for centre in (placement.x, placement.y))
        window = image[top:bottom, left:right]
        y, x = np.mgrid[top : top + window.shape[0], left : left + window.shape[1]] + 0.5
        coverage, brightness = coverage_and_brightness(item, placement, picture.light, x, y)
        colour = brightness[..., None] * np.array(COLOURS[item.colour])
        window += coverage[..., None] * (colour - window)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def render(scene: Scene, random: np.random.Generator) -> torch.Tensor:
    """Imagine and draw a scene: float32 [3, 64, 64] in [0, 1]."""
    return to_tensor(draw(imagine(scene, random)))


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [..., H, W, 3] to float32 [..., 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).movedim(-1, -3).float() / 255
