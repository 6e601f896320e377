"""The names that the CompVis code gives to the weights of Stable Diffusion 1.x, derived from those of diffusers.

The reverse of what models/loading.py does through diffusers, written by hand: files are made with it, and the tests
hold one against the other.
"""

from __future__ import annotations

import re

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def compvis_state_dict(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel
) -> dict[str, Tensor]:
    """All weights of a pipeline, as a single file holds them."""
    return {
        **{f"model.diffusion_model.{name}": weight for name, weight in unet_names(unet).items()},
        **{f"first_stage_model.{name}": weight for name, weight in vae_names(vae).items()},
        **{
            f"cond_stage_model.transformer.text_model.{name}": weight
            for name, weight in text_encoder.state_dict().items()
        },
    }


def unet_names(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The UNet's weights, under their names after `model.diffusion_model.`."""
    layers = unet.config.layers_per_block
    attends = [kind.startswith("CrossAttn") for kind in unet.config.up_block_types]
    return {_unet_name(name, layers, attends): weight for name, weight in unet.state_dict().items()}


def _unet_name(name: str, layers: int, attends: list[bool]) -> str:
    part, _, rest = name.partition(".")
    if part in ("time_embedding", "conv_in", "conv_norm_out", "conv_out"):
        top, _, kind = name.rpartition(".")
        return f"{UNET_TOP[top]}.{kind}"
    if part == "mid_block":
        kind, index, rest = rest.split(".", 2)
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{_unet_inner(kind, rest)}"
    block, kind, index, rest = rest.split(".", 3)
    i, j = int(block), int(index)
    if part == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(i + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{i * (layers + 1) + j + 1}.{int(kind == 'attentions')}.{_unet_inner(kind, rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{i * (layers + 1) + layers}.{2 if attends[i] else 1}.{rest}"
    return f"output_blocks.{i * (layers + 1) + j}.{int(kind == 'attentions')}.{_unet_inner(kind, rest)}"


def _unet_inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    layer, _, parameter = rest.rpartition(".")
    return f"{UNET_RESNET[layer]}.{parameter}"


def vae_names(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The autoencoder's weights, under their names after `first_stage_model.`."""
    last = len(vae.config.block_out_channels) - 1
    renamed = {}
    for name, weight in vae.state_dict().items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{last - int(found[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", new)
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1")
            for ours, theirs in VAE_ATTENTION.items():
                new = new.replace(f".{ours}.", f".{theirs}.")
            if weight.ndim == 2:  # a linear map here is a 1x1 convolution there
                weight = weight[:, :, None, None]
        renamed[new] = weight
    return renamed
