"""Scenes as data: their captions, their geometry, an antialiased renderer, and the split into train, validation and
held-out.

A scene is one to three objects, each with a size, a fill, a colour and a shape, on a plain background. Two objects
stand in a relation, three in a row or a column. The caption says all of it, in one grammar:

    a large striped red star on a white background
    a small blue ring left of a large shaded green heart on a gray background
    a small red cross, a small outlined pink star and a small cyan ring from top to bottom on a navy background

`parse` and `Scene.caption` are inverse to each other. What the caption leaves open (where the objects stand exactly,
and their radius within the size class) is drawn by `place`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch

from errors import InputError

IMAGE_SIZE = 64  # pixels, height and width
SUPPORTED_NUMBERS_OF_OBJECTS = (1, 2, 3)
OUTLINE_WIDTH = 2.4  # pixels
STRIPE_PERIOD = 6.0  # pixels: one bright and one dark stripe
DARKENING = 0.45  # of the dark stripes, and of the lower end of a shaded object
GAP = 3.0  # pixels between two objects, and between an object and the border

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
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
    "beige": (225, 205, 170),
    "navy": (20, 30, 80),
}
SIZES: dict[str, tuple[float, float]] = {"small": (7.2, 8.4), "large": (11.5, 13.0)}  # radius in pixels
FILLS = ("plain", "striped", "outlined", "shaded")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
NEVER_OUTLINED = ("circle", "ring", "cross")  # an outlined circle is a ring; the others' outlines would run together
RELATIONS: dict[str, tuple[int, int]] = {  # direction from the second object to the first: (x, y), y downwards
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
ARRANGEMENTS: dict[str, tuple[int, int]] = {"from left to right": (1, 0), "from top to bottom": (0, 1)}
# Dark parts of these colours would vanish into the background.
INVISIBLE = {("navy", "blue"), ("navy", "purple"), ("beige", "orange"), ("beige", "yellow"), ("white", "yellow")}

Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")


@dataclass(frozen=True)
class SceneObject:
    """One object: names out of `SIZES`, `FILLS`, `COLOURS` and `SHAPES`."""

    size: str
    fill: str
    colour: str
    shape: str

    def phrase(self) -> str:
        """The words for this object, without its article; a plain fill is not named."""
        words = (self.size, "" if self.fill == "plain" else self.fill, self.colour, self.shape)
        return " ".join(word for word in words if word)

    def split(self) -> Split:
        """The part of the world that this composition of fill, colour and shape belongs to: a rule, never chance.

        For each fill and shape, one colour of eight is held out and one is for validation, so that every pair of words
        is seen in training.
        """
        code = list(COLOURS).index(self.colour) + 3 * SHAPES.index(self.shape) + 2 * FILLS.index(self.fill)
        residue = code % len(COLOURS)
        return "heldout" if residue == 0 else "validation" if residue == 1 else "train"


@dataclass(frozen=True)
class Scene:
    """One to three objects, how they stand to each other (None for one object) and the background's name."""

    objects: tuple[SceneObject, ...]
    relation: str | None
    background: str

    def caption(self) -> str:
        """The caption of this scene; `parse` reads it back."""
        phrases = [f"a {item.phrase()}" for item in self.objects]
        if len(phrases) == 1:
            text = phrases[0]
        elif len(phrases) == 2:
            text = f"{phrases[0]} {self.relation} {phrases[1]}"
        else:
            text = f"{', '.join(phrases[:-1])} and {phrases[-1]} {self.relation}"
        return f"{text} on a {self.background} background"

    def split(self) -> Split:
        """held-out or validation where any object is; held-out has precedence."""
        splits = {item.split() for item in self.objects}
        return "heldout" if "heldout" in splits else "validation" if "validation" in splits else "train"

    def is_visible(self) -> bool:
        """Whether every object differs from the background, and none is of a kind that cannot be told from another."""
        hidden = any((self.background, item.colour) in INVISIBLE for item in self.objects)
        ambiguous = any(item.fill == "outlined" and item.shape in NEVER_OUTLINED for item in self.objects)
        return not hidden and not ambiguous

    def direction(self) -> tuple[int, int]:
        """The direction (x, y) from each object to the next one; (0, 0) for a single object."""
        if len(self.objects) == 1 or self.relation is None:
            return (0, 0)
        if len(self.objects) == 2:
            x, y = RELATIONS[self.relation]
            return (-x, -y)
        return ARRANGEMENTS[self.relation]


@dataclass(frozen=True)
class Placement:
    """Where one object stands: centre x and y (pixels, y downwards) and radius (pixels)."""

    x: float
    y: float
    radius: float


@cache
def vocabulary() -> frozenset[str]:
    """Every word (and the comma) that a caption can hold."""
    phrases = [
        *COLOURS,
        *BACKGROUNDS,
        *SIZES,
        *FILLS,
        *SHAPES,
        *RELATIONS,
        *ARRANGEMENTS,
        "a",
        "on",
        "and",
        "background",
        ",",
    ]
    return frozenset(word for phrase in phrases for word in phrase.split()) - {"plain"}


def words(prompt: str) -> list[str]:
    """Lower-case words and punctuation marks of a prompt, in order."""
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", prompt.lower())


def unknown_words(prompt: str) -> list[str]:
    """Words of the prompt that no caption of this world holds, in order of appearance, each once."""
    return list(dict.fromkeys(word for word in words(prompt) if word not in vocabulary()))


def _alternatives(names: Sequence[str]) -> str:
    return "|".join(names)


_OBJECT = (
    rf"a ({_alternatives(list(SIZES))})(?: ({_alternatives(FILLS[1:])}))? "
    rf"({_alternatives(list(COLOURS))}) ({_alternatives(SHAPES)})"
)
_END = rf" on a ({_alternatives(list(BACKGROUNDS))}) background"
_PATTERNS = {
    1: re.compile(_OBJECT + _END),
    2: re.compile(rf"{_OBJECT} ({_alternatives(list(RELATIONS))}) {_OBJECT}{_END}"),
    3: re.compile(rf"{_OBJECT}, {_OBJECT} and {_OBJECT} ({_alternatives(list(ARRANGEMENTS))}){_END}"),
}


def parse(caption: str) -> Scene:
    """Read a caption.

    Raises:
        InputError: the text is no caption of this world; unknown words are named.
    """
    text = " ".join(caption.lower().split())
    for number, pattern in _PATTERNS.items():
        match = pattern.fullmatch(text)
        if match is None:
            continue
        groups = list(match.groups())
        background = groups.pop()
        relation = groups.pop(4) if number == 2 else groups.pop() if number == 3 else None
        objects = tuple(
            SceneObject(size, fill or "plain", colour, shape)
            for size, fill, colour, shape in (groups[start : start + 4] for start in range(0, 4 * number, 4))
        )
        return Scene(objects, relation, background)
    strangers = unknown_words(caption)
    reason = f"unknown words: {', '.join(strangers)}" if strangers else "the words are known but their order is not"
    raise InputError(
        f"'{caption}' is no caption of the shapes world ({reason}); write for example "
        "'a large striped red star left of a small blue ring on a white background'"
    )


def draw_scene(random: np.random.Generator, split: Split, number_of_objects: int) -> Scene:
    """Draw a visible scene of the split. Scenes of three hold small objects only, for they would not fit otherwise.

    A held-out scene has at least one held-out object and no object of the validation set; a validation scene likewise;
    so the three splits share no composition that only one of them may show.
    """
    while True:
        sizes = ["small"] if number_of_objects == 3 else list(SIZES)
        objects = tuple(
            SceneObject(
                str(random.choice(sizes)),
                str(random.choice(FILLS)),
                str(random.choice(list(COLOURS))),
                str(random.choice(SHAPES)),
            )
            for _ in range(number_of_objects)
        )
        relations = {1: [None], 2: list(RELATIONS), 3: list(ARRANGEMENTS)}[number_of_objects]
        scene = Scene(objects, relations[random.integers(len(relations))], str(random.choice(list(BACKGROUNDS))))
        splits = {item.split() for item in objects}
        if (
            scene.is_visible()
            and len(set(objects)) == number_of_objects
            and split in splits
            and splits <= {"train", split}
        ):
            return scene


def captions(
    split: Split, number: int, seed: int, numbers_of_objects: Sequence[int] = SUPPORTED_NUMBERS_OF_OBJECTS
) -> Iterator[str]:
    """Yield distinct captions of a split, the numbers of objects in turn; the same seed gives the same list.

    Raises:
        ValueError: the split does not hold so many; one held-out object makes some 250 captions, two make a million.
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


def place(scene: Scene, random: np.random.Generator) -> tuple[Placement, ...]:
    """Draw radii and centres that keep the gaps and the scene's relation. Along the relation's direction the objects
    follow one another; across it each is free.
    """
    radii = [float(random.uniform(*SIZES[item.size])) for item in scene.objects]
    x_direction, y_direction = scene.direction()
    forward = x_direction + y_direction >= 0
    ordered = radii if forward else radii[::-1]
    free = IMAGE_SIZE - 2 * sum(radii) - GAP * (len(radii) + 1)
    # Share the free length out among the spaces before, between and after the objects.
    shares = random.dirichlet(np.ones(len(radii) + 1)) * free
    along, cursor = [], 0.0
    for radius, share in zip(ordered, shares, strict=False):
        cursor += GAP + share + radius
        along.append(cursor)
        cursor += radius
    along = along if forward else along[::-1]
    across = [float(random.uniform(GAP + radius, IMAGE_SIZE - GAP - radius)) for radius in radii]
    if y_direction:
        return tuple(Placement(x, y, radius) for x, y, radius in zip(across, along, radii, strict=True))
    return tuple(Placement(x, y, radius) for x, y, radius in zip(along, across, radii, strict=True))


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


POLYGONS: dict[str, np.ndarray] = {
    "square": 0.86 * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]),
    "triangle": _regular(3, 1.0, 0.0) * 1.08 + np.array([0.0, 0.2]),
    "diamond": np.array([[0.0, -1.0], [0.72, 0.0], [0.0, 1.0], [-0.72, 0.0]]),
    "star": _regular(5, 0.42, 0.0) * 1.05,
    "cross": _cross(0.28),
    "heart": _heart(),
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
        return np.abs(np.hypot(x, y) - 0.76) - 0.24
    return _polygon_distance(x, y, POLYGONS[shape])


def coverage_and_brightness(
    item: SceneObject, placement: Placement, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How far an object covers each pixel and how bright its colour is there, both in [0, 1].

    Args:
        item: the object; its colour does not matter here.
        placement: where it stands.
        x: pixel centres, any shape.
        y: the same shape.
    """
    across, down = x - placement.x, y - placement.y
    distance = placement.radius * signed_distance(item.shape, across / placement.radius, down / placement.radius)
    return filled(item.fill, placement.radius, distance, down)


def filled(fill: str, radius: float, distance: np.ndarray, down: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`coverage_and_brightness` from the signed distance to the outline and the height below the centre, in pixels."""
    brightness = np.ones_like(distance)
    if fill == "outlined":
        distance = np.abs(distance + OUTLINE_WIDTH / 2) - OUTLINE_WIDTH / 2
    elif fill == "striped":
        # Distance to the nearest bright stripe's edge, in pixels, softened over one pixel.
        phase = np.abs((down / STRIPE_PERIOD + 0.25) % 1.0 - 0.5) * STRIPE_PERIOD - STRIPE_PERIOD / 4
        brightness = DARKENING + (1 - DARKENING) * np.clip(0.5 + phase, 0.0, 1.0)
    elif fill == "shaded":
        brightness = 1 - (1 - DARKENING) * np.clip(0.5 + down / (2 * radius), 0.0, 1.0)
    return np.clip(0.5 - distance, 0.0, 1.0), brightness


def draw(scene: Scene, placements: Sequence[Placement]) -> np.ndarray:
    """Draw a scene: uint8 [64, 64, 3]."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3))
    image[:] = BACKGROUNDS[scene.background]
    for item, placement in zip(scene.objects, placements, strict=True):
        reach = placement.radius * 1.2 + 2  # no shape reaches further
        left, top = (max(int(centre - reach), 0) for centre in (placement.x, placement.y))
        right, bottom = (int(centre + reach) + 1 for centre in (placement.x, placement.y))
        window = image[top:bottom, left:right]
        y, x = np.mgrid[top : top + window.shape[0], left : left + window.shape[1]] + 0.5
        coverage, brightness = coverage_and_brightness(item, placement, x, y)
        colour = brightness[..., None] * np.array(COLOURS[item.colour])
        window += coverage[..., None] * (colour - window)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def render(scene: Scene, random: np.random.Generator) -> torch.Tensor:
    """Place and draw a scene: float32 [3, 64, 64] in [0, 1]."""
    return to_tensor(draw(scene, place(scene, random)))


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [..., H, W, 3] to float32 [..., 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).movedim(-1, -3).float() / 255
