"""An evaluation part by part: what a whole one says, a stop and a second call, judges, processes and folders."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.generate import decode
from models.pictures import to_pixels
from tests.guided_mixture import GuidedMixture
from training.image_folder import ImageRequest, SolverFolders
from training.measuring.evaluation import LIBRARIES, Evaluation, FeatureJudge, Setting, Store, reference_solver
from training.solver import Schedule, classical_solver

COUNT = 11
PROMPTS = [str(number % 3) for number in range(COUNT)]
SEEDS = list(range(40, 40 + COUNT))


class Brightness:
    """A judge that counts how often it is asked, and sees no image twice."""

    features = None

    def __init__(self, name="brightness", power=1):
        self.name = self.fingerprint = name
        self.power, self.asked, self.alive, self.most = power, 0, [], 0

    def judge(self, images, prompts):
        self.asked += len(images)
        self.alive = [seen for seen in self.alive if seen() is not None]
        self.alive.append(weakref.ref(images))
        self.most = max(self.most, sum(len(seen()) for seen in self.alive))
        numbers = torch.tensor([int(prompt) for prompt in prompts])
        return {self.name: images.mean((1, 2, 3)).double() ** self.power + numbers}


class Named(Brightness):
    """A judge that is called otherwise than its fingerprint."""

    def __init__(self, name, fingerprint, power):
        super().__init__(name, power)
        self.fingerprint = fingerprint


class Colours:
    """An extractor: the mean colour of 8-bit images."""

    name = fingerprint = "colours"
    code = ()

    def features(self, pixels):
        assert pixels.dtype == torch.uint8
        return pixels.float().mean((2, 3))


class Counted(GuidedMixture):
    """Counts the images that it decodes."""

    decoded = 0

    def decode(self, latents, chunk_size=16):
        self.decoded += len(latents)
        return super().decode(latents, chunk_size)


@pytest.fixture
def solvers():
    denoiser = GuidedMixture()
    schedule = Schedule("discrete", 1.0)
    return [classical_solver(name, 4, schedule).guided(2).on(denoiser) for name in ("ddim", "dpmpp:2")]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("training.measuring.evaluation.PART", 4)


def evaluation(folder, *judges, denoiser=None, advance=int, batch=3, reference=False, writer=None, processes=1):
    denoiser = denoiser or GuidedMixture()
    setting = Setting(PROMPTS, SEEDS, "mixture", batch, torch.float32, previews=2)
    fine = reference_solver(denoiser, 2, 20) if reference else None
    store = Store(folder, pytest.fail)
    return Evaluation(denoiser, judges, setting, store, advance, reference=fine, writer=writer, processes=processes)


def test_parts_say_what_the_whole_says(tmp_path, solvers):
    denoiser = GuidedMixture()
    fine = reference_solver(denoiser, 2, 20)
    found = evaluation(tmp_path, Brightness(), FeatureJudge(Colours()), reference=True).measure(solvers[0])
    latents, reference = (solver.latents(denoiser, PROMPTS, SEEDS) for solver in (solvers[0], fine))
    images, true = (decode(denoiser, part).images for part in (latents, reference))
    expected = {
        "brightness": images.mean((1, 2, 3)) + torch.tensor([int(prompt) for prompt in PROMPTS]),
        "latent_rms": (latents - reference).square().mean((1, 2, 3)).sqrt(),
        "pixel_rms": ((images * 255).round() - (true * 255).round()).square().mean((1, 2, 3)).sqrt() / 255,
    }
    assert found.values.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found.values[name], values.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.features("colours"), (images * 255).round().mean((2, 3)), rtol=0, atol=0.5)
    assert not found.exploded.any()
    assert np.abs(found.previews.numpy().astype(int) - to_pixels(images[:2]).astype(int)).max() <= 1


def test_the_size_of_parts_and_batches_changes_nothing(tmp_path, solvers, monkeypatch):
    one = evaluation(tmp_path / "one", Brightness(), FeatureJudge(Colours()), reference=True).measure(solvers[1])
    monkeypatch.setattr("training.measuring.evaluation.PART", 100)
    other = evaluation(tmp_path / "other", Brightness(), FeatureJudge(Colours()), batch=11, reference=True)
    assert other.setting.parts == [slice(0, COUNT)]
    whole = other.measure(solvers[1])
    for name, values in one.values.items():
        torch.testing.assert_close(values, whole.values[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.features("colours"), whole.features("colours"), rtol=0, atol=0.5)
    assert one.previews.shape == whole.previews.shape == (2, 4, 4, 3)


def test_every_image_is_decoded_once_for_all_judges_and_no_more_than_a_batch_is_held(tmp_path, solvers):
    denoiser, one, two = Counted(), Brightness(), Brightness("squared", 2)
    found = evaluation(tmp_path, one, two, FeatureJudge(Colours()), denoiser=denoiser).measure(solvers[0])
    assert denoiser.decoded == one.asked == two.asked == COUNT
    assert one.most <= 3 + 3  # the batch that is judged, and the one before, which its variable still names
    assert found.values.keys() == {"brightness", "squared"}


def test_a_stopped_evaluation_goes_on_where_it_was(tmp_path, solvers):
    whole = evaluation(tmp_path / "whole", Brightness()).measure(solvers[0])
    asked = []

    def stop(count):
        asked.append(count)
        if sum(asked) > 4 * solvers[0].evaluations.total + 2:  # in the second part
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation(tmp_path / "stopped", Brightness(), advance=stop).measure(solvers[0])
    again, judge = [], Brightness()
    second = evaluation(tmp_path / "stopped", judge, advance=again.append)
    ahead = second.evaluations_ahead(solvers[:1])
    found = second.measure(solvers[0])
    assert ahead == sum(again) == 7 * solvers[0].evaluations.total
    assert judge.asked == 7
    assert torch.equal(found.values["brightness"], whole.values["brightness"])
    assert found.key == whole.key


def test_another_judge_draws_nothing_and_asks_the_first_nothing(tmp_path, solvers):
    evaluation(tmp_path, Brightness()).measure(solvers[0])
    first, second, denoiser = Brightness(), Brightness("squared", 2), GuidedMixture()
    found = evaluation(tmp_path, first, second, denoiser=denoiser).measure(solvers[0])
    assert (first.asked, second.asked, denoiser.evaluations) == (0, COUNT, 0)
    changed = Brightness()
    changed.fingerprint = "other weights"
    assert evaluation(tmp_path, changed).measure(solvers[0]).key != found.key
    assert changed.asked == COUNT


@pytest.mark.parametrize("library", ["torch", "diffusers", "transformers"])
def test_another_version_of_a_library_is_another_model(tmp_path, solvers, monkeypatch, library):
    evaluation(tmp_path, Brightness()).measure(solvers[0])
    monkeypatch.setitem(LIBRARIES, library, "0.1")
    judge, denoiser = Brightness(), GuidedMixture()
    evaluation(tmp_path, judge, denoiser=denoiser).measure(solvers[0])
    assert denoiser.evaluations > 0
    assert judge.asked == COUNT


def test_judges_that_change_places_keep_their_own_words(tmp_path, solvers):
    """The first reward is called `reward`, whichever it is; what was kept under that name is not the other's."""
    expected = evaluation(tmp_path / "alone", Named("reward", "b", 2)).measure(solvers[0]).values["reward"]
    evaluation(tmp_path / "kept", Named("reward", "a", 1), Named("other", "b", 2)).measure(solvers[0])
    found = evaluation(tmp_path / "kept", Named("reward", "b", 2), Named("other", "a", 1)).measure(solvers[0])
    assert found.values.keys() == {"reward", "other"}
    assert torch.equal(found.values["reward"], expected)


@pytest.mark.parametrize("processes", [2, 3, 5, 12])
def test_one_process_finds_what_several_find_and_all_of_them_work(tmp_path, solvers, processes):
    """Eleven prompts, in parts of four."""
    judges = Brightness(), FeatureJudge(Colours())
    alone = evaluation(tmp_path / "one", *judges, reference=True)
    compared = [alone.reference_solver, *solvers]
    expected = [alone.measure(solver) for solver in compared]
    denoisers = [GuidedMixture() for _ in range(processes)]
    ranks = [
        evaluation(tmp_path / "all", *judges, denoiser=denoiser, reference=True, processes=processes)
        for denoiser in denoisers
    ]
    for rank, one in enumerate(ranks):
        mine = one.rows_of(rank)
        ahead = one.evaluations_ahead(solvers, mine)
        for rows in mine:
            for solver in compared:
                one.work(solver, rows)
        assert denoisers[rank].evaluations == ahead
    asked = [denoiser.evaluations for denoiser in denoisers]
    assert sum(asked) == alone.denoiser.evaluations
    assert max(asked) - min(asked) <= sum(solver.evaluations.total for solver in compared)  # of a prompt
    ranks[0].join(compared)
    again = evaluation(tmp_path / "all", *judges, denoiser=GuidedMixture(), reference=True)  # by one process
    for solver, alone_found in zip(compared, expected, strict=True):
        found = again.measure(solver)
        assert found.key == alone_found.key
        for name, values in alone_found.values.items():
            torch.testing.assert_close(found.values[name], values, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.previews, alone_found.previews)
        torch.testing.assert_close(found.features("colours"), alone_found.features("colours"), rtol=0, atol=0.5)
    assert again.denoiser.evaluations == 0
    assert len(list((tmp_path / "all").iterdir())) == len(list((tmp_path / "one").iterdir()))  # shares are gone


def test_another_judge_of_several_processes_draws_nothing(tmp_path, solvers):
    evaluation(tmp_path, Brightness()).measure(solvers[0])
    second, denoiser = Brightness("squared", 2), GuidedMixture()
    shared = evaluation(tmp_path, Brightness(), second, denoiser=denoiser, processes=2)
    for rows in shared.rows_of(1):
        shared.work(solvers[0], rows)
    assert (second.asked, denoiser.evaluations) == (4 + 2, 0)


def test_a_broken_file_costs_its_part_only(tmp_path, solvers):
    whole = evaluation(tmp_path, Brightness()).measure(solvers[0])
    told, judge = [], Brightness()
    second = evaluation(tmp_path, judge)
    second.store = Store(tmp_path, told.append)
    job = second._jobs(solvers[0], slice(4, 8))["brightness"]
    second.store._file(job.description).write_bytes(b"broken")
    assert torch.equal(second.measure(solvers[0]).values["brightness"], whole.values["brightness"])
    assert judge.asked == 4
    assert len(told) == 1


def test_other_images_are_seen_part_by_part(tmp_path):
    asked = []

    def images(part):
        asked.append(part)
        return (
            torch.full((part.stop - part.start, 3, 4, 4), 1.0)
            * torch.arange(part.start, part.stop).view(-1, 1, 1, 1)
            / 20
        )

    one = evaluation(tmp_path, Brightness(), FeatureJudge(Colours()))
    found = one.features("colours", images, {"of": "a test"})
    torch.testing.assert_close(found[:, 0], (torch.arange(COUNT) / 20 * 255).round(), rtol=0, atol=1)
    assert torch.equal(one.features("colours", images, {"of": "a test"}), found)
    assert asked == [slice(0, 4), slice(4, 8), slice(8, 11)]


def test_images_are_written_if_wanted_and_not_twice(tmp_path, solvers):
    request = ImageRequest(PROMPTS, SEEDS, solvers[0], "mixture", 3, torch.float32, paired=True)
    folders, denoiser = SolverFolders(tmp_path / "images", request), Counted()
    one = evaluation(tmp_path / "kept", Brightness(), denoiser=denoiser, writer=folders)
    found = one.measure(solvers[0])
    folders.write_log(solvers[0], (~found.exploded).tolist())
    folder = tmp_path / "images" / "ddim-discrete-nfe03-g2"
    records = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    assert [(record["prompt"], record["seed"]) for record in records] == list(zip(PROMPTS, SEEDS, strict=True))
    assert {path.name for path in folder.glob("*.png")} == {record["file"] for record in records}
    np.testing.assert_array_equal(np.array(Image.open(folder / records[1]["file"])), found.previews[1].numpy())
    one.measure(solvers[0])
    assert denoiser.decoded == COUNT
    next(Path(folder).glob("00005*.png")).unlink()
    one.measure(solvers[0])
    assert denoiser.decoded == COUNT + 4  # the part that lacks one
    other = evaluation(tmp_path / "kept", Brightness(), denoiser=denoiser, writer=folders)
    other.setting = replace(other.setting, model_fingerprint="other weights at the same path")
    denoiser.decode = lambda latents, chunk_size=16: torch.full((len(latents), 3, 4, 4), 0.25)
    other.measure(solvers[0])
    for record in records:
        np.testing.assert_array_equal(np.array(Image.open(folder / record["file"])), np.full((4, 4, 3), 64))
    assert denoiser.evaluations == 2 * COUNT * solvers[0].evaluations.total
