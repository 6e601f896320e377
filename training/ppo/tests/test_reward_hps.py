import hashlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from errors import InputError
from models import asset_table, clip, devices
from models.asset_table import HPS, Bundle
from models.recent import RecentTensors
from tests.plain_clip import random_plain_clip, write_letter_tokenizer
from training.ppo import reward_hps as second_path
from training.ppo.rewards import RewardHPS, WeightedMix, build_reward, find_reward_files
from training.ppo.rewards.mix import RunningMoments

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 10, "vocab_size": 55, "width": 32, "heads": 2, "layers": 2},
}
PROMPTS = ["a b", "c", "z z z", "a b", "q"]
# The same prompts as token ids (see `write_letter_tokenizer`), by hand.
TOKENS = [[53, 26, 27, 54], [53, 28, 54], [53, 51, 51, 51, 54], [53, 26, 27, 54], [53, 42, 54]]


def write_reward(folder: Path, name: str = "tiny", seed: int = 0, model_cfg: dict = SMALL) -> Path:
    write_letter_tokenizer(folder / "tokenizer")
    (folder / f"{name}.json").write_text(json.dumps({"model_cfg": model_cfg, "tokenizer": "tokenizer", "note": "test"}))
    weights = {name: tensor.half() for name, tensor in random_plain_clip(model_cfg, seed).state_dict().items()}
    torch.save({"epoch": 1, "state_dict": weights}, folder / f"{name}.pt")
    return folder / f"{name}.pt"


@pytest.fixture
def path(tmp_path) -> Path:
    return write_reward(tmp_path)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def expected_scores(images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    plain = random_plain_clip(SMALL, seed).half().float()
    mean, std = torch.tensor(clip.IMAGE_MEAN)[:, None, None], torch.tensor(clip.IMAGE_STD)[:, None, None]
    tokens = torch.tensor([row + [0] * (10 - len(row)) for row in TOKENS])
    with torch.no_grad():
        image_features, text_features = plain.encode_image((images - mean) / std), plain.encode_text(tokens)
    return torch.cosine_similarity(image_features, text_features)


# The score ------------------------------------------------------------------------------------------------------------


def test_the_score_is_the_cosine_of_an_independent_clips_features(path, images):
    scores = RewardHPS(path).score(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.std() > 0.05
    torch.testing.assert_close(scores, expected_scores(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("order", "batch_size"), [([4, 2, 0, 1, 3], 1), ([3, 1], 2), ([0, 1, 2, 3, 4], 3), ([2], 9)])
def test_a_score_does_not_depend_on_its_batch(path, images, order, batch_size):
    scores = RewardHPS(path, batch_size=batch_size).score(images[order], [PROMPTS[index] for index in order])
    torch.testing.assert_close(scores, expected_scores(images)[order], rtol=0, atol=1e-5)


def test_a_text_has_the_same_bits_whatever_it_is_read_with(path):
    together = RewardHPS(path).text_features(PROMPTS)
    for prompt, features in zip(PROMPTS, together, strict=True):
        assert torch.equal(RewardHPS(path).text_features([prompt])[0], features)


def test_however_many_prompts_are_scored_little_memory_is_kept(path, images, monkeypatch):
    monkeypatch.setattr("training.ppo.rewards.clip_scorer.RecentTensors", lambda: RecentTensors(most_bytes=480))
    reward = RewardHPS(path)
    expected = expected_scores(images)
    for number in range(20):
        reward.text_features([f"a b {'c' * number}", "z"])
    assert reward._text_features.num_bytes == 5 * 24 * 4  # of five prompts
    kept = {tensor.untyped_storage().nbytes() for tensor in map(reward._text_features.get, ["z"])}
    assert kept == {24 * 4}  # a row that is kept does not hold its batch
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=0, atol=1e-5)


def let_memory_hold(reward: RewardHPS, images: int) -> list[int]:
    """Let the model run out of memory on more images at once; returns where the sizes of its batches go."""
    seen: list[int] = []

    def look(module: torch.nn.Module, positional: tuple[()], named: dict[str, torch.Tensor]) -> None:
        seen.append(len(named["pixel_values"]))
        if seen[-1] > images:
            raise torch.OutOfMemoryError("CUDA out of memory")

    reward.model.vision_model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def test_memory_that_does_not_suffice_halves_the_batch_and_remembers(path, images, caplog):
    reward = RewardHPS(path, batch_size=16)
    seen = let_memory_hold(reward, 2)
    torch.testing.assert_close(reward.score(images, PROMPTS), expected_scores(images), rtol=0, atol=1e-5)
    assert seen == [5, 2, 2, 1]
    assert "out of memory with 5 images at once in tiny: from now on 2" in caplog.text
    reward.score(images, PROMPTS)
    assert seen[4:] == [2, 2, 1]


def test_memory_that_does_not_suffice_for_one_image_is_a_clear_error(path, images):
    reward = RewardHPS(path)
    let_memory_hold(reward, 0)
    with pytest.raises(InputError, match="The memory of cpu does not suffice for tiny to look at one image"):
        reward.score(images, PROMPTS)


def test_large_images_are_seen_whole(path):
    images = torch.rand(2, 3, 80, 64, dtype=torch.float64)
    reward = RewardHPS(path)
    pixels = clip.preprocess(images, 32, whole=True)
    with torch.no_grad():
        expected = clip.image_features(reward.model, pixels)
    assert torch.equal(reward.image_features(images), expected)
    assert reward.image_features(images).shape == (2, 24)
    images[:, :, :8] = 0  # what a crop would leave out
    assert not torch.equal(reward.image_features(images), expected)


def test_each_text_is_embedded_once(path, images):
    reward = RewardHPS(path, batch_size=2)
    embedded = []
    reward.model.text_model.register_forward_hook(lambda module, inputs, output: embedded.append(len(output[0])))
    first = reward.score(images, PROMPTS)
    assert embedded == [1, 1, 1, 1]  # four distinct prompts of five, each alone on a CPU
    assert torch.equal(reward.score(images, PROMPTS), first)
    assert embedded == [1, 1, 1, 1]


def test_how_many_prompts_are_cut_is_said_in_one_line(path, images, caplog):
    reward = RewardHPS(path)
    long, fits, entity = "a b c d e f g h i", "a b c d e f g h", "a &amp;amp; b c d e f"  # 8 tokens beside two marks
    WeightedMix({"hps": (reward, 1.0)}).say_what_is_cut([*PROMPTS, long, fits, entity, long, long + " j"])
    (record,) = caplog.records
    assert (
        record.getMessage() == "reward tiny reads 8 tokens of a prompt: 2 of 8 prompts are longer and judged by these"
    )
    tokens = clip.tokenize(reward.tokenizer, [long, fits], 10)
    assert torch.equal(*tokens)  # what is cut makes no difference, and is what was said
    caplog.clear()
    reward.say_what_is_cut([*PROMPTS, fits])
    assert not caplog.records


def test_prompts_of_which_a_reward_was_taught_no_word_are_said(path, tmp_path, caplog):
    reward = RewardHPS(path)  # it knows letters, and spells every word
    reward.say_what_is_cut(["a b", "red dog", "a cat"])
    (record,) = caplog.records
    assert "reward tiny was taught no word of 2 of 3 prompts, for example 'red dog'" in record.getMessage()
    vocabulary = {
        "<|startoftext|>": 2,
        "<|endoftext|>": 3,
        "d": 4,
        "o": 5,
        "g</w>": 6,
        "do": 7,
        "dog</w>": 8,
        "a</w>": 9,
    }
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[("d", "o"), ("do", "g</w>")])
    assert clip.without_known_words(tokenizer, ["a Dog, a cat", "a cat", "a"]) == ["a cat"]


def test_scores_are_differentiable_in_the_images_alone(path, images):
    reward = RewardHPS(path, batch_size=2)
    assert not reward.score(images, PROMPTS).requires_grad  # the weights ask for no gradient
    step = 1e-2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    inside = (0.1 + 0.8 * images).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(inside, PROMPTS).sum(), inside)
    difference = reward.score(inside.detach() + step, PROMPTS) - reward.score(inside.detach() - step, PROMPTS)
    torch.testing.assert_close(2 * (gradient * step).flatten(1).sum(1), difference, rtol=0.03, atol=1e-4)


def test_a_nan_pixel_spoils_its_own_score_alone(path, images):
    broken = images.clone()
    broken[2, 0, 5, 5] = math.nan
    scores, whole = RewardHPS(path).score(broken, PROMPTS), expected_scores(images)
    assert scores.isnan().tolist() == [False, False, True, False, False]
    torch.testing.assert_close(scores[[0, 1, 3, 4]], whole[[0, 1, 3, 4]], rtol=0, atol=1e-5)


def test_mixed_precision_is_autocast(path, images):
    full, mixed = RewardHPS(path), RewardHPS(path, amp_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = clip.image_features(full.model, clip.preprocess(images, 32)).float()
    assert torch.equal(mixed.image_features(images), expected)
    scores = mixed.score(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, full.score(images, PROMPTS), rtol=0, atol=0.02)
    assert not torch.equal(scores, full.score(images, PROMPTS))


def test_calls_that_make_no_sense_are_refused(path, images):
    reward = RewardHPS(path)
    with pytest.raises(ValueError, match="5 images but 1 prompts"):
        reward.score(images, ["a"])
    with pytest.raises(ValueError, match="floating-point"):
        reward.score((images * 255).to(torch.uint8), PROMPTS)


def test_both_import_paths_are_one_class():
    assert second_path.RewardHPS is RewardHPS


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "version"), [("HPS_v2.1_compressed.pt", "v2.1"), ("HPS_v2_compressed.pt", "v2.0")])
def test_missing_hps_weights_name_the_command(tmp_path, name, version):
    with pytest.raises(InputError) as caught:
        RewardHPS(tmp_path / name)
    assert name in str(caught.value)
    assert "about 2 GB" in str(caught.value)
    assert f"python download_hpsv2_weights.py --version {version}" in str(caught.value)


def test_one_version_of_hps_under_the_name_of_another_is_refused(tmp_path, monkeypatch):
    path = write_reward(tmp_path, "HPS_v2.1_compressed")
    RewardHPS(path)
    old = replace(HPS["v2.0"], digest="md5:" + hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setitem(asset_table.BUNDLES, "hpsv2.0", Bundle("", "", (old,)))
    for attempt in (RewardHPS, find_reward_files):
        with pytest.raises(InputError, match=r"it is HPS_v2_compressed\.pt\. .*hpsv2_weights.py --version v2\.1"):
            attempt(path)


def test_too_little_memory_is_said_before_it_runs_out(path, monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda _: 1000)
    with pytest.raises(InputError, match=r"tiny\.pt needs 0\.0 GB of memory on cpu, 0\.0 GB are free"):
        RewardHPS(path)


def test_other_missing_weights_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no reward weights at .*mine\.pt\. .*weights_path .*--reward "):
        RewardHPS(tmp_path / "mine.pt")


def test_weights_without_a_description_are_held_against_vit_h_14(tmp_path, path):
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"missing: .*Without a description \(tiny\.json\).* ViT-H/14"):
        RewardHPS(path, tokenizer_folder=tmp_path / "tokenizer")


def test_a_dry_run_finds_the_files(tmp_path, path):
    files = find_reward_files(path)
    assert (files.weights, files.model_cfg, files.tokenizer) == (path, SMALL, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"lacks merges\.txt .*models\.assets fetch tokenizer"):
        find_reward_files(path)
    write_letter_tokenizer(tmp_path / "other")
    assert find_reward_files(path, tmp_path / "other").tokenizer == tmp_path / "other"


def _with_text(**changes):
    """A description of the small model whose text model is another."""
    return {"model_cfg": SMALL | {"text_cfg": SMALL["text_cfg"] | changes}, "tokenizer": "tokenizer"}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{", "no readable JSON"),
        ({"model_cfg": SMALL}, "must describe a reward"),
        ({"model_cfg": SMALL | {"embed_dims": 3}, "tokenizer": "tokenizer"}, "embed_dims is unknown"),
        ({"model_cfg": SMALL | {"embed_dim": 25}, "tokenizer": "tokenizer"}, "2 of another shape: visual.proj"),
        ({"model_cfg": SMALL, "tokenizer": "elsewhere"}, "lacks vocab.json and merges.txt"),
        (_with_text(layers=2**22), "far more than"),
        (_with_text(layers=2**31), "text_cfg.layers must be a positive whole number"),
        (_with_text(width=10**400), "text_cfg.width must be a positive whole number"),
        (_with_text(mlp_ratio=math.inf), "text_cfg.mlp_ratio must be a positive number"),
    ],
)
def test_a_wrong_description_is_refused(path, description, message):
    path.with_suffix(".json").write_text(description if isinstance(description, str) else json.dumps(description))
    with pytest.raises(InputError) as caught:
        RewardHPS(path)
    assert message in str(caught.value)
    assert "tiny" in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    text_cfg = SMALL["text_cfg"] | {"vocab_size": 60}
    path = write_reward(tmp_path, model_cfg=SMALL | {"text_cfg": text_cfg})
    with pytest.raises(InputError, match="end-of-text token is number 54, the model's vocabulary ends with number 59"):
        RewardHPS(path)


# Mixes ----------------------------------------------------------------------------------------------------------------


class Constants:
    """A reward whose scores are given: it reads them off the first pixel."""

    def __init__(self, name: str, scale: float) -> None:
        self.name = name
        self.scale = scale

    def score(self, images, prompts):
        return self.scale * images[:, 0, 0, 0]


def pictures(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 2, 2)


def test_a_mix_standardises_each_part_by_what_it_observed():
    mix = WeightedMix({"small": (Constants("small", 0.01), 1.0), "large": (Constants("large", -100.0), 0.5)})
    raw = mix.raw_scores(pictures([1.0, 2.0, 3.0]), ["p"] * 3)
    assert raw["large"].tolist() == [-100.0, -200.0, -300.0]
    mix.observe(raw)  # means 0.02 and -200, deviations 0.01 and 100
    scores = mix.score(pictures([2.0, 4.0]), ["p"] * 2)
    torch.testing.assert_close(scores, torch.tensor([0.0, 2.0 - 0.5 * 2.0]), rtol=0, atol=1e-5)
    assert mix.name == "small + 0.5 large"


def test_before_anything_was_observed_a_batch_is_standardised_by_itself():
    mix = WeightedMix({"a": (Constants("a", 1.0), 1.0), "b": (Constants("b", 7.0), 1.0)})
    for _ in range(2):  # scoring observes nothing
        scores = mix.score(pictures([1.0, 2.0, 3.0]), ["p"] * 3)
        torch.testing.assert_close(scores, torch.tensor([-2.0, 0.0, 2.0]), rtol=0, atol=1e-6)


def test_a_single_reward_stays_raw():
    mix = WeightedMix({"a": (Constants("a", 3.0), 2.0)})
    mix.observe(mix.raw_scores(pictures([1.0, 5.0]), ["p"] * 2))
    assert mix.score(pictures([1.0, 2.0]), ["p"] * 2).tolist() == [6.0, 12.0]


def test_non_finite_scores_are_returned_and_not_observed():
    mix = WeightedMix({"a": (Constants("a", 1.0), 1.0), "b": (Constants("b", 2.0), 1.0)})
    raw = mix.raw_scores(pictures([1.0, 2.0, 3.0, 9.0]), ["p"] * 4)
    raw["a"][3] = math.nan
    raw["b"][3] = math.inf
    mix.observe(raw)
    assert mix.state_dict()["a"] == pytest.approx({"count": 3, "mean": 2.0, "squares": 2.0})
    scores = mix.combine(raw)
    torch.testing.assert_close(scores[:3], torch.tensor([-2.0, 0.0, 2.0]), rtol=0, atol=1e-6)
    assert not scores[3].isfinite()


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), max_size=6), min_size=1, max_size=5))
def test_running_moments_are_those_of_everything(batches):
    moments = RunningMoments()
    for batch in batches:
        moments.add(torch.tensor(batch))
    values = np.array([value for batch in batches for value in batch], dtype=np.float64)
    assert moments.count == len(values)
    if len(values) > 1:
        assert moments.mean == pytest.approx(values.mean(), abs=1e-9)
        assert moments.squares == pytest.approx(values.var() * len(values), rel=1e-9, abs=1e-6)
    if len(values) > 1 and values.std() > 1e-3:
        assert moments.deviation == pytest.approx(values.std(ddof=1), rel=1e-9)


def test_a_restored_mix_goes_on_as_if_never_stopped(tmp_path):
    def new() -> WeightedMix:
        return WeightedMix({"a": (Constants("a", 1.0), 1.0), "b": (Constants("b", -3.0), 0.3)})

    first, second = pictures([0.3, 0.1, 0.9]), pictures([0.2, 0.7])
    through = new()
    through.observe(through.raw_scores(first, ["p"] * 3))
    torch.save(through.state_dict(), tmp_path / "state.pt")
    resumed = new()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for mix in (through, resumed):
        mix.observe(mix.raw_scores(second, ["p"] * 2))
    assert torch.equal(through.score(first, ["p"] * 3), resumed.score(first, ["p"] * 3))
    with pytest.raises(InputError, match="statistics are of a, b, the configured rewards are c"):
        WeightedMix({"c": (Constants("c", 1.0), 1.0)}).load_state_dict(through.state_dict())


@pytest.mark.parametrize("weight", [0.0, math.nan, math.inf])
def test_a_useless_weight_is_refused(weight):
    with pytest.raises(InputError, match="weight of the reward a"):
        WeightedMix({"a": (Constants("a", 1.0), weight)})


def test_build_reward_mixes_checkpoints(tmp_path, images):
    paths = [write_reward(tmp_path, name, seed) for name, seed in (("one", 0), ("two", 1))]
    alone = build_reward({str(paths[1]): 1.0}, device="cpu", batch_size=4)
    torch.testing.assert_close(alone.score(images, PROMPTS), expected_scores(images, seed=1), rtol=0, atol=1e-5)
    both = build_reward({str(paths[0]): 1.0, str(paths[1]): 2.0}, device="cpu", batch_size=4)
    raw = both.raw_scores(images, PROMPTS)
    assert list(raw) == ["one", "two"]
    torch.testing.assert_close(raw["one"], expected_scores(images, seed=0), rtol=0, atol=1e-5)
    standardised = [(raw[name] - raw[name].mean()) / raw[name].std() for name in raw]
    torch.testing.assert_close(both.combine(raw), standardised[0] + 2 * standardised[1], rtol=0, atol=1e-4)


def test_build_reward_refuses_two_of_one_name(tmp_path):
    paths = [write_reward(tmp_path / folder) for folder in ("x", "y")]
    with pytest.raises(InputError, match="two are called tiny"):
        build_reward({str(path): 1.0 for path in paths}, device="cpu", batch_size=4)


# The real model -------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_real_image_scores_higher_for_its_own_prompt(integration):
    source, prompts = integration.parts.trainer.source, integration.parts.trainer.prompts.take(8)
    images = source.sample_images(integration.start.table, prompts, range(8)).pixels
    own, others = (source.reward.score(images, texts).mean() for texts in (prompts, [*prompts[1:], prompts[0]]))
    assert own > others


@pytest.mark.integration
def test_hps_v2_1_agrees_with_open_clip(asset):
    weights, tokenizer = (
        asset("weights/HPS_v2.1_compressed.pt"),
        asset("src/pipelines/sd15/tokenizer/vocab.json").parent,
    )
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed (extra `reference`)")
    reference = open_clip.create_model("ViT-H-14", device="cuda").eval()
    reference.load_state_dict(torch.load(weights, map_location="cuda", weights_only=True)["state_dict"])
    prompts = ["A dog in a field.", "Two people's bicycles on a street, 3 pm", "a red car"]
    images = torch.rand(3, 3, 224, 224, device="cuda")
    with torch.no_grad():
        expected = torch.cosine_similarity(
            reference.encode_image(clip.preprocess(images, 224)),
            reference.encode_text(open_clip.get_tokenizer("ViT-H-14")(prompts).cuda()),
        )
    scores = RewardHPS(weights, device="cuda", tokenizer_folder=tokenizer).score(images, prompts)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, *sys.argv[1:]]))
