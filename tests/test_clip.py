import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from errors import InputError
from models import clip
from models.loading import load_tokenizer, read_json
from tests.plain_clip import PlainCLIP, random_plain_clip, write_letter_tokenizer

# Two vision heads of 24, not open_clip's default width of 64; three text heads.
SMALL = {
    "embed_dim": 40,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 24, "mlp_ratio": 3.0},
    "text_cfg": {"context_length": 12, "vocab_size": 55, "width": 36, "heads": 3, "layers": 3},
}


def tokens_of(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


@pytest.fixture
def plain() -> PlainCLIP:
    return random_plain_clip(SMALL)


# Architecture ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_features_agree_with_an_independent_clip(quick_gelu):
    model_cfg = SMALL | {"quick_gelu": quick_gelu}
    plain = random_plain_clip(model_cfg)
    ours = clip.from_open_clip(plain.state_dict(), model_cfg, source="test")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = tokens_of([[53, 4, 9, 54], [53, 54], [53, *range(10), 54]])
    with torch.no_grad():
        torch.testing.assert_close(clip.image_features(ours, pixels), plain.encode_image(pixels), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(clip.text_features(ours, tokens), plain.encode_text(tokens), rtol=1e-5, atol=1e-5)
        other = clip.from_open_clip(plain.state_dict(), SMALL | {"quick_gelu": not quick_gelu}, source="test")
        assert (clip.image_features(other, pixels) - plain.encode_image(pixels)).abs().max() > 1e-3


def test_features_agree_with_open_clip():
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed (extra `reference`)")
    reference = open_clip.model.CLIP(**SMALL).eval()
    ours = clip.from_open_clip(reference.state_dict(), SMALL, source="open_clip")
    pixels, tokens = torch.randn(3, 3, 32, 32), tokens_of([[53, 4, 9, 54], [53, 54], [53, *range(10), 54]])
    with torch.no_grad():
        torch.testing.assert_close(
            clip.image_features(ours, pixels), reference.encode_image(pixels), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            clip.text_features(ours, tokens), reference.encode_text(tokens), rtol=1e-5, atol=1e-5
        )


def test_padding_does_not_change_text_features(plain):
    ours = clip.from_open_clip(plain.state_dict(), SMALL, source="test")
    padded = tokens_of([[53, 4, 9, 54]])
    other = padded.clone()
    other[:, 4:] = 7
    with torch.no_grad():
        torch.testing.assert_close(clip.text_features(ours, padded), clip.text_features(ours, other))
        assert (
            clip.text_features(ours, padded) - clip.text_features(ours, tokens_of([[53, 5, 9, 54]]))
        ).abs().max() > 0


def test_the_full_configuration_is_that_of_vit_h_14():
    with torch.device("meta"):
        model = clip.CLIPModel(clip.clip_config(read_json(clip.VIT_H_14)))
    shapes = {name: tuple(tensor.shape) for name, tensor in clip.to_open_clip(model).items()}
    # Published facts about ViT-H/14 of open_clip: 986.11 M weights; 16 x 16 patches and a class token; projections.
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441
    assert shapes["visual.positional_embedding"] == (257, 1280)
    assert shapes["visual.conv1.weight"] == (1280, 3, 14, 14)
    assert shapes["visual.transformer.resblocks.31.attn.in_proj_weight"] == (3840, 1280)
    assert shapes["transformer.resblocks.23.mlp.c_fc.weight"] == (4096, 1024)
    assert shapes["text_projection"] == (1024, 1024)
    assert model.vision_model.encoder.layers[0].self_attn.head_dim == 80
    assert model.text_model.encoder.layers[0].self_attn.head_dim == 64
    assert model.config.vision_config.hidden_act == model.config.text_config.hidden_act == "gelu"
    assert model.config.text_config.eos_token_id == 49407


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("vision_cfg", "head_width", 20, "vision_cfg.width=48 is no multiple of vision_cfg.head_width=20"),
        ("vision_cfg", "image_size", 30, "vision_cfg.image_size=30 is no multiple of vision_cfg.patch_size=8"),
        ("text_cfg", "heads", 5, "text_cfg.width=36 is no multiple of text_cfg.heads=5"),
        ("text_cfg", "layers", 0, "text_cfg.layers must be a positive whole number, not 0"),
        ("text_cfg", "layers", "2", "text_cfg.layers must be a positive whole number, not '2'"),
        ("text_cfg", "layer", 2, "text_cfg.layer is unknown"),
        ("vision_cfg", "mlp_ratio", 0, "vision_cfg.mlp_ratio must be a positive number, not 0"),
        ("text_cfg", "mlp_ratio", -1, "text_cfg.mlp_ratio must be a positive number, not -1"),
    ],
)
def test_a_wrong_configuration_is_refused(section, key, value, message):
    model_cfg = copy.deepcopy(SMALL)
    model_cfg[section][key] = value
    with pytest.raises(InputError) as caught:
        clip.clip_config(model_cfg)
    assert message in str(caught.value)


def test_all_missing_keys_of_a_configuration_are_named_at_once():
    with pytest.raises(InputError) as caught:
        clip.clip_config({"embed_dim": 8, "text_cfg": {"width": 8, "heads": 1, "layers": 1, "vocab_size": 9}})
    assert "text_cfg.context_length is missing" in str(caught.value)
    assert "vision_cfg is missing" in str(caught.value)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_open_clips(plain):
    ours = {name: tensor.shape for name, tensor in clip.to_open_clip(clip.new_clip(SMALL)).items()}
    assert ours == {name: tensor.shape for name, tensor in plain.state_dict().items()}


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 8]), st.integers(1, 2), st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_both_directions_are_inverse(vision_layers, text_layers, head_width, text_heads, seed):
    torch.manual_seed(seed)
    model_cfg = {
        "embed_dim": 6,
        "vision_cfg": {
            "image_size": 8,
            "patch_size": 4,
            "width": 16,
            "layers": vision_layers,
            "head_width": head_width,
        },
        "text_cfg": {"context_length": 5, "vocab_size": 9, "width": 10, "heads": text_heads, "layers": text_layers},
    }
    model = clip.new_clip(model_cfg)
    back = clip.from_open_clip(clip.to_open_clip(model), model_cfg, source="test")
    assert model.state_dict().keys() == back.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    assert not any(buffer.is_meta for buffer in back.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_model_reads_back(tmp_path, dtype):
    torch.manual_seed(3)
    model = clip.new_clip(SMALL)
    clip.save_open_clip_checkpoint(model, tmp_path / "folder" / "clip.pt", dtype)
    back = clip.load_open_clip_checkpoint(tmp_path / "folder" / "clip.pt", SMALL)
    for name, tensor in model.state_dict().items():
        assert back.state_dict()[name].dtype == torch.float32
        assert torch.equal(tensor.to(dtype).float(), back.state_dict()[name]), name
    assert not back.training
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["clip.pt"]


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path):
    path = tmp_path / "clip.pt"
    clip.save_open_clip_checkpoint(clip.new_clip(SMALL), path, torch.float32)
    model = clip.load_open_clip_checkpoint(path, SMALL)
    before = model.logit_scale.item(), model.visual_projection.weight.sum().item()
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert (model.logit_scale.item(), model.visual_projection.weight.sum().item()) == before


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nested", [True, False])
def test_published_wrappings_are_read(tmp_path, plain, prefix, nested):
    tensors = {prefix + name: tensor.half() for name, tensor in plain.state_dict().items()}
    content = {"epoch": 7, "name": "run", "state_dict": tensors} if nested else tensors
    torch.save(content, tmp_path / "clip.pt")
    model = clip.load_open_clip_checkpoint(tmp_path / "clip.pt", SMALL)
    assert torch.equal(model.visual_projection.weight, plain.visual.proj.T.half().float())


def test_missing_extra_and_misshapen_tensors_are_listed(plain):
    tensors = plain.state_dict()
    tensors["visual.conv1.bias"] = tensors["visual.conv1.weight"][:, 0, 0, 0]
    tensors["text_projection"] = tensors["text_projection"].T
    del tensors["ln_final.bias"], tensors["transformer.resblocks.2.ln_1.weight"]
    with pytest.raises(InputError) as caught:
        clip.from_open_clip(tensors, SMALL, source="reward.pt")
    message = str(caught.value)
    assert message.startswith("reward.pt is no CLIP checkpoint of the configured size")
    assert "2 missing: ln_final.bias, transformer.resblocks.2.ln_1.weight" in message
    assert "1 left over: visual.conv1.bias" in message
    assert "1 of another shape: text_projection is [40, 36] instead of [36, 40]" in message


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_of_a_checkpoint_is_run(tmp_path, plain):
    torch.save({"state_dict": plain.state_dict(), "note": Payload(tmp_path / "ran")}, tmp_path / "clip.pt")
    with pytest.raises(InputError, match="could run code"):
        clip.load_open_clip_checkpoint(tmp_path / "clip.pt", SMALL)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path, plain):
    whole = tmp_path / "whole.pt"
    torch.save(plain.state_dict(), whole)
    contents = {
        "web.pt": b"<!DOCTYPE html><html>404</html>",
        "cut.pt": whole.read_bytes()[:-2000],
        "empty.pt": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            clip.load_open_clip_checkpoint(tmp_path / name, SMALL)
    for absent in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(InputError, match="no checkpoint at"):
            clip.load_open_clip_checkpoint(absent, SMALL)


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_only_normalised():
    images = torch.rand(2, 3, 24, 24)
    mean, std = torch.tensor(clip.IMAGE_MEAN)[:, None, None], torch.tensor(clip.IMAGE_STD)[:, None, None]
    assert torch.equal(clip.preprocess(images, 24), (images - mean) / std)
    assert clip.preprocess(images.double(), 24).dtype == torch.float32


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (20, 20), (90, 61), (61, 90), (49, 33)])
def test_resizing_is_pillows_bicubic(size):
    rng = np.random.default_rng(5)
    height, width = size
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BOX
    )
    target = 32
    short = min(size)
    resized = coarse.resize((width * target // short, height * target // short), Image.Resampling.BICUBIC)
    left, top = round((resized.width - target) / 2), round((resized.height - target) / 2)
    expected = np.asarray(resized.crop((left, top, left + target, top + target)), dtype=np.float32) / 255

    images = torch.from_numpy(np.array(coarse)).permute(2, 0, 1)[None].float() / 255
    pixels = clip.preprocess(images, target)[0]
    restored = pixels * torch.tensor(clip.IMAGE_STD)[:, None, None] + torch.tensor(clip.IMAGE_MEAN)[:, None, None]
    assert pixels.shape == (3, target, target)
    # Pillow rounds to 8 bits after each of its two passes.
    np.testing.assert_allclose(restored.permute(1, 2, 0).numpy(), expected, atol=1.6 / 255)


@pytest.mark.parametrize("size", [(64, 64), (20, 20), (90, 61), (61, 90), (40, 15)])
def test_a_whole_image_is_padded_as_hps_does(size):
    """By Pillow's bicubic of floating-point numbers, which clips none, with zeros on both sides."""
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).round()
    height, width = (round(side * 32 / max(size)) for side in size)
    expected = np.zeros((3, 32, 32), dtype=np.float32)
    for channel, plane in zip(expected, images[0].numpy(), strict=True):
        top, left = (32 - height) // 2, (32 - width) // 2
        channel[top : top + height, left : left + width] = Image.fromarray(plane).resize(
            (width, height), Image.Resampling.BICUBIC
        )
    pixels = clip.preprocess(images, 32, whole=True)[0]
    restored = pixels * torch.tensor(clip.IMAGE_STD)[:, None, None] + torch.tensor(clip.IMAGE_MEAN)[:, None, None]
    torch.testing.assert_close(restored, torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_images_of_another_layout_are_refused():
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        clip.preprocess(torch.rand(2, 32, 32, 3), 32)


def test_tokens_are_start_text_end_and_zeros(tmp_path):
    vocabulary_size = write_letter_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    rows = clip.tokenize(tokenizer, [" Cab\n AB ", "b", "&amp;lt;z", ""], 8)
    assert vocabulary_size == 55
    assert rows.dtype == torch.int64
    assert rows[0].tolist() == [53, 2, 52, 52, 54, 0, 0, 0]
    assert rows[1].tolist() == [53, 27, 54, 0, 0, 0, 0, 0]
    # `&amp;lt;z` is `<z` once both layers of entities are resolved; `<` is unknown here and becomes the unknown token.
    assert rows[2].tolist() == [53, 54, 51, 54, 0, 0, 0, 0]
    assert rows[3].tolist() == [53, 54, 0, 0, 0, 0, 0, 0]


def test_a_long_text_is_cut_and_still_ends(tmp_path):
    write_letter_tokenizer(tmp_path)
    rows = clip.tokenize(load_tokenizer(tmp_path), ["a b c d e f g", "a b c"], 5)
    assert rows.tolist() == [[53, 26, 27, 28, 54], [53, 26, 27, 28, 54]]


def test_the_configuration_file_holds_no_unknown_key():
    content = json.loads(clip.VIT_H_14.read_text())
    assert clip.clip_config(content).projection_dim == 1024
