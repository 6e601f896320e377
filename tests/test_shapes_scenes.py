"""Scenes, captions, geometry and renderer of the shapes world."""

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from errors import InputError
from models.prompts import read_prompts
from models.shapes import scenes, write_prompts
from models.shapes.data import render_scenes
from models.shapes.scenes import Group, Placement, Scene, SceneObject
from models.shapes.tokenizer import CONTEXT_LENGTH, build_tokenizer

ROOT = Path(__file__).parents[1]
NUMBERS_OF_OBJECTS = range(1, scenes.MOST_OBJECTS + 1)
SEEDS = st.integers(0, 2**32)


def maybe(names):
    return st.none() | st.sampled_from(list(names))


GROUPS = st.builds(
    Group,
    number=st.sampled_from(NUMBERS_OF_OBJECTS),
    **{name: maybe(names) for name, names in scenes.ATTRIBUTES.items()},
)
ANY_SCENES = st.builds(
    Scene,
    groups=st.lists(GROUPS, min_size=1, max_size=4).map(tuple),
    relation=maybe(scenes.RELATIONS),
    pattern=maybe(scenes.PATTERNS),
    background=maybe(scenes.BACKGROUNDS),
).filter(lambda scene: len(scene.groups) > 1 or scene.relation is None)


@st.composite
def drawn_scenes(draw):
    random = np.random.default_rng(draw(SEEDS))
    return scenes.draw_scene(random, draw(st.sampled_from(scenes.SPLITS)), draw(st.sampled_from(NUMBERS_OF_OBJECTS)))


# --------------------------------------------------------------------------------------------------------------------
# Captions


@given(ANY_SCENES)
def test_a_caption_reads_back_as_its_scene_or_is_refused_with_the_reason(scene):
    reason = scenes.impossible(scene)
    if reason is None:
        assert scenes.parse(scene.caption()) == scene
    else:
        with pytest.raises(InputError) as caught:
            scenes.parse(scene.caption())
        assert f"({reason})" in str(caught.value)
    assert scenes.unknown_words(scene.caption()) == []


@pytest.mark.parametrize("number_of_objects", NUMBERS_OF_OBJECTS)
@pytest.mark.parametrize("split", scenes.SPLITS)
@given(seed=SEEDS)
@settings(max_examples=10)
def test_a_drawn_scene_is_of_its_split_and_number_and_reads_back(split, number_of_objects, seed):
    scene = scenes.draw_scene(np.random.default_rng(seed), split, number_of_objects)
    assert (scene.split(), scene.number_of_objects) == (split, number_of_objects)
    assert scenes.parse(scene.caption()) == scene


STAR = Group(1, "large", "striped", "red", "star")
RING = Group(1, "small", "plain", "blue", "ring")
HEARTS = Group(3, None, "outlined", "orange", "heart")


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene((STAR,), None, "plain", "white"), "a large striped red star on a plain white background"),
        (
            Scene((STAR, RING), "left of", None, "gray"),
            "a large striped red star left of a small plain blue ring on a gray background",
        ),
        (Scene((Group(6, "small", None, None, "cross"),), None, None, None), "six small crosses on a background"),
        (Scene((Group(2, None, None, None, None),), None, None, "navy"), "two shapes on a navy background"),
        (
            Scene((HEARTS, RING), None, "cloudy", None),
            "three outlined orange hearts and a small plain blue ring on a cloudy background",
        ),
        (
            Scene((Group(1, None, None, "orange", "moon"), STAR, HEARTS), None, "striped", "black"),
            "an orange moon, a large striped red star and three outlined orange hearts on a striped black background",
        ),
    ],
)
def test_known_captions(scene, caption):
    assert scene.caption() == caption
    assert scenes.parse(caption) == scene
    assert scenes.parse(f"  {caption.upper()}\n".replace(" ", "  ")) == scene


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a large red giraffe on a zebra background", "unknown words: giraffe, zebra"),
        ("red star large a on background white a", "their order is not"),
        ("a red star\non two\nbackgrounds", "a red star on two backgrounds"),
        ("", "their order is not"),
        ("a orange star on a background", "their order is not"),
        ("two star on a background", "their order is not"),
        ("a stars on a background", "their order is not"),
        ("a star and a ring and a cross on a background", "their order is not"),
        ("a star, a ring, a cross and a heart on a background", "at most 3 groups"),
        ("four stars and four rings on a background", "at most 7 objects"),
        ("four large stars on a background", "so many large objects do not fit"),
        ("three large stars and a ring on a background", "so many large objects do not fit"),
        ("two stars left of a ring on a background", "'left of' stands between two single objects"),
        ("a star, a cross below a ring on a background", "'below' stands between two single objects"),
        ("an outlined ring on a background", "no ring is outlined"),
        ("a blue star on a navy background", "blue is not seen on navy"),
    ],
)
def test_other_texts_are_refused_in_one_line_that_says_why(caption, message):
    with pytest.raises(InputError) as caught:
        scenes.parse(caption)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_seed_gives_the_same_distinct_captions():
    first = list(scenes.captions("heldout", 42, seed=3))
    assert first == list(scenes.captions("heldout", 42, seed=3))
    assert len(set(first)) == 42
    assert first != list(scenes.captions("heldout", 42, seed=4))
    assert [scenes.parse(text).number_of_objects for text in first] == 6 * [*NUMBERS_OF_OBJECTS]


@pytest.mark.slow
def test_the_prompt_files_are_those_that_their_command_writes(tmp_path):
    assert CliRunner().invoke(write_prompts.main, ["--output", str(tmp_path)]).exit_code == 0
    committed = ROOT / "src" / "prompts"
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in committed.glob("shapes_*.csv")}
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (committed / file.name).read_bytes()
    for split, number in write_prompts.NUMBERS.items():
        prompts = read_prompts(committed / f"shapes_{split}.csv")
        assert len(set(prompts)) == len(prompts) == number
        assert {scenes.parse(prompt).split() for prompt in prompts} == {split}


@pytest.mark.parametrize("file", ["README.md", "guide2.md", "quickstart.sh", "sample.py"])
def test_prompts_that_are_shown_to_people_are_captions(file):
    shown = re.findall(r'--prompt "([^"]+)"', (ROOT / file).read_text())
    assert shown
    for prompt in shown:
        scenes.parse(prompt)


# --------------------------------------------------------------------------------------------------------------------
# Splits


def test_each_fill_and_shape_holds_out_one_colour_of_eight():
    for fill in scenes.FILLS:
        for shape in scenes.SHAPES:
            splits = [SceneObject("small", fill, colour, shape).split() for colour in scenes.COLOURS]
            assert (splits.count("heldout"), splits.count("validation"), splits.count("train")) == (1, 1, 6)


def test_every_word_pair_is_seen_in_training():
    items = [
        SceneObject("small", fill, colour, shape)
        for fill in scenes.FILLS
        for colour in scenes.COLOURS
        for shape in scenes.SHAPES
    ]
    trained = [item for item in items if item.split() == "train"]
    for one, other in combinations(("fill", "colour", "shape"), 2):
        pairs = [{(getattr(item, one), getattr(item, other)) for item in some} for some in (trained, items)]
        assert pairs[0] == pairs[1]


@given(drawn_scenes(), SEEDS)
@settings(max_examples=200)
def test_splits_share_no_composition_in_what_is_drawn_either(scene, seed):
    picture = scenes.imagine(scene, np.random.default_rng(seed))
    groups = [group for group in scene.groups for _ in range(group.number)]
    for group, (item, _) in zip(groups, picture.items, strict=True):
        named = None not in (group.fill, group.colour, group.shape)
        assert item.split() == (group.split() if named else "train")
    assert {item.split() for item, _ in picture.items} <= {"train", scene.split()}
    assert scene.split() in {item.split() for item, _ in picture.items}


# --------------------------------------------------------------------------------------------------------------------
# What a caption leaves open


@given(ANY_SCENES.filter(lambda scene: scenes.impossible(scene) is None), SEEDS)
@settings(max_examples=200)
def test_what_is_imagined_shows_the_caption_and_keeps_sizes_gaps_and_relations(scene, seed):
    picture = scenes.imagine(scene, np.random.default_rng(seed))
    groups = [group for group in scene.groups for _ in range(group.number)]
    for group, (item, place) in zip(groups, picture.items, strict=True):
        assert group.admits(item)
        assert (picture.background, item.colour) not in scenes.INVISIBLE
        assert not (item.fill == "outlined" and item.shape in scenes.NEVER_OUTLINED)
        smallest, largest = scenes.SIZES[item.size]
        assert smallest <= place.radius <= largest
        for centre in (place.x, place.y):
            margin = scenes.GAP + place.radius
            assert margin <= centre <= scenes.IMAGE_SIZE - margin
    places = [place for _, place in picture.items]
    for one, other in combinations(places, 2):
        assert np.hypot(one.x - other.x, one.y - other.y) >= one.radius + other.radius + scenes.GAP
    if scene.relation is not None:
        first, second = places
        right, down = first.x - second.x, first.y - second.y
        along, across = {
            "left of": (-right, down),
            "right of": (right, down),
            "above": (-down, right),
            "below": (down, right),
        }[scene.relation]
        assert along >= 0.9 * (first.radius + second.radius)
        assert along > 1.2 * abs(across)
    assert picture.background == (scene.background or picture.background)
    assert picture.tones.min() >= 0
    assert picture.tones.max() <= 1


def test_the_split_rule_and_the_colours_leave_every_group_something_to_draw():
    """`imagine` draws until an object is allowed: for whatever a caption names, there must be one."""
    random = np.random.default_rng(0)
    for fill in (None, *scenes.FILLS):
        for colour in (None, *scenes.COLOURS):
            for shape in (None, *scenes.SHAPES):
                for background in scenes.BACKGROUNDS:
                    scene = Scene((Group(1, None, fill, colour, shape),), None, None, background)
                    if scenes.impossible(scene) is None:
                        scenes.imagine(scene, random)


def test_the_fullest_pictures_are_found_at_once():
    """Nothing that `impossible` lets pass may keep `imagine` searching: the most objects of each size, and mixtures."""
    random = np.random.default_rng(0)
    for large, small in [(3, 0), (2, 2), (1, 4), (0, 7)]:
        groups = [Group(number, size, None, None, None) for size, number in (("large", large), ("small", small))]
        scene = Scene(tuple(group for group in groups if group.number), None, None, None)
        assert scenes.impossible(scene) is None
        assert len(scenes.imagine(scene, random).items) == large + small


def peaks(tones, number):
    """The strongest waves in a background, each its angle (radians, modulo pi) and its period (pixels)."""
    y, x = np.mgrid[0:64, 0:64] + 0.5
    slope = np.stack([np.ones(64 * 64), x.ravel(), y.ravel()], axis=1)
    rest = tones.ravel() - slope @ np.linalg.lstsq(slope, tones.ravel(), rcond=None)[0]
    window = np.outer(np.hanning(64), np.hanning(64))
    power = np.abs(np.fft.fft2(rest.reshape(64, 64) * window, (512, 512)))[:, :257] ** 2
    down, across = np.fft.fftfreq(512)[:, None], np.arange(257)[None] / 512
    found = []
    for _ in range(number):
        row, column = np.unravel_index(power.argmax(), power.shape)
        near = np.hypot(down - down[row], across - across[0, column]) < 1.5 / 64
        mirrored = np.hypot(down + down[row], across + across[0, column]) < 1.5 / 64
        frequency = np.hypot(down[row, 0], across[0, column])
        found.append((np.arctan2(down[row, 0], across[0, column]) % np.pi, 1 / frequency))
        power = np.where(near | mirrored, 0.0, power)
    return found


def background_of(pattern, seed):
    return scenes.imagine(Scene((RING,), None, pattern, "gray"), np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(8))
def test_striped_backgrounds_hold_one_wave_of_the_stripes_period(seed):
    [(_, period)] = peaks(background_of("striped", seed).tones, 1)
    shortest, longest = scenes.STRIPE_PERIODS
    assert shortest - 0.5 < period < longest + 0.8


@pytest.mark.parametrize("seed", range(8))
def test_checkered_backgrounds_hold_two_waves_at_right_angles(seed):
    (first, period), (second, other) = peaks(background_of("checkered", seed).tones, 2)
    assert abs((first - second) % np.pi - np.pi / 2) < 0.12
    # sin a sin b = (cos(a - b) - cos(a + b)) / 2: the waves run along the diagonals of the squares.
    for found in (period, other):
        assert scenes.CHECK_PERIODS[0] - 0.8 < np.sqrt(2) * found < scenes.CHECK_PERIODS[1] + 1.2


@pytest.mark.parametrize("seed", range(4))
def test_cloudy_backgrounds_hold_waves_of_the_clouds_periods_in_all_directions(seed):
    tones = background_of("cloudy", seed).tones
    power = np.abs(np.fft.fft2(tones - tones.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64))
    band = (frequency >= 1 / scenes.CLOUD_PERIODS[1]) & (frequency <= 1 / scenes.CLOUD_PERIODS[0])
    assert power[band].sum() > 0.75 * power.sum()
    assert np.ptp([angle for angle, _ in peaks(tones, 6)]) > np.pi / 4


@pytest.mark.parametrize("seed", range(4))
def test_plain_backgrounds_are_a_slope_along_the_light(seed):
    picture = background_of("plain", seed)
    down, across = np.gradient(picture.tones)
    assert np.allclose(down, down[0, 0], atol=1e-9)
    assert np.allclose(across, across[0, 0], atol=1e-9)
    assert np.arctan2(down[0, 0], across[0, 0]) % (2 * np.pi) == pytest.approx(picture.light)


# --------------------------------------------------------------------------------------------------------------------
# Geometry

PIXEL_Y, PIXEL_X = np.mgrid[0:64, 0:64] + 0.5


def circles_common_area(one, other, apart):
    """Area that two circles of these radii, their centres this far apart, have in common."""
    first = np.arccos((apart**2 + one**2 - other**2) / (2 * apart * one))
    second = np.arccos((apart**2 + other**2 - one**2) / (2 * apart * other))
    kite = (-apart + one + other) * (apart + one - other) * (apart - one + other) * (apart + one + other)
    return one**2 * first + other**2 * second - 0.5 * np.sqrt(kite)


AREAS = {  # of shapes of radius 1, by elementary geometry
    "circle": np.pi,
    "ring": np.pi * (1.0**2 - 0.48**2),
    "square": 4 * 0.80**2,
    "triangle": 3 * np.sqrt(3) / 4 * 1.05**2,
    "star": 5 * 0.44 * np.sin(np.pi / 5) * 1.06**2,
    "cross": 2 * (2 * 0.56) - 0.56**2,  # two bars of 2 by 0.56 that share a square
    "heart": 180 * np.pi / 16.5**2,  # the curve's own area is 180 pi
    "moon": 0.95**2 * (np.pi - circles_common_area(1.0, 0.84, 0.58)),
}


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("angle", [0.0, 0.7, 4.0])
def test_drawn_areas_equal_geometry(shape, angle):
    item, radius = SceneObject("large", "plain", "red", shape), 12.0
    coverage, _ = scenes.coverage_and_brightness(item, Placement(31.7, 32.3, radius, angle), 0.0, PIXEL_X, PIXEL_Y)
    assert coverage.sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.02)


@pytest.mark.parametrize("shape", sorted(scenes.POLYGONS))
def test_the_signed_distance_is_that_to_the_nearest_point_of_the_outline(shape):
    corners = scenes.POLYGONS[shape]
    along = np.linspace(0, 1, 200)[:, None, None]
    outline = (corners + along * (np.roll(corners, -1, axis=0) - corners)).reshape(-1, 2)
    x, y = np.random.default_rng(0).uniform(-1.4, 1.4, (2, 300))
    nearest = np.hypot(x - outline[:, :1], y - outline[:, 1:]).min(axis=0)
    assert np.abs(scenes.signed_distance(shape, x, y)) == pytest.approx(nearest, abs=2e-3)


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_shapes_reach_no_further_than_what_is_drawn_of_them(shape):
    directions = np.linspace(0, 2 * np.pi, 720)
    assert np.all(scenes.signed_distance(shape, 1.2 * np.cos(directions), 1.2 * np.sin(directions)) > 0)


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_a_turn_by_its_symmetry_and_no_smaller_one_brings_a_shape_back_onto_itself(shape):
    x, y = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 400))

    def change(angle):
        return np.abs(
            scenes.signed_distance(shape, *scenes.turned(x, y, angle)) - scenes.signed_distance(shape, x, y)
        ).max()

    symmetry = scenes.SYMMETRY[shape] or 0.1
    assert change(symmetry) < 1e-9
    if scenes.SYMMETRY[shape]:
        assert change(symmetry / 2) > 0.1


def test_objects_turn_clockwise():
    moon = SceneObject("large", "plain", "red", "moon")  # open to the right
    coverage, _ = scenes.coverage_and_brightness(moon, Placement(32, 32, 12, np.pi / 2), 0.0, PIXEL_X, PIXEL_Y)
    assert coverage[:32].sum() > 1.5 * coverage[32:].sum()  # open downwards


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def test_pixels_are_the_colour_inside_and_the_background_outside():
    item = SceneObject("large", "plain", "red", "circle")
    tones = np.zeros((64, 64))
    tones[:, 40:] = 1.0
    image = scenes.draw(scenes.Picture(((item, Placement(32, 32, 12)),), "navy", tones, 0.0))
    assert tuple(image[32, 32]) == tuple(image[32, 42]) == scenes.COLOURS["red"]
    assert tuple(image[2, 2]) == scenes.BACKGROUNDS["navy"][0]
    assert tuple(image[32, 46]) == scenes.BACKGROUNDS["navy"][1]


def brightness_and_coverage_of(fill, light=0.0, **placement):
    place = Placement(32, 32, 12, **placement)
    item = SceneObject("large", fill, "red", "square")
    return scenes.coverage_and_brightness(item, place, light, PIXEL_X, PIXEL_Y)


def test_outlines_are_hollow_and_as_wide_as_they_should_be():
    coverage, brightness = brightness_and_coverage_of("outlined")
    assert coverage[32, 32] == 0
    assert coverage[32, 32:].sum() == pytest.approx(scenes.OUTLINE_WIDTH, abs=0.1)
    assert np.all(brightness == 1)


def test_stripes_have_their_period_and_move_by_a_phase_and_turn_with_the_object():
    down = np.arange(0, 20, 0.1)
    one_period = scenes.stripes(down + scenes.STRIPE_PERIOD, 0.0)
    assert scenes.stripes(down, 0.0) == pytest.approx(one_period)
    assert scenes.stripes(down, np.pi / 2) == pytest.approx(scenes.stripes(down + scenes.STRIPE_PERIOD / 4, 0.0))
    assert (scenes.stripes(down, 0.0).min(), scenes.stripes(down, 0.0).max()) == (scenes.DARKENING, 1.0)
    _, upright = brightness_and_coverage_of("striped")
    _, turned = brightness_and_coverage_of("striped", angle=np.pi / 2)
    assert np.ptp(upright[24:40, 32]) == pytest.approx(1 - scenes.DARKENING)
    assert np.ptp(upright[32, 24:40]) == pytest.approx(0)
    assert np.ptp(turned[32, 24:40]) == pytest.approx(1 - scenes.DARKENING)


@pytest.mark.parametrize("angle", [0.0, 1.0])
def test_shading_falls_away_from_the_light_however_the_object_is_turned(angle):
    _, shaded = brightness_and_coverage_of("shaded", light=np.pi / 2, angle=angle)  # from below
    assert np.all(np.diff(shaded[22:42, 32]) > 0)
    assert np.ptp(shaded[32, 22:42]) == pytest.approx(0)
    assert scenes.DARKENING <= shaded.min() < shaded.max() <= 1


def test_objects_are_tilted_by_up_to_15_degrees_and_to_either_side():
    scene = scenes.parse("seven small hearts on a background")
    pictures = (scenes.imagine(scene, np.random.default_rng(seed)) for seed in range(40))
    angles = np.degrees([place.angle for picture in pictures for _, place in picture.items])
    assert -15 <= angles.min() < -14.4
    assert 14.4 < angles.max() <= 15
    assert abs(angles.mean()) < 4 * 15 / np.sqrt(3 * len(angles))


def test_the_same_seed_gives_the_same_picture():
    scene = scenes.parse("a large striped red star and four shapes on a checkered background")
    one, again, other = (scenes.draw(scenes.imagine(scene, np.random.default_rng(seed))) for seed in (5, 5, 6))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert np.array_equal(
        scenes.render(scene, np.random.default_rng(5)).numpy(), one.transpose(2, 0, 1).astype(np.float32) / 255
    )


def test_pictures_are_those_that_the_models_were_trained_on():
    """Typed in from the scenes that the network saw: what changes here changes under weights that do not know of it."""
    first = render_scenes("train", 2, seed=1, progress=False)
    assert first.captions == [
        "two large striped pink stars on a beige background",
        "an outlined square below a small plain red cross on a striped black background",
    ]
    assert first.images.reshape(2, 4, 16, 4, 16, 3).mean(axis=(2, 4, 5)) == pytest.approx(
        np.array(
            [
                [
                    [205.0, 201.7, 196.8, 194.3],
                    [201.1, 198.4, 188.6, 191.2],
                    [187.1, 181.5, 175.2, 187.6],
                    [199.9, 200.5, 199.4, 194.5],
                ],
                [
                    [38.1, 37.7, 41.2, 43.2],
                    [39.8, 59.3, 38.1, 41.9],
                    [32.3, 48.1, 54.4, 39.9],
                    [29.5, 41.8, 50.1, 37.1],
                ],
            ]
        ),
        abs=0.3,
    )


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer


def test_every_word_is_one_token_and_the_longest_caption_fits():
    tokenizer = build_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 3 for word in scenes.vocabulary())
    group = Group(2, "small", "striped", "red", "star")
    longest = Scene((group, group, group), None, "plain", "white")
    related = Scene(2 * (replace(group, number=1),), "left of", "plain", "white")
    assert max(len(tokenizer(scene.caption()).input_ids) for scene in (longest, related)) == 24 <= CONTEXT_LENGTH
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert len(tokenizer("giraffe").input_ids) > 3


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds():
    shipped = CLIPTokenizer.from_pretrained(ROOT / "src/shapes/tokenizer")
    assert build_tokenizer().get_vocab() == shipped.get_vocab()
    caption = "a small cyan ring left of a large plain square on a navy background"
    assert build_tokenizer()(caption).input_ids == shipped(caption).input_ids
