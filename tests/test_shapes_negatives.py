"""Captions that are wrong for a scene, and images that are worse than it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from models.shapes import scenes
from models.shapes.negatives import CHANGES, CORRUPTIONS, contradicts, worse_images, wrong_scene


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a red star on a background", "a blue star on a background", True),
        ("a red star on a background", "a star on a background", False),
        ("a red star on a background", "a small red star on a background", False),
        ("a red star on a background", "two red stars on a background", True),
        ("a red star on a background", "a red star on a black background", False),
        ("a red star on a white background", "a red star on a black background", True),
        ("a red star on a plain background", "a red star on a cloudy background", True),
        # The order of naming means nothing, and what is open may be what the other caption says.
        ("a red star and a blue ring on a background", "a blue ring and a red star on a background", False),
        ("a red star and a ring on a background", "a star and a red ring on a background", False),
        ("a red star and a blue ring on a background", "a blue star and a red ring on a background", True),
        ("two red stars and a blue ring on a background", "a red star and two blue rings on a background", True),
        ("two red stars and a shape on a background", "a star and two red shapes on a background", False),
        ("a red star left of a ring on a background", "a red star right of a ring on a background", True),
        ("a red star left of a ring on a background", "a ring right of a red star on a background", False),
        ("a red star left of a ring on a background", "a ring left of a red star on a background", True),
        ("a red star left of a ring on a background", "a red star above a ring on a background", True),
        ("a star left of a red shape on a background", "a star right of a red shape on a background", False),
        ("a star left of a ring on a background", "a ring and a star on a background", False),
    ],
)
def test_known_contradictions(one, other, expected):
    assert contradicts(scenes.parse(one), scenes.parse(other)) is expected
    assert contradicts(scenes.parse(other), scenes.parse(one)) is expected


def shows(picture, scene):
    """Whether a picture, whose pattern is not looked at, shows a scene: by trying its objects out."""
    groups = [group for group in scene.groups for _ in range(group.number)]
    items = [item for item, _ in picture.items]
    if len(groups) != len(items) or scene.background not in (None, picture.background):
        return False
    admitted = np.array([[group.admits(item) for item in items] for group in groups])
    if scene.relation is None:
        return admitted[linear_sum_assignment(admitted, maximize=True)].all()
    x, y = scenes.RELATIONS[scene.relation]
    right, down = (getattr(picture.items[0][1], axis) - getattr(picture.items[1][1], axis) for axis in ("x", "y"))
    along = x * right + y * down
    clear = abs(along) > abs(y * right + x * down)
    return clear and bool(
        (along > 0 and admitted[0, 0] and admitted[1, 1]) or (along < 0 and admitted[0, 1] and admitted[1, 0])
    )


@given(st.integers(0, 2**32), st.sampled_from(scenes.SPLITS), st.integers(1, scenes.MOST_OBJECTS))
@settings(max_examples=100)
def test_wrong_scenes_are_captions_of_their_split_that_no_picture_of_the_right_one_shows(seed, split, number):
    random = np.random.default_rng(seed)
    scene = scenes.draw_scene(random, split, number)
    wrong = wrong_scene(scene, random)
    assert scenes.parse(wrong.caption()) == wrong
    assert wrong.split() in ("train", split)
    for _ in range(3):
        picture = scenes.imagine(scene, random)
        assert shows(picture, scene)
        assert wrong.pattern not in (None, scene.pattern) or not shows(picture, wrong)


@pytest.mark.parametrize("change", dict.fromkeys(CHANGES), ids=lambda change: change.__name__)
def test_every_kind_of_change_occurs_and_leaves_the_rest(change):
    random = np.random.default_rng(0)
    drawn = [scenes.draw_scene(random, "train", 2 + number % 3) for number in range(100)]
    changed = [change(scene, random) for scene in drawn]
    differing = [(one, other) for one, other in zip(drawn, changed, strict=True) if one != other]
    assert len(differing) > 5
    kept = {"relation", "pattern", "background"} - {change.__name__.removeprefix("change_")}
    assert all(getattr(one, name) == getattr(other, name) for one, other in differing for name in kept)
    if change.__name__ in ("change_relation", "change_pattern", "change_background"):
        assert all(one.groups == other.groups for one, other in differing)


@pytest.mark.parametrize("kind", range(len(CORRUPTIONS)), ids=[f.__name__ for f in CORRUPTIONS])
def test_heavier_corruption_goes_further_from_the_image(kind):
    random = np.random.default_rng(0)
    images = torch.stack([scenes.render(scenes.draw_scene(random, "train", 2), random) for _ in range(8)])

    def distance(severity):
        severities, kinds = torch.full((8,), severity), torch.full((8,), kind)
        worse = worse_images(images, severities, kinds, images.roll(1, dims=0), torch.Generator().manual_seed(0))
        assert worse.min() >= 0
        assert worse.max() <= 1
        return float((worse - images).square().mean())

    assert 0 < distance(0.0) < distance(0.5) < distance(1.0)
