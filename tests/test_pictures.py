"""Values, images and pixels; image files that are read, and those that are not."""

from __future__ import annotations

import ast
import os
import subprocess
from threading import Event, Thread

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from errors import InputError
from models.pictures import LARGEST, opened_picture, to_images
from tests.test_import_boundaries import calls_of

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def test_decoded_values_become_images_in_range():
    assert to_images(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_what_is_no_number_is_no_colour():
    assert to_images(torch.tensor([torch.inf, -torch.inf, torch.nan])).isnan().all()


@pytest.mark.parametrize("format_name", ["png", "jpeg", "webp"])
def test_contents_tell_the_format_and_no_name_does(tmp_path, format_name):
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / "image", format=format_name)
    with opened_picture(tmp_path / "image") as image:
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - (200, 100, 50)).max() < 6


def refusal(file):
    with pytest.raises(InputError) as refused, opened_picture(file):
        pass
    message = str(refused.value)
    assert message.startswith(f"{file} cannot be read as an image: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["gif", "bmp", "tiff", "dds", "ppm", "ico", "pcx", "tga"])
def test_other_formats_are_refused_under_any_name(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png", format=name)
    assert "cannot identify" in refusal(tmp_path / "image.png")


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "image.png").write_bytes(POSTSCRIPT)
    for module, name in ((subprocess, "Popen"), (os, "system")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a program was started"))
    assert "cannot identify" in refusal(tmp_path / "image.png")


def test_what_unpacks_to_too_many_pixels_is_not_unpacked(tmp_path, monkeypatch):
    side = int(LARGEST**0.5) + 1
    Image.new("P", (side, side)).save(tmp_path / "bomb.png", transparency=0, optimize=True)
    assert (tmp_path / "bomb.png").stat().st_size < 50_000
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda _: pytest.fail("it was unpacked"))
    assert f"it has {side} x {side} pixels" in refusal(tmp_path / "bomb.png")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for ever
    for path in (tmp_path, tmp_path / "none.png", tmp_path / "pipe.png"):
        assert "no such file" in refusal(path)


def test_a_damaged_file_is_refused_wherever_it_breaks(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    for length in range(0, len(content) - 100, 97):
        (tmp_path / "cut.png").write_bytes(content[:length])
        refusal(tmp_path / "cut.png")


def test_images_are_read_in_one_place():
    opened = {module for module, call in calls_of("open") if ast.unparse(call.func) == "Image.open"}
    assert opened == {"models.pictures"}


@pytest.mark.parametrize(("side", "together"), [(64, True), (3000, False)])
def test_while_a_large_picture_is_unpacked_no_other_is_opened(tmp_path, side, together):
    Image.new("RGB", (side, side)).save(tmp_path / "first.webp")
    Image.new("RGB", (64, 64)).save(tmp_path / "second.webp")
    opened = Event()

    def open_second():
        with opened_picture(tmp_path / "second.webp"):
            opened.set()

    second = Thread(target=open_second)
    with opened_picture(tmp_path / "first.webp"):
        second.start()
        assert opened.wait(timeout=30 if together else 1) == together
    second.join()
    assert opened.is_set()
