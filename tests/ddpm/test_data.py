from __future__ import annotations

import struct
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from errors import InputError
from training.ddpm.data import augmented, faded, read_folder, render_images, shares, to_unit, under_noise

KEY, SIZE = "path.real_img", (8, 8)
ORIENTATION, RESOLUTION_UNIT = 0x0112, 0x0128  # EXIF tags


def write_images(folder: Path, number: int = 20, size: tuple[int, int] = SIZE, colour=(10, 20, 30)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        Image.new("RGB", (size[1], size[0]), colour).save(folder / f"{index:03d}.png")
    return folder


def read(folder, limit=1000, size=SIZE, seed=0):
    return read_folder(folder, KEY, size, limit, threads=2, seed=seed)


def test_images_of_the_right_kind_come_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{index:02d}.png")
    found = read(tmp_path)
    assert np.array_equal(found.images.movedim(1, -1).numpy(), pixels)
    assert found.notes == (f"{KEY}: 20 images of the 20 in {tmp_path}",)


def test_other_formats_sizes_and_modes_are_converted_and_said_once(tmp_path):
    write_images(tmp_path / "deep" / "down", 17)
    Image.new("RGB", (32, 16), (200, 0, 0)).save(tmp_path / "wide.jpg")
    Image.new("L", (8, 8), 128).save(tmp_path / "gray.webp", lossless=True)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    found = read(tmp_path)
    assert found.images.shape == (20, 3, 8, 8)
    assert found.notes[1:] == (
        f"{KEY}: 1 images of 1 other sizes (most often 16x32) are cut about the centre and resized to 8x8",
        f"{KEY}: 2 images of mode L, RGBA are converted to RGB"
        if Image.open(tmp_path / "gray.webp").mode == "L"
        else f"{KEY}: 1 images of mode RGBA are converted to RGB",
    )
    clear = found.images[0]  # sorted by path: clear.PNG comes first
    assert (clear == 255).all()


def test_the_centre_is_what_is_kept(tmp_path):
    write_images(tmp_path, 20)
    image = np.zeros((8, 24, 3), dtype=np.uint8)
    image[:, 8:16] = 255
    Image.fromarray(image).save(tmp_path / "000.png")
    assert read(tmp_path).images[0].float().mean() > 250


def test_images_of_16_bits_keep_their_greys(tmp_path):
    write_images(tmp_path, 19)
    greys = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1028  # 0, 4, 8, ... of 255
    Image.fromarray(greys).save(tmp_path / "a16.png")
    found = read(tmp_path)
    assert torch.equal(found.images[-1], torch.from_numpy((greys // 257).astype(np.uint8)).expand(3, 8, 8))


def test_broken_files_are_skipped_and_named(tmp_path):
    write_images(tmp_path, 22)
    (tmp_path / "000.png").write_bytes((tmp_path / "001.png").read_bytes()[:40])
    (tmp_path / "zzz.jpg").write_text("this is no image")
    found = read(tmp_path)
    assert len(found.images) == 21
    (line,) = [note for note in found.notes if "cannot be read" in note]
    assert "2 files cannot be read and are skipped" in line
    assert "000.png" in line
    assert "zzz.jpg" in line


def test_what_unpacks_to_too_much_is_skipped_and_named(tmp_path):
    write_images(tmp_path, 20)
    Image.new("P", (6000, 6000)).save(tmp_path / "bomb.png", transparency=0)
    found = read(tmp_path)
    assert len(found.images) == 20
    assert "bomb.png cannot be read as an image: it has 6000 x 6000 pixels" in found.notes[-1]


def test_transparency_is_white_at_every_size(tmp_path):
    write_images(tmp_path, 20, colour=(255, 255, 255))
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    half.paste((0, 0, 0, 255), (0, 0, 32, 16))
    for index, image in enumerate((half, half.convert("LA"), half.quantize(4))):
        image.save(tmp_path / f"z{index}.png")
    for image in read(tmp_path).images[-3:]:
        assert image[:, :3].max() < 20  # its black half
        assert image[:, 5:].min() > 235


def test_an_image_with_damaged_exif_data_is_kept_as_it_is(tmp_path):
    write_images(tmp_path)
    turned = Image.new("RGB", (8, 8), (200, 0, 0))
    exif = turned.getexif()
    exif[ORIENTATION], exif[RESOLUTION_UNIT] = 6, 2
    turned.save(tmp_path / "zzz.jpg", exif=exif)
    data, unit = (tmp_path / "zzz.jpg").read_bytes(), RESOLUTION_UNIT.to_bytes(2, "big")
    damaged = data.replace(unit + b"\x00\x03", unit + b"\x00\x02")  # its type: a text instead of a number
    assert damaged != data
    (tmp_path / "zzz.jpg").write_bytes(damaged)
    with Image.open(tmp_path / "zzz.jpg") as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    found = read(tmp_path)
    assert len(found.images) == 21
    assert found.images[-1].float().mean((1, 2)).tolist() == pytest.approx([200, 0, 0], abs=3)


def test_folders_that_cannot_be_used_are_explained(tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        read(tmp_path / "empty")
    write_images(tmp_path / "few", 19)
    with pytest.raises(InputError, match="19 images can be read, at least 20"):
        read(tmp_path / "few")


def test_of_many_images_the_seed_draws_some(tmp_path):
    for index in range(40):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index:02d}.png")

    def drawn(seed):
        return read(tmp_path, limit=20, seed=seed).images[:, 0, 0, 0].tolist()

    assert drawn(0) == drawn(0) == sorted(set(drawn(0)))
    assert len(drawn(0)) == 20
    assert drawn(0) != drawn(1)


def test_what_lies_in_hidden_folders_is_passed_over_and_counted(tmp_path):
    root = write_images(tmp_path / ".images" / "shown", 20)  # it is what lies below the root that counts
    for name in (".ipynb_checkpoints", "deep/.trash/down", "__MACOSX"):
        write_images(root / name, 2)
    Image.new("RGB", (8, 8)).save(root / "._000.png")
    found = read(root)
    assert len(found.images) == 20
    assert f"{KEY}: 7 hidden images are passed over, as in .ipynb_checkpoints" in found.notes


@given(copies=st.lists(st.integers(1, 4), min_size=20, max_size=60), share=st.floats(0.01, 0.5), data=st.data())
def test_equal_images_never_fall_to_two_shares(copies, share, data):
    rows = data.draw(st.permutations([row for row, number in enumerate(copies) for _ in range(number)]))
    parts = shares(torch.tensor(rows).view(-1, 1, 1, 1), share, seed=0)
    kept = torch.cat([parts.reward, parts.judge, parts.heldout]).flatten().tolist()
    assert sorted(kept) == list(range(len(copies)))
    assert parts.copies == sum(copies) - len(copies)


def test_images_that_hardly_differ_cannot_be_shared_out():
    with pytest.raises(
        InputError, match=r"path\.fake_img: 19 of the 40 images differ from each other, at least 20 must"
    ):
        shares((torch.arange(40) % 19).view(-1, 1, 1, 1), 0.2, 0, "path.fake_img")


@given(number=st.integers(20, 200), share=st.floats(0.01, 0.5), seed=st.integers(0, 2**31))
def test_shares_have_no_image_in_common_and_leave_none_out(number, share, seed):
    images = torch.arange(number).view(-1, 1, 1, 1)
    parts = shares(images, share, seed)
    rows = torch.cat([parts.reward, parts.judge, parts.heldout]).flatten()
    assert sorted(rows.tolist()) == list(range(number))
    assert abs(len(parts.reward) - len(parts.judge)) <= 1
    assert len(parts.heldout) == max(2, round(share * number))


def test_noise_is_really_there_and_stays_in_range():
    images = torch.full((200, 3, 8, 8), 0.5)
    noisy = under_noise(images, torch.Generator().manual_seed(0))
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    deviations = noisy.std((1, 2, 3))
    assert 0.02 < deviations.min() < 0.03  # a twentieth of a deviation of 0.5
    assert deviations.max() > 0.3


def test_faded_images_are_blends_with_a_colour_of_theirs():
    images = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = faded(images, torch.Generator().manual_seed(1))
    contrast = (found.std((2, 3)) / images.std((2, 3))).mean(1)  # [N], what is left of each image
    assert contrast.max() <= 0.5
    assert contrast.min() < 0.05
    left = contrast.view(-1, 1, 1, 1)
    colours = ((found - left * images) / (1 - left)).flatten(2)  # [N, 3, H * W], the same everywhere
    assert (colours - colours[..., :1]).abs().max() < 1e-5
    assert ((images.flatten(2) - colours[..., :1]).abs().amax(1).amin(1) < 1e-5).all()


@given(seed=st.integers(0, 2**31), height=st.integers(1, 4), width=st.integers(1, 4))
def test_augmented_images_hold_the_same_numbers_or_their_negatives(seed, height, width):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(8, 3, height, width, generator=generator)
    found = augmented(images, generator)
    for before, after in zip(images, found, strict=True):
        candidates = [turned for image in (before, 1 - before) for turned in _turned(image)]
        assert any(torch.equal(after, candidate) for candidate in candidates)


def _turned(image):
    """Both mirrorings of an image [3, H, W] and all orders of its channels."""
    for order in permutations(range(3)):
        for dims in ((), (1,), (2,), (1, 2)):
            yield image[list(order)].flip(dims)


def test_every_augmentation_happens_to_about_half_of_the_images():
    corner = torch.zeros(400, 3, 2, 2)
    corner[:, 0, 0, 0] = 1.0  # red, above, on the left
    found = augmented(corner, torch.Generator().manual_seed(0))
    negative = found.mean((1, 2, 3)) > 0.5
    found = torch.where(negative.view(-1, 1, 1, 1), 1 - found, found)
    where = found.flatten(1).argmax(1)
    counts = torch.bincount(where, minlength=12)  # channel, above or below, left or right
    assert 150 < negative.sum() < 250
    assert (counts > 15).all()


def test_rendered_scenes_fit_the_ddpm_and_depend_on_the_seed():
    found = render_images(4, (32, 32), 0)
    assert found.images.shape == (4, 3, 32, 32)
    assert torch.equal(found.images, render_images(4, (32, 32), 0).images)
    assert not torch.equal(found.images, render_images(4, (32, 32), 1).images)
    assert to_unit(found.images).max() <= 1
