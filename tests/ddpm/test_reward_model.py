from __future__ import annotations

import copy
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from errors import InputError
from training.ddpm.config import TrainRewardConfig
from training.ddpm.data import shares
from training.ddpm.reward_model import (
    RealFakeClassifier,
    accuracy,
    calibration_error,
    load_classifier,
    new_classifier,
    save_classifier,
    smoothed_loss,
)
from training.ddpm.reward_training import JUDGE, REWARD, REWARD_METRICS, RewardTrainer

CPU = torch.device("cpu")
SETTINGS = TrainRewardConfig(num_img=48, num_noise=24, batch_size=16, lr=3e-3, width=8)


def logit(probability: float) -> float:
    return torch.tensor(probability).double().logit().item()


@given(st.floats(0, 0.9), st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_the_loss_is_torchs_cross_entropy_with_label_smoothing(smoothing, values):
    log_odds = torch.tensor(values, dtype=torch.float64)
    labels = (torch.arange(len(values)) % 2).double()
    both = torch.stack([torch.zeros_like(log_odds), log_odds], dim=1)
    expected = functional.cross_entropy(both, labels.long(), label_smoothing=smoothing)
    torch.testing.assert_close(smoothed_loss(log_odds, labels, smoothing), expected)


def test_accuracy_and_calibration_by_hand():
    log_odds = torch.tensor([logit(0.85), logit(0.85), logit(0.25), logit(0.25)])
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert accuracy(log_odds, labels) == 0.75
    # In the bin of 0.85 half are real: an excess of 0.35; in that of 0.25 none: 0.25. Each holds half of the images.
    assert calibration_error(log_odds, labels) == pytest.approx(0.5 * 0.35 + 0.5 * 0.25, abs=1e-6)


def test_perfect_and_worst_calibration():
    sure = torch.tensor([60.0, -60.0])
    assert calibration_error(sure, torch.tensor([1.0, 0.0])) == pytest.approx(0.0)
    assert calibration_error(sure, torch.tensor([0.0, 1.0])) == pytest.approx(1.0)


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (16, 24)])
def test_a_classifier_comes_back_as_it_was_written(tmp_path, size):
    classifier = new_classifier(size, 8, seed=0)
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    save_classifier(tmp_path / "reward.pt", classifier, {"heldout_accuracy": 0.9})
    loaded = load_classifier(tmp_path / "reward.pt", "path.rm", CPU)
    with torch.no_grad():
        assert torch.equal(loaded(images), classifier(images))
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_images_of_another_size_are_resized():
    classifier = new_classifier((16, 16), 8, seed=0)
    with torch.no_grad():
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        resized = functional.interpolate(images, (16, 16), mode="bicubic", antialias=True)
        torch.testing.assert_close(classifier(images), classifier(resized))


def test_a_classifier_does_not_see_the_mean_colour():
    classifier = new_classifier((16, 16), 8, seed=0)
    images = 0.5 * torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([0.5, 0.2, 0.0]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images + shift), classifier(images), rtol=1e-4, atol=1e-4)
        assert (classifier(images) - classifier(0.5 * images)).abs().min() > 1e-3


def test_the_seed_decides_the_weights_and_global_randomness_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (new_classifier((8, 8), 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_a_missing_a_foreign_and_a_misshapen_file_are_explained(tmp_path):
    with pytest.raises(InputError, match=r"path\.rm=.*there is no such reward model"):
        load_classifier(tmp_path / "none.pt", "path.rm", CPU)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match=r"is no reward model of this project.*holds conv\.weight"):
        load_classifier(tmp_path / "foreign.pt", "path.rm", CPU)
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04nothing")
    with pytest.raises(InputError, match="corrupt"):
        load_classifier(tmp_path / "broken.pt", "path.rm", CPU)
    classifier = RealFakeClassifier((8, 8), 8)
    save_classifier(tmp_path / "other.pt", classifier, {})
    state = torch.load(tmp_path / "other.pt")
    state["weights"]["extra.weight"] = state["weights"].pop("head.bias")
    state["weights"]["head.weight"] = torch.zeros(5)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(InputError) as caught:
        load_classifier(tmp_path / "other.pt", "path.rm", CPU)
    for part in ("1 missing (head.bias)", "extra.weight", "1 of another shape (head.weight)"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {"head.weight": None}},
        {"weights": [1]},
        {"image_size": [2**40, 8]},
        {"image_size": [8, "8"]},
        {"image_size": 8},
        {"width": 2**31},
        {"width": 2**15},
        {"width": 2.5},
        {"width": None},
    ],
)
def test_a_file_with_other_things_in_their_place_ends_in_one_message(tmp_path, changes):
    save_classifier(tmp_path / "reward.pt", new_classifier((8, 8), 4, seed=0), {})
    state = torch.load(tmp_path / "reward.pt", weights_only=True)
    torch.save(state | changes, tmp_path / "reward.pt")
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        load_classifier(tmp_path / "reward.pt", "path.rm", torch.device("cpu"))
    assert str(tmp_path / "reward.pt") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 5


def two_kinds(number: int = 48):
    """Real images have stripes that lie, fake ones stripes that stand."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 80, (number, 3, 8, 8), generator=generator, dtype=torch.uint8)
    fake = real.clone()
    real[..., ::2, :] += 150
    fake[..., ::2] += 150
    return shares(real, 0.25, 0), shares(fake, 0.25, 0)


def test_both_classifiers_learn_what_is_real():
    trainer = RewardTrainer(*two_kinds(), SETTINGS, seed=0, device=CPU)
    rows = [trainer.step() for _ in range(36)]
    for name in (REWARD, JUDGE):
        assert rows[-1][f"{name}/heldout_accuracy"] >= 0.85
        assert rows[-1][f"{name}/loss"] < rows[0][f"{name}/loss"]
    named = {name.replace(REWARD, "<model>", 1) for name in rows[0] if name.startswith(REWARD)}
    assert named == set(REWARD_METRICS)


def test_chance_is_the_more_frequent_label():
    trainer = RewardTrainer(*two_kinds(), SETTINGS, seed=0, device=CPU)
    images, labels = trainer._heldout
    share, luck = trainer.chance()
    counts = [int((labels == label).sum()) for label in (0, 1)]
    assert share == max(counts) / len(images)
    assert luck == pytest.approx(1.96 * (share * (1 - share) / len(images)) ** 0.5)


def test_a_resumed_training_is_the_one_that_never_stopped():
    data = two_kinds()
    whole = RewardTrainer(*data, SETTINGS, seed=0, device=CPU)
    rows = [whole.step() for _ in range(3)]
    first = RewardTrainer(*data, SETTINGS, seed=0, device=CPU)
    first.step()
    resumed = RewardTrainer(*data, SETTINGS, seed=0, device=CPU)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    again = [resumed.step() for _ in range(2)]
    assert [row["judge/loss"] for row in again] == [row["judge/loss"] for row in rows[1:]]
    for name, model in whole.classifiers.items():
        for one, other in zip(model.parameters(), resumed.classifiers[name].parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("augment", [False, True])
def test_with_augmentation_an_image_and_its_negative_are_rated_alike(augment):
    spots = torch.randint(0, 60, (48, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    spots[..., 3:5, 3:5] += 150  # bright in the middle
    settings = replace(SETTINGS, augment=augment, num_noise=0)
    trainer = RewardTrainer(shares(spots, 0.25, 0), shares(255 - spots, 0.25, 0), settings, seed=0, device=CPU)
    for _ in range(24):
        trainer.step()
    loss = trainer.heldout(REWARD)["heldout_cross_entropy"]
    assert loss > 0.6 if augment else loss < 0.2  # log 2 = 0.69 is a coin's
