"""A whole Stable Diffusion pipeline of a few thousand random weights in the true file formats, built in a second."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.latent_diffusion import Parts

TOKEN_LIMIT = 24  # begin and end marks included; every letter of a prompt is one token
TEXT_WIDTH = 12
LETTERS = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
VOCABULARY = {token: number for number, token in enumerate([*LETTERS, "<|startoftext|>", "<|endoftext|>"])}


def tiny_unet(**changes: object) -> UNet2DConditionModel:
    """Latents [4, 8, 8], text of width 12."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return UNet2DConditionModel(**{**config, **changes})


def tiny_vae() -> AutoencoderKL:
    """Images [3, 16, 16], latents [4, 8, 8]."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )


def tiny_text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=TEXT_WIDTH,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKEN_LIMIT,
            bos_token_id=VOCABULARY["<|startoftext|>"],
            eos_token_id=VOCABULARY["<|endoftext|>"],
            pad_token_id=VOCABULARY["<|endoftext|>"],
        )
    )


def tiny_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=VOCABULARY, merges=[], model_max_length=TOKEN_LIMIT)


def save_tiny_pipeline(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Write the pipeline to `folder`, each part by its own library, and return the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"unet": tiny_unet(), "vae": tiny_vae(), "text_encoder": tiny_text_encoder()}
    parts["tokenizer"] = tiny_tokenizer()
    parts["scheduler"] = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    index: dict[str, object] = {"_class_name": "StableDiffusionPipeline"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = "diffusers" if name in ("unet", "vae", "scheduler") else "transformers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def modules_of(parts: Parts) -> list[nn.Module]:
    """Network, VAE and text encoders."""
    return [parts.pipeline.network, parts.pipeline.modules["vae"], *(encoder.module for encoder in parts.text_encoders)]


def widen_decoder(folder: Path) -> Path:
    """Have the decoder of a pipeline go through numbers that float16 cannot hold; its images stay what they are."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_in.weight"] *= 3e5
    state["decoder.conv_in.bias"] *= 0
    save_file(state, file, metadata={"format": "pt"})
    return folder
