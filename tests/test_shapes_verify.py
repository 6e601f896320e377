"""The exact verifier of the shapes world."""

import numpy as np
import pytest
import torch

from models.shapes import scenes
from models.shapes.negatives import CORRUPTIONS, worse_images, wrong_scene
from models.shapes.verify import connected_regions, explain, find_objects, found_background, verify


def drawn(seed, number_of_objects, split="heldout"):
    random = np.random.default_rng(seed)
    scene = scenes.draw_scene(random, split, number_of_objects)
    return scene, scenes.render(scene, random), random


@pytest.mark.parametrize("number_of_objects", scenes.SUPPORTED_NUMBERS_OF_OBJECTS)
def test_true_captions_hold_in_every_part(number_of_objects):
    for seed in range(20):
        scene, image, _ = drawn(seed, number_of_objects)
        verdict = verify(image, scene.caption())
        assert verdict.correct, (scene.caption(), verdict.parts)
        assert verdict.score == 1.0
        assert len(verdict.parts) == 2 + 4 * number_of_objects + (number_of_objects > 1)


def test_wrong_captions_fail():
    for seed in range(30):
        scene, image, random = drawn(seed, 1 + seed % 3)
        wrong = wrong_scene(scene, random)
        # Exchanging equals is the one change that leaves a true caption, when the order of naming turns round with it.
        if {*wrong.objects} == {*scene.objects} and wrong.relation != scene.relation and len(scene.objects) == 2:
            continue
        assert not verify(image, wrong.caption()).correct, (scene.caption(), wrong.caption())


def test_one_wrong_attribute_is_named():
    image = scenes.render(scenes.parse("a large red star on a white background"), np.random.default_rng(0))
    parts = verify(image, "a large blue star on a white background").parts
    assert [name for name, holds in parts.items() if not holds] == ["object 1 colour"]
    parts = verify(image, "a large red star on a gray background").parts
    assert [name for name, holds in parts.items() if not holds] == ["background"]


def test_a_reversed_relation_fails_and_nothing_else():
    scene = scenes.parse("a large red star left of a small blue ring on a white background")
    image = scenes.render(scene, np.random.default_rng(0))
    parts = verify(image, "a large red star right of a small blue ring on a white background").parts
    assert [name for name, holds in parts.items() if not holds] == ["relation"]
    assert verify(image, "a small blue ring right of a large red star on a white background").correct


def test_a_missing_and_a_surplus_object_are_counted():
    one = scenes.parse("a large red star on a white background")
    two = scenes.parse("a large red star left of a small blue ring on a white background")
    random = np.random.default_rng(0)
    assert not verify(scenes.render(two, random), one.caption()).parts["count"]
    verdict = verify(scenes.render(one, random), two.caption())
    assert not verdict.parts["count"]
    assert not verdict.parts["relation"]
    assert verdict.parts["object 1 shape"]


@pytest.mark.parametrize("image", [torch.ones(3, 64, 64), torch.rand(3, 64, 64), torch.full((3, 64, 64), float("nan"))])
def test_images_without_objects_are_wrong_but_no_fault(image):
    assert not verify(image, "a large red star on a white background").correct


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="64"):
        find_objects(torch.zeros(3, 32, 32))


def test_regions_are_connected_in_eight_directions_and_joined_where_boxes_overlap():
    mask = np.zeros((12, 12), dtype=bool)
    mask[1, 1] = mask[2, 2] = True  # a diagonal pair: one region
    mask[5:10, 5] = mask[5:10, 9] = mask[5, 5:10] = True  # an arch...
    mask[8, 7] = True  # ...and a pixel inside its box
    mask[1, 10] = True
    assert sorted(int(region.sum()) for region in connected_regions(mask)) == [1, 2, 14]
    assert connected_regions(np.zeros((4, 4), dtype=bool)) == []


@pytest.mark.parametrize("height", range(6))
def test_stripes_are_stripes_at_any_height(height):
    placement, background = scenes.Placement(30.0, 33.0, 11.0), np.array(scenes.BACKGROUNDS["gray"], dtype=float)
    y, x = np.mgrid[:64, :64] + 0.5
    across, down = x - placement.x, y - placement.y
    distance = placement.radius * scenes.signed_distance("heart", across / placement.radius, down / placement.radius)
    coverage, brightness = scenes.filled("striped", placement.radius, distance, down + height)
    colour = brightness[..., None] * np.array(scenes.COLOURS["orange"])
    image = torch.from_numpy((background + coverage[..., None] * (colour - background)) / 255).movedim(-1, 0)
    assert verify(image, "a large striped orange heart on a gray background").correct
    for fill in ("", "shaded "):
        assert not verify(image, f"a large {fill}orange heart on a gray background").parts["object 1 fill"]


@pytest.mark.parametrize("fill", scenes.FILLS)
def test_the_misfit_is_the_root_mean_square_difference_to_the_drawing(fill):
    scene = scenes.Scene((scenes.SceneObject("large", fill, "cyan", "heart"),), None, "beige")
    random = np.random.default_rng(4)
    pixels = scenes.draw(scene, scenes.place(scene, random)) + 8 * random.standard_normal((64, 64, 3))
    _, background = found_background(pixels)
    region = np.abs(pixels - background).max(axis=-1) > 60
    found = explain(pixels, region, background)
    assert found.item == scene.objects[0]
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    window = np.s_[rows[0] - 2 : rows[-1] + 3, columns[0] - 2 : columns[-1] + 3]
    y, x = (np.mgrid[:64, :64] + 0.5)[:, *window]
    coverage, brightness = scenes.coverage_and_brightness(found.item, found.placement, x, y)
    colour = brightness[..., None] * np.array(scenes.COLOURS["cyan"])
    drawing = background + coverage[..., None] * (colour - background)
    assert found.misfit == pytest.approx(np.sqrt(np.mean((pixels[window] - drawing) ** 2)), rel=1e-9)


def test_an_object_swallows_the_specks_in_its_box_and_no_others():
    specks = np.zeros((64, 64), dtype=bool)
    specks[::4, ::4] = True  # 256 regions of one pixel
    specks[10:40, 5] = specks[40, 5:30] = True  # a hook whose box holds many
    regions = connected_regions(specks)
    assert np.array_equal(np.sum(regions, axis=0), specks)
    whole = np.zeros_like(specks)
    whole[10:41, 4:30] = specks[10:41, 4:30]  # those of column 4 touch the hook
    assert np.array_equal(regions[0], whole)
    assert {int(region.sum()) for region in regions[1:]} == {1}


@pytest.mark.parametrize("kind", range(len(CORRUPTIONS)), ids=[f.__name__ for f in CORRUPTIONS])
def test_heavier_corruption_goes_further_from_the_image(kind):
    images = torch.stack([drawn(seed, 2)[1] for seed in range(8)])
    others = images.roll(1, dims=0)

    def distance(severity):
        generator = torch.Generator().manual_seed(0)
        numbers = torch.full((8,), kind)
        worse = worse_images(images, torch.full((8,), severity), numbers, others, generator)
        assert worse.min() >= 0
        assert worse.max() <= 1
        return float((worse - images).square().mean())

    assert 0 < distance(0.0) < distance(0.5) < distance(1.0)
