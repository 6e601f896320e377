"""One UNet call, one decode and one HPS score at full size, against plain diffusers and transformers fed by hand.

Run on request: EPD_INTEGRATION_TEST=1 python -m pytest tests/test_full_size.py
It makes Stable Diffusion v1.5 and HPS v2.1 of random numbers in the published files, 6 GB in a temporary folder that is
removed again, and takes up to 13 GB of memory, mapped files included, and some four minutes of processor time.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.compvis_layout import unet_names, vae_names
from benchmarks.rehearse_sd15 import CAPTIONS, PIPELINE, copy_house, prepare_store, write_assets
from models import clip, load_denoiser, registry
from models.asset_table import HPS, SD15_CKPT
from models.denoiser import Denoiser
from models.loading import read_json
from training.ppo.rewards import RewardHPS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("EPD_INTEGRATION_TEST") != "1",
        reason="full-size models take 13 GB and minutes: set EPD_INTEGRATION_TEST=1 to run it",
    ),
]


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full-size")
    store, house = prepare_store(folder), copy_house(folder)
    list(write_assets(house, store))
    yield house
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def denoiser(house) -> Iterator[Denoiser]:
    """Loaded as the commands load `sd15`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "SOURCE", house / "src")
        yield load_denoiser("sd15", device="cpu", dtype=torch.float32)


def weights_of(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]


def fed(module: nn.Module, names: dict[str, str], weights: dict[str, Tensor]) -> nn.Module:
    """The module with the file's weights; `names`: its own names -> those of the file.

    In the layout of ours: in the other one a convolution adds up in another order, which moves a call of this UNet by
    4e-6 and a decode by 2e-4.
    """
    module.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()}, strict=True, assign=True)
    return nn.Module.to(module.requires_grad_(False).eval(), memory_format=torch.channels_last)


def plain_unet(house: Path) -> nn.Module:
    unet = UNet2DConditionModel.from_config(read_json(house / PIPELINE / "unet/config.json"))
    names = dict(zip(unet.state_dict(), (f"model.diffusion_model.{name}" for name in unet_names(unet)), strict=True))
    return fed(unet, names, weights_of(house / SD15_CKPT.path))


def plain_vae(house: Path) -> nn.Module:
    vae = AutoencoderKL.from_config(read_json(house / PIPELINE / "vae/config.json"))
    names = dict(zip(vae.state_dict(), (f"first_stage_model.{name}" for name in vae_names(vae)), strict=True))
    weights = weights_of(house / SD15_CKPT.path)
    # A linear map here is a 1x1 convolution there.
    flat = {names[name]: weights[names[name]].view_as(weight) for name, weight in vae.state_dict().items()}
    return fed(vae, names, flat)


def plain_text_encoder(house: Path) -> nn.Module:
    encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(house / PIPELINE / "text_encoder"))
    names = {name: f"cond_stage_model.transformer.text_model.{name}" for name in encoder.state_dict()}
    return fed(encoder, names, weights_of(house / SD15_CKPT.path))


@torch.no_grad()
def test_a_call_of_the_network(house, denoiser):
    step, scale, prompt = 500, 7.5, CAPTIONS[0]
    alpha_squared = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)[step]
    sigma = ((1 - alpha_squared) / alpha_squared).sqrt()
    x = float(sigma) * torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = denoiser.denoise(x, sigma, denoiser.encode([prompt], scale))

    tokenizer = CLIPTokenizer.from_pretrained(house / PIPELINE / "tokenizer")
    ids = tokenizer([prompt, ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    text = plain_text_encoder(house)(ids).last_hidden_state
    z = (x * float(alpha_squared.sqrt())).repeat(2, 1, 1, 1)
    with_text, without = plain_unet(house)(z, torch.tensor(step), text).sample.chunk(2)
    prediction = without + scale * (with_text - without)
    assert (with_text - without).abs().max() > 1e-3  # the text is heard
    torch.testing.assert_close(ours, x - float(sigma) * prediction, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_decode(house, denoiser):
    latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    ours = denoiser.decode(latents)
    expected = (plain_vae(house).decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    assert ours.shape == (1, 3, 512, 512)
    assert ours.std() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


# ViT-H/14 as laion published it and HPS v2.1 kept it.
TOWER = {"hidden_act": "gelu", "num_attention_heads": 16, "projection_dim": 1024}
VIT_H_14 = CLIPConfig(
    projection_dim=1024,
    vision_config={
        **TOWER,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "image_size": 224,
        "patch_size": 14,
    },
    text_config={
        **TOWER,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
)
TOP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
BLOCK = {"ln_": "layer_norm", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}


def transformers_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's weights, float32, under the names of `transformers.CLIPModel`."""
    renamed = {}
    for name, weight in state.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
        if block is None:
            renamed[TOP[name]] = weight.float().T if name in ("visual.proj", "text_projection") else weight.float()
            continue
        layer, inner = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}", block[3]
        if inner.startswith("attn.in_proj_"):
            for letter, part in zip("qkv", weight.float().chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{letter}_proj.{inner.removeprefix('attn.in_proj_')}"] = part
            continue
        for theirs, ours in BLOCK.items():
            inner = inner.replace(theirs, ours)
        renamed[f"{layer}.{inner}"] = weight.float()
    return renamed


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """[1, 3, 512, 512], smooth and well inside [0, 1]: no resizing of it overshoots the range of colours."""
    across, down = torch.meshgrid(torch.linspace(0, 9, 512), torch.linspace(0, 7, 512), indexing="xy")
    return torch.stack([0.5 + 0.4 * torch.sin(across * k + down) for k in (1, 2, 3)])[None]


def through_pillow(picture: Tensor) -> Tensor:
    """CLIP's input of a picture, resized by Pillow in floating point."""
    channels = [
        np.asarray(Image.fromarray(part.numpy()).resize((224, 224), Image.Resampling.BICUBIC)) for part in picture[0]
    ]
    mean, std = (torch.tensor(part)[:, None, None] for part in (clip.IMAGE_MEAN, clip.IMAGE_STD))
    return ((torch.from_numpy(np.stack(channels)) - mean) / std)[None]


@pytest.fixture(scope="module")
def our_score(house, picture) -> Tensor:
    reward = RewardHPS(house / HPS["v2.1"].path, tokenizer_folder=house / PIPELINE / "tokenizer")
    return reward.score(picture, CAPTIONS[:1])


@torch.no_grad()
def test_a_score(house, picture, our_score):
    model = CLIPModel(VIT_H_14)
    model.load_state_dict(transformers_weights(weights_of(house / HPS["v2.1"].path)), strict=True, assign=True)
    ids = CLIPTokenizer.from_pretrained(house / PIPELINE / "tokenizer")(CAPTIONS[0]).input_ids
    tokens = torch.tensor([ids + [0] * (77 - len(ids))])
    features = model.eval()(input_ids=tokens, pixel_values=through_pillow(picture))
    expected = (features.image_embeds * features.text_embeds).sum(-1)
    torch.testing.assert_close(our_score, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_score_agrees_with_open_clip(house, picture, our_score):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed (extra `reference`)")
    model = open_clip.create_model("ViT-H-14").eval()
    model.load_state_dict({name: weight.float() for name, weight in weights_of(house / HPS["v2.1"].path).items()})
    ids = CLIPTokenizer.from_pretrained(house / PIPELINE / "tokenizer")(CAPTIONS[0]).input_ids
    tokens = torch.tensor([ids + [0] * (77 - len(ids))])
    features = model.encode_image(through_pillow(picture)), model.encode_text(tokens)
    torch.testing.assert_close(our_score, torch.cosine_similarity(*features), rtol=0, atol=1e-5)
