"""Scenes, captions, geometry and renderer of the shapes world."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from errors import InputError
from models.shapes import scenes
from models.shapes.negatives import wrong_scene
from models.shapes.tokenizer import CONTEXT_LENGTH, build_tokenizer


@st.composite
def drawn_scenes(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    split = draw(st.sampled_from(scenes.SPLITS))
    return scenes.draw_scene(random, split, draw(st.sampled_from(scenes.SUPPORTED_NUMBERS_OF_OBJECTS)))


@given(drawn_scenes())
def test_a_caption_reads_back_as_its_scene(scene):
    assert scenes.parse(scene.caption()) == scene
    assert scenes.unknown_words(scene.caption()) == []


def test_known_captions():
    one = scenes.SceneObject("large", "striped", "red", "star")
    two = scenes.SceneObject("small", "plain", "blue", "ring")
    three = scenes.SceneObject("small", "outlined", "pink", "heart")
    assert scenes.parse("A large  striped red star on a white background") == scenes.Scene((one,), None, "white")
    assert scenes.Scene((one, two), "left of", "gray").caption() == (
        "a large striped red star left of a small blue ring on a gray background"
    )
    assert scenes.Scene((two, three, two), "from top to bottom", "navy").caption() == (
        "a small blue ring, a small outlined pink heart and a small blue ring from top to bottom on a navy background"
    )


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a large red giraffe on a zebra background", "unknown words: giraffe, zebra"),
        ("red star large a on background white a", "their order is not"),
        ("", "their order is not"),
    ],
)
def test_other_texts_are_refused_by_name(caption, message):
    with pytest.raises(InputError, match=message):
        scenes.parse(caption)


@given(drawn_scenes())
def test_splits_share_no_composition(scene):
    compositions = {item.split() for item in scene.objects}
    assert compositions <= {"train", scene.split()}


def test_each_fill_and_shape_holds_out_one_colour_of_eight():
    for fill in scenes.FILLS:
        for shape in scenes.SHAPES:
            splits = [scenes.SceneObject("small", fill, colour, shape).split() for colour in scenes.COLOURS]
            assert (splits.count("heldout"), splits.count("validation"), splits.count("train")) == (1, 1, 6)


def test_every_word_pair_is_seen_in_training():
    items = [
        scenes.SceneObject("small", fill, colour, shape)
        for fill in scenes.FILLS
        for colour in scenes.COLOURS
        for shape in scenes.SHAPES
    ]
    trained = [item for item in items if item.split() == "train"]
    assert {(item.fill, item.colour) for item in trained} == {(item.fill, item.colour) for item in items}
    assert {(item.colour, item.shape) for item in trained} == {(item.colour, item.shape) for item in items}
    assert {(item.fill, item.shape) for item in trained} == {(item.fill, item.shape) for item in items}


def test_the_same_seed_gives_the_same_distinct_captions():
    first = list(scenes.captions("heldout", 60, seed=3))
    assert first == list(scenes.captions("heldout", 60, seed=3))
    assert len(set(first)) == 60
    assert first != list(scenes.captions("heldout", 60, seed=4))
    assert [len(scenes.parse(text).objects) for text in first[:6]] == [1, 2, 3, 1, 2, 3]


@given(drawn_scenes(), st.integers(0, 2**32))
def test_objects_keep_their_gaps_order_and_size(scene, seed):
    placements = scenes.place(scene, np.random.default_rng(seed))
    x_direction, y_direction = scene.direction()
    for item, placement in zip(scene.objects, placements, strict=True):
        smallest, largest = scenes.SIZES[item.size]
        assert smallest <= placement.radius <= largest
        for centre in (placement.x, placement.y):
            assert scenes.GAP + placement.radius <= centre + 1e-9
            assert centre <= scenes.IMAGE_SIZE - scenes.GAP - placement.radius + 1e-9
    for one, other in pairwise(placements):
        forward = x_direction * (other.x - one.x) + y_direction * (other.y - one.y)
        assert forward >= one.radius + other.radius + scenes.GAP - 1e-9


AREAS = {  # of shapes of radius 1, by elementary geometry
    "circle": np.pi,
    "ring": np.pi * (1.0**2 - 0.52**2),
    "square": 4 * 0.86**2,
    "diamond": 2 * 1.0 * 0.72,
    "triangle": 3 * np.sqrt(3) / 4 * 1.08**2,
    "star": 5 * 0.42 * np.sin(np.pi / 5) * 1.05**2,
    "cross": 2 * (2 * 0.56) - 0.56**2,  # two bars of 2 by 0.56 that share a square
}


@pytest.mark.parametrize("shape", sorted(AREAS))
def test_drawn_areas_equal_geometry(shape):
    radius = 12.0
    y, x = np.mgrid[0:64, 0:64] + 0.5
    item = scenes.SceneObject("large", "plain", "red", shape)
    coverage, _ = scenes.coverage_and_brightness(item, scenes.Placement(31.7, 32.3, radius), x, y)
    assert coverage.sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.02)


def test_circle_pixels_are_the_colour_inside_and_the_background_outside():
    scene = scenes.parse("a large red circle on a navy background")
    image = scenes.draw(scene, [scenes.Placement(32, 32, 12)])
    assert tuple(image[32, 32]) == scenes.COLOURS["red"]
    assert tuple(image[32, 42]) == scenes.COLOURS["red"]
    assert tuple(image[32, 46]) == scenes.BACKGROUNDS["navy"]
    assert tuple(image[2, 2]) == scenes.BACKGROUNDS["navy"]


def test_fills_differ_as_they_say():
    y, x = np.mgrid[0:64, 0:64] + 0.5
    placement = scenes.Placement(32, 32, 12)

    def drawn(fill):
        return scenes.coverage_and_brightness(scenes.SceneObject("large", fill, "red", "square"), placement, x, y)

    outlined, _ = drawn("outlined")
    assert outlined[32, 32] == 0
    assert outlined[32, 32 + round(0.86 * 12) - 1] > 0.5
    _, striped = drawn("striped")
    assert set(np.unique(striped[24:40, 32])) >= {scenes.DARKENING, 1.0}
    _, shaded = drawn("shaded")
    assert np.all(np.diff(shaded[22:42, 32]) < 0)


@given(drawn_scenes(), st.integers(0, 2**32))
@settings(max_examples=50)
def test_wrong_scenes_differ_and_can_be_written_down(scene, seed):
    wrong = wrong_scene(scene, np.random.default_rng(seed))
    assert wrong != scene
    assert scenes.parse(wrong.caption()) == wrong
    assert len(wrong.objects) == len(scene.objects)


def test_every_word_is_one_token_and_the_longest_caption_fits():
    tokenizer = build_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 3 for word in scenes.vocabulary())
    item = scenes.SceneObject("small", "striped", "red", "star")
    longest = scenes.Scene((item, item, item), "from left to right", "white").caption()
    assert len(tokenizer(longest).input_ids) <= CONTEXT_LENGTH
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert len(tokenizer("giraffe").input_ids) > 3


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds():
    shipped = CLIPTokenizer.from_pretrained(Path(__file__).parents[1] / "src/shapes/tokenizer")
    assert build_tokenizer().get_vocab() == shipped.get_vocab()
    caption = "a small cyan ring left of a large gray square on a navy background"
    assert build_tokenizer()(caption).input_ids == shipped(caption).input_ids
