"""scripts.verify_images on folders as sample.py writes them."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from models.shapes import scenes
from scripts.verify_images import main, read_records


def write_folder(folder, prompts_and_scenes):
    random = np.random.default_rng(0)
    lines = []
    for number, (prompt, caption) in enumerate(prompts_and_scenes):
        picture = scenes.imagine(scenes.parse(caption), random)
        Image.fromarray(scenes.draw(picture)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file": f"{number}.png", "prompt": prompt}))
    (folder / "images.jsonl").write_text("\n".join(lines) + "\n")


def test_counts_whole_captions_and_parts(tmp_path):
    red, blue = "a large red star on a white background", "a large blue star on a white background"
    two = "a large red star above a small blue ring on a gray background"
    write_folder(tmp_path, [(red, red), (blue, red), (two, two)])
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 0
    assert "1 object: 2 images of 2 prompts" in result.output
    assert "whole caption holds  0.500" in result.output
    assert f"parts that hold      {(1 + 5 / 6) / 2:.3f}" in result.output
    assert "failures             object 1 colour 1" in result.output
    assert "2 objects: 1 images of 1 prompts" in result.output


def test_only_a_newline_ends_a_record(tmp_path):
    prompts = ["a\u2028b\u2029c\x85d", "e"]
    lines = [json.dumps({"file": "0.png", "prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
    (tmp_path / "images.jsonl").write_text("".join(lines), encoding="utf-8")
    assert read_records(tmp_path) == [(tmp_path / "0.png", prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: give a folder that sample.py wrote"),
        ("", "is empty"),
        ("{}", "line 1: no record"),
        ("not json", "line 1: no record"),
        ("[" * 100_000, "line 1: no record"),
        ('{"file": "0.png", "prompt": "a", "seed": ' + "1" * 5000 + "}", "line 1: no record"),
        ('{"file": "none.png", "prompt": 5}', "line 1: no record"),
        ('{"file": ".", "prompt": "a large red star on a white background"}', "cannot be read as an image"),
        (b"\xff\xfe", "no text in UTF-8"),
        ('{"file": "none.png", "prompt": "a large red star on a white background"}', "cannot be read as an image"),
    ],
)
def test_faults_are_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "images.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output


def test_a_truncated_image_is_refused(tmp_path):
    caption = "a large red star on a white background"
    write_folder(tmp_path, [(caption, caption)])
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:-200])
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 2
    assert "0.png cannot be read as an image" in result.output


def test_another_format_under_the_name_of_a_png_is_refused(tmp_path):
    caption = "a large red star on a white background"
    write_folder(tmp_path, [(caption, caption)])
    Image.open(tmp_path / "0.png").save(tmp_path / "0.png", format="dds")
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 2
    assert "0.png cannot be read as an image: cannot identify" in " ".join(result.output.split())


def test_other_sizes_and_captions_are_refused(tmp_path):
    caption = "a large red star on a white background"
    write_folder(tmp_path, [(caption, caption)])
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    assert "0.png" in CliRunner().invoke(main, [str(tmp_path)]).output
    write_folder(tmp_path, [("a giraffe", caption)])
    assert "giraffe" in CliRunner().invoke(main, [str(tmp_path)]).output
