"""Stock pipelines of diffusers with a few thousand random weights, one of each family that a solver is played in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.tiny_pipeline import (
    TEXT_WIDTH,
    TOKEN_LIMIT,
    VOCABULARY,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)

FLOW_CHANNELS = 4


def tiny_sd(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    with _seeded():
        scheduler = _scaled_linear(prediction_type)
        parts = {"unet": tiny_unet(), "vae": tiny_vae(), "text_encoder": tiny_text_encoder()}
    return _quiet(
        StableDiffusionPipeline(
            **parts,
            tokenizer=tiny_tokenizer(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def tiny_xl() -> StableDiffusionXLPipeline:
    """Two text encoders of width 12, and the sizes of the image beside them."""
    with _seeded():
        unet = tiny_unet(
            cross_attention_dim=2 * TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + TEXT_WIDTH,
        )
        vae, encoders = tiny_vae(), (tiny_text_encoder(), _projecting_encoder())
    tokenizer, scheduler = tiny_tokenizer(), _scaled_linear("epsilon")
    return _quiet(
        StableDiffusionXLPipeline(vae, *encoders, tokenizer, tokenizer, unet, scheduler, add_watermarker=False)
    )


def tiny_sd3() -> StableDiffusion3Pipeline:
    """Two text encoders; none of T5's kind, for which the pipeline puts zeros."""
    with _seeded():
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=FLOW_CHANNELS,
            out_channels=FLOW_CHANNELS,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=16,
        )
        # what is zero at the start of a training, and would make a network that answers nothing
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)
        for block in [transformer.norm_out, *transformer.transformer_blocks]:
            for name, weight in block.named_parameters():
                if "linear.weight" in name:
                    torch.nn.init.normal_(weight, std=0.3)
        encoders = _projecting_encoder(), _projecting_encoder()
        vae = _flow_vae()
    tokenizer, scheduler = tiny_tokenizer(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _quiet(
        StableDiffusion3Pipeline(
            transformer, scheduler, vae, encoders[0], tokenizer, encoders[1], tokenizer, None, None
        )
    )


def tiny_flux() -> FluxPipeline:
    """No text encoders: it is called with embeddings."""
    with _seeded():
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * FLOW_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
        vae = _flow_vae()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return _quiet(FluxPipeline(scheduler, vae, None, None, None, None, transformer))


def _scaled_linear(prediction_type: str) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


def _flow_vae() -> AutoencoderKL:
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    return vae


def _projecting_encoder() -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKEN_LIMIT,
        projection_dim=TEXT_WIDTH,
        bos_token_id=VOCABULARY["<|startoftext|>"],
        eos_token_id=VOCABULARY["<|endoftext|>"],
        pad_token_id=VOCABULARY["<|endoftext|>"],
    )
    return CLIPTextModelWithProjection(config)


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
