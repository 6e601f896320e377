"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a UNet that reads the hidden states of one CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from diffusers.models import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from errors import InputError
from models.backbone import Pipeline, code_files, sides
from models.denoiser import USUAL_GUIDANCE_SCALE, Guidance, GuidanceKind, Text
from models.latent_diffusion import LatentDiffusion, Parts, TextEncoder, pixels_per_latent
from models.loading import require_size
from models.processes import VariancePreserving

# Parts that change what the UNet is asked for: refiners, upscalers, distilled and class-conditional models.
FOREIGN_UNET_PARTS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1.x or 2.x."""

    backend = "ldm"
    usual_guidance = Guidance(GuidanceKind.CLASSIFIER_FREE, USUAL_GUIDANCE_SCALE)
    modules: ClassVar = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    tokenizers: ClassVar = {"tokenizer": CLIPTokenizer}
    code = (*LatentDiffusion.code, *code_files("families.stable_diffusion", "compvis"))

    @classmethod
    def assembled(cls, pipeline: Pipeline) -> Parts:
        """See `Backbone.assembled`."""
        source, unet = pipeline.source, pipeline.network
        encoder, tokenizer = pipeline.modules["text_encoder"], pipeline.tokenizers["tokenizer"]
        foreign = [part for part in FOREIGN_UNET_PARTS if unet.config[part] is not None]
        if foreign:
            raise InputError(
                f"{source}: the UNet has {', '.join(foreign)}: it is no plain Stable Diffusion 1.x or 2.x model."
            )
        if unet.config.cross_attention_dim != encoder.config.hidden_size:
            raise InputError(
                f"{source}: the UNet reads text of width {unet.config.cross_attention_dim}, "
                f"the text encoder writes width {encoder.config.hidden_size}."
            )
        return Parts(
            pipeline=pipeline,
            text_encoders=(TextEncoder.clip(encoder, tokenizer),),
            process=VariancePreserving.from_scheduler_config(pipeline.scheduler, str(pipeline.scheduler_file)),
            latent_shape=unet_latents(pipeline),
            guidance=cls.guidance_of(pipeline.source),
        )

    def _read(self, prompts: Sequence[str]) -> Text:
        (encoder,) = self.text_encoders
        return {"encoder_hidden_states": encoder(prompts).last_hidden_state}


def unet_latents(pipeline: Pipeline) -> tuple[int, int, int]:
    """The latents (C, H, W) that a UNet is to work on; `InputError` where it cannot, or the VAE knows others."""
    unet, vae = pipeline.modules["unet"], pipeline.modules["vae"]
    height, width = sides(pipeline, require_size(unet, pipeline.source), pixels=pixels_per_latent(vae))
    if unet.config.in_channels != vae.config.latent_channels:
        raise InputError(
            f"{pipeline.source}: the UNet takes {unet.config.in_channels} channels where the VAE has "
            f"{vae.config.latent_channels}: an inpainting or editing model cannot be used here."
        )
    return unet.config.in_channels, height, width


FAMILY = StableDiffusion
