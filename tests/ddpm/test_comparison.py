from __future__ import annotations

import torch

from tests.ddpm.tiny_ddpm import SHAPE, tiny_model, tiny_policy
from training.ddpm.comparison import COMPARISON_METRICS, Comparison, Judged, comparison_lines, thumbnails_of
from training.ddpm.config import DDPMConfig
from training.ddpm.report import evaluation_page
from training.ddpm.reward_model import new_classifier
from training.measuring.distances import frechet, gaussian_of
from training.runs.run_folder import RunFolder


def brightness(images):
    return images.mean((1, 2, 3))


def comparison(tmp_path):
    model = tiny_model(tmp_path / "ddpm")
    real = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(0))
    judge = new_classifier((8, 8), 8, seed=0).eval()
    policy = tiny_policy(model)
    seeds = list(range(16))
    return Comparison(brightness, judge, real, seeds=seeds, batch_size=8, start=policy), policy


def test_a_ddpm_is_no_better_and_no_worse_than_itself(tmp_path):
    judge, policy = comparison(tmp_path)
    metrics = judge.against_start(judge.judged(policy))
    for name in ("reward", "judge", "frechet"):
        assert metrics[f"heldout/{name}"] == metrics[f"heldout/{name}_start"]
        assert metrics[f"heldout/{name}_difference"] == 0
        assert metrics[f"heldout/{name}_difference_low"] == metrics[f"heldout/{name}_difference_high"] == 0
    assert not metrics["heldout/suspected_reward_hacking"]
    bases = {
        name.replace(end, "").replace("reward", "<each>")
        for name in metrics
        for end in ("_low", "_high")
        if name.startswith("heldout/reward_")
    }
    assert "heldout/<each>_start" in bases
    assert {"heldout/reward", "heldout/judge", "heldout/frechet"} <= set(COMPARISON_METRICS)


def test_numbers_are_those_of_the_images(tmp_path):
    judge, _ = comparison(tmp_path)
    start = judge.start
    assert torch.allclose(start.reward, brightness(start.images))
    assert torch.allclose(start.thumbnails.mean(1), start.reward, atol=1e-6)  # means of equal parts
    shifted = Judged(start.images, start.reward + 0.5, start.judge - 1.0, start.thumbnails + 3.0)
    metrics = judge.against_start(shifted)
    assert abs(metrics["heldout/reward_difference"] - 0.5) < 1e-6
    assert metrics["heldout/reward_difference_low"] > 0.499
    assert abs(metrics["heldout/judge_difference_high"] + 1.0) < 1e-5
    expected = frechet(gaussian_of(shifted.thumbnails), gaussian_of(judge.real.thumbnails[:16]))
    assert abs(metrics["heldout/frechet"] - expected) < 1e-6
    assert metrics["heldout/frechet_images"] == 16
    assert metrics["heldout/reward_real"] == brightness(judge.real.images).mean().item()
    assert "Frechet distance to 16 real images" in comparison_lines(metrics)[2]


def test_a_reward_that_rises_while_the_judge_falls_is_called_hacking(tmp_path):
    judge, _ = comparison(tmp_path)
    start = judge.start
    hacked = judge.against_start(Judged(start.images, start.reward + 1, start.judge - 1, start.thumbnails))
    assert hacked["heldout/suspected_reward_hacking"]
    assert "REWARD HACKING" in comparison_lines(hacked)[-1]
    honest = judge.against_start(Judged(start.images, start.reward + 1, start.judge + 1, start.thumbnails))
    assert not honest["heldout/suspected_reward_hacking"]
    assert len(comparison_lines(honest)) == 3


def test_a_ddpm_that_always_draws_the_same_is_called_hacking_even_if_both_classifiers_like_it(tmp_path):
    """What happened in the shapes world with a KL weight of 0.001: all images black, judged more real than before."""
    judge, _ = comparison(tmp_path)
    start = judge.start
    black = torch.zeros_like(start.images)
    collapsed = judge.against_start(Judged(black, start.reward + 5, start.judge + 5, thumbnails_of(black)))
    assert collapsed["heldout/frechet_difference_low"] > 0
    assert collapsed["heldout/suspected_reward_hacking"]


def test_the_page_of_a_hacked_reward_does_not_begin_with_better(tmp_path):
    judge, _ = comparison(tmp_path)
    folder, start = RunFolder(tmp_path / "my runs" / "eval"), judge.start
    images = {"start": start.images, "fine-tuned": start.images}
    honest = judge.against_start(Judged(start.images, start.reward + 1, start.judge + 1, start.thumbnails))
    page = evaluation_page(folder, DDPMConfig(), honest, images).decode()
    assert '<div class="verdict better"><b>Better, by the judge' in page
    assert f"--cfg &#x27;{folder.config}&#x27;" in page  # typed as it stands, it is one word
    thumbnails = thumbnails_of(torch.zeros_like(start.images))
    hacked = judge.against_start(Judged(start.images, start.reward + 1, start.judge + 1, thumbnails))
    page = evaluation_page(folder, DDPMConfig(), hacked, images).decode()
    assert '<div class="verdict worse"><b>Suspected reward hacking' in page


def test_a_thumbnail_is_made_of_means():
    image = torch.zeros(1, 3, 8, 8)
    image[0, 1, :2, 2:4] = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    expected = torch.zeros(3, 4, 4)
    expected[1, 0, 1] = 0.75
    assert torch.equal(thumbnails_of(image), expected.flatten()[None])
