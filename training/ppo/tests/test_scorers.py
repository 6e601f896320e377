"""PickScore, CLIP score and aesthetic predictor, small and random, in their published formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel

from errors import InputError
from models import clip
from models.asset_table import AESTHETIC
from tests.plain_clip import random_plain_clip, write_letter_tokenizer
from training.ppo import rewards
from training.ppo.rewards import RewardFiles, aesthetic, build_reward, find_reward_files
from training.ppo.rewards.aesthetic import AestheticScore
from training.ppo.rewards.clip_score import ClipScore
from training.ppo.rewards.pickscore import PickScore

SMALL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 10, "vocab_size": 55, "width": 32, "heads": 2, "layers": 1},
}
PROMPTS = ["a b", "c", "z z z"]
TOKENS = [[53, 26, 27, 54], [53, 28, 54], [53, 51, 51, 51, 54]]  # by hand, see `write_letter_tokenizer`


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A CLIP model as transformers writes it, with the extras of old files, and its tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    model = clip.from_open_clip(random_plain_clip(SMALL).state_dict(), SMALL, source="test")
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(10)[None]}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2  # as in every published CLIP of that time
    (folder / "config.json").write_text(json.dumps(config))
    write_letter_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def expected_features(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    plain = random_plain_clip(SMALL)
    mean, std = torch.tensor(clip.IMAGE_MEAN)[:, None, None], torch.tensor(clip.IMAGE_STD)[:, None, None]
    tokens = torch.tensor([row + [0] * (10 - len(row)) for row in TOKENS])
    return plain.encode_image((images - mean) / std), plain.encode_text(tokens)


def files_of(folder: Path, head: Path | None = None) -> RewardFiles:
    model = folder / "model.safetensors"
    return RewardFiles(head or model, {}, folder / "tokenizer", others=(model,))


def write_head(path: Path, features: int) -> nn.Sequential:
    """The published predictor's layers; random, saved under its names, and returned."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(features, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    ).eval()
    torch.save({f"layers.{name}": weight for name, weight in layers.state_dict().items()}, path)
    return layers


def test_pickscore_is_the_temperature_times_the_cosine(folder, images):
    image_features, text_features = expected_features(images)
    scores = PickScore(files_of(folder)).score(images, PROMPTS)
    expected = random_plain_clip(SMALL).logit_scale.exp() * torch.cosine_similarity(image_features, text_features)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


def test_clip_score_is_a_hundred_times_the_cosine_and_never_negative(folder, images):
    image_features, text_features = expected_features(images)
    cosine = torch.cosine_similarity(image_features, text_features)
    assert (cosine < 0).any()
    assert (cosine > 0).any()
    scores = ClipScore(files_of(folder)).score(images, PROMPTS)
    torch.testing.assert_close(scores, 100 * cosine.clamp(min=0), rtol=0, atol=1e-3)


def test_the_aesthetic_score_is_that_of_the_layers_on_normalised_features(folder, images, tmp_path):
    layers = write_head(tmp_path / "head.pth", 24)
    image_features, _ = expected_features(images)
    with torch.no_grad():
        expected = layers(nn.functional.normalize(image_features, dim=-1))[:, 0]
    scorer = AestheticScore(files_of(folder, tmp_path / "head.pth"))
    torch.testing.assert_close(scorer.score(images, PROMPTS), expected, rtol=0, atol=1e-5)
    assert torch.equal(scorer.score(images, ["x", "y", "z"]), scorer.score(images, PROMPTS))
    with pytest.raises(ValueError, match="3 images but 1 prompts"):
        scorer.score(images, ["x"])


def test_who_looks_at_no_prompt_cuts_none(folder, tmp_path, caplog):
    write_head(tmp_path / "head.pth", 24)
    scorers = (
        AestheticScore(files_of(folder, tmp_path / "head.pth")),
        ClipScore(files_of(folder)),
    )
    for scorer in scorers:
        scorer.say_what_is_cut(["a b c d e f g h i j"])
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "reward clip_score reads 8 tokens of a prompt"
    ]


def test_a_nan_pixel_spoils_its_own_score_alone(folder, images):
    images[1, 0, 3, 3] = torch.nan
    for kind in (PickScore, ClipScore):
        scores = kind(files_of(folder)).score(images, PROMPTS)
        assert scores.isnan().tolist() == [False, True, False]


def test_the_folder_loads_to_what_transformers_loads(folder):
    ours, theirs = clip.load_transformers_checkpoint(folder), CLIPModel.from_pretrained(folder)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.state_dict().items())


# --- what is wrong


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def test_a_wrong_clip_folder_is_explained(copy):
    state = load_file(copy / "model.safetensors")
    extra = {**state, "text_model.final_layer_norm.bias": torch.zeros(3), "other": torch.zeros(1)}
    extra.pop("logit_scale")
    save_file(extra, copy / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing: logit_scale; 1 left over: other; 1 of another shape: text_model"):
        clip.load_transformers_checkpoint(copy)
    (copy / "model.safetensors").write_text("<html>")
    with pytest.raises(InputError, match="HTML"):
        clip.load_transformers_checkpoint(copy)
    (copy / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(InputError, match="kind 'siglip', not 'clip'"):
        clip.load_transformers_checkpoint(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match="no readable configuration"):
        clip.load_transformers_checkpoint(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors missing"):
        clip.load_transformers_checkpoint(copy)


def test_a_wrong_aesthetic_predictor_is_explained(tmp_path):
    with pytest.raises(InputError, match="assets fetch aesthetic"):
        aesthetic.read_head(tmp_path / "head.pth", 24)
    write_head(tmp_path / "head.pth", 25)
    with pytest.raises(InputError, match=r"for 24 features: layers\.0\.weight"):
        aesthetic.read_head(tmp_path / "head.pth", 24)


# --- by name


@pytest.fixture
def fetched(folder, tmp_path, monkeypatch) -> Path:
    """A repository into which `clip` and its tokenizer were fetched, and nothing else."""
    home = tmp_path / "weights" / "clip-vit-large-patch14"
    home.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (home / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr(rewards, "ROOT", tmp_path)
    monkeypatch.setattr(rewards, "DEFAULT_TOKENIZER", folder / "tokenizer")
    return tmp_path


def aesthetic_file(root: Path) -> Path:
    path = root / AESTHETIC.path
    path.parent.mkdir(exist_ok=True)
    return path


def test_named_rewards_are_found_and_mixed(fetched, folder, images):
    write_head(aesthetic_file(fetched), 24)
    files = find_reward_files("clip_score")
    assert files.weights == fetched / "weights" / "clip-vit-large-patch14" / "model.safetensors"
    assert files.tokenizer == folder / "tokenizer"
    mix = build_reward({"clip_score": 2.0, "aesthetic": 1.0}, device="cpu", batch_size=3)
    raw = mix.raw_scores(images, PROMPTS)
    alone = ClipScore(files)
    assert torch.equal(raw["clip_score"], alone.score(images, PROMPTS))
    liked = AestheticScore(files._replace(weights=aesthetic_file(fetched), others=(files.weights,)))
    assert torch.equal(raw["aesthetic"], liked.score(images, PROMPTS))


@pytest.mark.parametrize(("name", "bundle"), [("pickscore", "pickscore"), ("aesthetic", "aesthetic")])
def test_named_rewards_that_are_not_there_name_the_command(fetched, name, bundle):
    with pytest.raises(InputError, match=f"python -m models.assets fetch {bundle}"):
        find_reward_files(name)
