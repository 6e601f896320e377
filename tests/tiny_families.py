"""Pipelines of a few thousand random weights of every family, written by diffusers as the published ones are."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from models.pixel_diffusion import NEWER_ATTENTION
from tests.ddpm.tiny_ddpm import SCHEDULER, tiny_network
from tests.tiny_pipeline import TOKEN_LIMIT, VOCABULARY, tiny_tokenizer, tiny_unet

T5_WIDTH = 32


def tiny_vae(shift_factor: float | None = 0.06) -> AutoencoderKL:
    """Images [3, 2H, 2W], latents [4, H, W], scaled, and shifted unless None."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip_config(width: int = 12, projection: int = 10) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        projection_dim=projection,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKEN_LIMIT,
        bos_token_id=VOCABULARY["<|startoftext|>"],
        eos_token_id=VOCABULARY["<|endoftext|>"],
        pad_token_id=VOCABULARY["<|endoftext|>"],
        initializer_factor=5.0,  # else every text is nearly the same to it
    )


def second_tokenizer() -> CLIPTokenizer:
    """Pads with its first token, as the published ones do."""
    return CLIPTokenizer(vocab=VOCABULARY, merges=[], model_max_length=TOKEN_LIMIT, pad_token="a")


def tiny_t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=4 + 2 * len(string.ascii_lowercase),
            d_model=T5_WIDTH,
            d_kv=8,
            d_ff=16,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            initializer_factor=2.0,
        )
    )


def t5_tokenizer() -> T5Tokenizer:
    """Every letter is a token."""
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(token, -3.0) for letter in string.ascii_lowercase for token in (letter, f"▁{letter}")]
    return T5Tokenizer(vocab=[*marks, *letters], extra_ids=0, model_max_length=512)


def stable_diffusion_3(*, with_t5: bool = True, positions: int = 8, **scheduler: object) -> StableDiffusion3Pipeline:
    """Images [3, 16, 16], latents [4, 8, 8]; at most `positions` patches of 2 along each side."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=10 + 14,
            pos_embed_max_size=positions,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=tiny_vae(),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(16, 14)),
        tokenizer_2=second_tokenizer(),
        text_encoder_3=tiny_t5() if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def stable_diffusion_xl(*, prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    """Images [3, 16, 16], latents [4, 8, 8]."""
    return StableDiffusionXLPipeline(
        unet=tiny_unet(
            cross_attention_dim=12 + 16,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 14,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            steps_offset=1,
            timestep_spacing="leading",
        ),
        vae=tiny_vae(shift_factor=None),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(16, 14)),
        tokenizer_2=second_tokenizer(),
    )


def flux(*, guided: bool = True) -> FluxPipeline:
    """Latents of 4 channels; images of any size. With guidance [dev], without [schnell]."""
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=4 * 4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=12,
            guidance_embeds=guided,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided),
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_t5(),
        tokenizer_2=t5_tokenizer(),
    )


def pixel_ddpm(**scheduler: object) -> DDPMPipeline:
    """Images [3, 8, 8]."""
    return DDPMPipeline(tiny_network(), DDPMScheduler(**{**SCHEDULER, **scheduler}))


def dit(*, learned_variance: bool = True) -> DiTPipeline:
    """Images [3, 16, 16], latents [4, 8, 8], 1000 classes, of which diffusers' pipeline takes the next for none."""
    return DiTPipeline(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8 if learned_variance else 4,
            num_layers=2,
            sample_size=8,
        ),
        tiny_vae(shift_factor=None),
        DDIMScheduler(clip_sample=False),
    )


PIPELINES = {"ddpm": pixel_ddpm, "dit": dit, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3, "flux": flux}


def save_tiny_family(name: str, folder: Path, **options: object) -> Path:
    """Write a family's pipeline to `folder`, the same numbers each time, and return the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        PIPELINES[name](**options).save_pretrained(folder)
    return folder


def save_flat_ddpm(folder: Path) -> Path:
    """A DDPM as google/ddpm-* lie on the hub: all in one folder, its attention under the names of that time."""
    save_tiny_family("ddpm", folder)
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    for older, newer in NEWER_ATTENTION.items():
        state = {name.replace(f".{newer}.", f".{older}."): tensor for name, tensor in state.items()}
    save_file(state, file, metadata={"format": "pt"})
    return folder


def stock_pipeline(folder: Path) -> DiffusionPipeline:
    """diffusers' own pipeline of a folder."""
    index = json.loads((folder / "model_index.json").read_text())
    left_out = {part: None for part in ("text_encoder_3", "tokenizer_3") if index.get(part) == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
