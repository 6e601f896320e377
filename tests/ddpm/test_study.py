from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks.ddpm_study import MEASURES, Change, change_of, level_of, main, pooled, whole_shapes
from models.shapes.data import render_scenes
from tests.ddpm.test_commands import SMOKE
from tests.ddpm.tiny_ddpm import write_tiny_ddpm
from training.measuring.statistics import bootstrap_indices

REWARD, FRECHET = MEASURES[0], MEASURES[2]


def generator():
    return torch.Generator().manual_seed(0)


def change(difference, replicates):
    return Change(0.0, difference, torch.as_tensor(replicates, dtype=torch.float64))


def test_the_interval_of_one_run_is_that_of_its_images():
    values = torch.linspace(-1, 1, 2001).double()
    interval = pooled([change(5.0, values + 7)], generator())  # where replicates lie does not matter, their spread does
    assert interval.estimate == 5.0
    assert interval.low == pytest.approx(5 - 0.95, abs=0.05)
    assert interval.high == pytest.approx(5 + 0.95, abs=0.05)


def test_the_interval_of_several_runs_shows_how_they_differ():
    """Without spread within: of 27 draws of three runs, one is thrice the lowest, and 1/27 is more than 2.5%."""
    interval = pooled([change(value, torch.zeros(20_000)) for value in (1.0, 2.0, 6.0)], generator())
    assert interval == pytest.approx((3.0, 1.0, 6.0))


def test_a_change_is_that_of_the_values():
    side = {"reward": torch.tensor([1.0, 2.0, 3.0]), "thumbnails": torch.randn(3, 2, generator=generator())}
    far = {"reward": side["reward"] + 0.5, "thumbnails": side["thumbnails"] + torch.tensor([3.0, 4.0])}
    measured = {"before": side, "after": far, "real": side}
    found = change_of(REWARD, measured)
    assert (found.before, found.after) == pytest.approx((2.0, 2.5))
    assert [level_of(REWARD, measured, name) for name in measured] == pytest.approx([2.0, 2.5, 2.0])
    assert torch.allclose(found.replicates, torch.tensor(0.5).double())
    assert level_of(FRECHET, measured, "after") == pytest.approx(25.0)
    assert level_of(FRECHET, measured, "real") is None
    moved = change_of(FRECHET, measured)
    assert moved.before == pytest.approx(0.0, abs=1e-9)
    assert moved.after == pytest.approx(25.0)  # equal covariances: the squared distance of the means
    # Real images stay as they are, so only where the drawn images' mean goes along that difference counts.
    along = side["thumbnails"].double() @ torch.tensor([6.0, 8.0]).double()
    drawn = (along - along.mean())[bootstrap_indices(3, generator())].mean(1)
    torch.testing.assert_close(moved.replicates, 25 + drawn, rtol=1e-6, atol=1e-6)


def test_whole_shapes_are_told_from_noise_and_from_two_scenes_at_once():
    scenes = torch.from_numpy(render_scenes("train", 12, 0, progress=False).images).movedim(-1, 1) / 255
    small = torch.nn.functional.avg_pool2d(scenes, 2)
    assert whole_shapes(small).mean() >= 0.8
    assert whole_shapes((small + small.roll(1, dims=0)) / 2).mean() <= 0.2
    assert whole_shapes(torch.rand(3, 3, 32, 32, generator=generator())).sum() == 0


def test_the_study_writes_a_table_and_goes_on_where_it_was(tmp_path):
    write_tiny_ddpm(tmp_path / "start")
    output = tmp_path / "study"
    arguments = [
        "--cfg",
        SMOKE,
        "--seeds",
        "2",
        "--output",
        str(output),
        "--override",
        f"path.ddpm={tmp_path / 'start'}",
    ]

    def study(*more):
        return CliRunner().invoke(main, [*arguments, *more])

    first = study("eval.num_img=8")
    assert first.exit_code == 0, first.output
    text = (output / "table.md").read_text()
    assert text in first.output
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == [f"| {measure.title}" for measure in MEASURES]
    with Image.open(output / "before_after.png") as sheet:
        assert sheet.height > sheet.width / 2
    runs = sorted(output.glob("seed-*/runs/*"))
    (output / "seed-1" / "measured.pt").unlink()
    again = study("eval.num_img=8")
    assert again.exit_code == 0, again.output
    assert (output / "table.md").read_text() == text
    assert sorted(output.glob("seed-*/runs/*")) == runs  # nothing was trained again
    other = study("eval.num_img=9")
    assert other.exit_code == 2
    assert "another configuration" in other.output
