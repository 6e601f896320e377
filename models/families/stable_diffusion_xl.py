"""Stable Diffusion XL (arXiv 2307.01952): a UNet that reads two CLIPs, their pooled text, and the image's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from errors import InputError
from models.backbone import Pipeline, code_files
from models.denoiser import Guidance, GuidanceKind, Text
from models.families.stable_diffusion import unet_latents
from models.latent_diffusion import LatentDiffusion, Parts, TextEncoder, require_fit
from models.processes import VariancePreserving

SIZES = 6  # that the UNet is told: of the original, of the corner it was cropped at, of the target; height, width each


class StableDiffusionXL(LatentDiffusion):
    """Stable Diffusion XL; the refiner, which only finishes images, is another model."""

    backend = "sdxl"
    usual_guidance = Guidance(GuidanceKind.CLASSIFIER_FREE, 5.0)
    modules: ClassVar = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    tokenizers: ClassVar = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer}
    code = (*LatentDiffusion.code, *code_files("families.stable_diffusion", "families.stable_diffusion_xl"))

    @classmethod
    def assembled(cls, pipeline: Pipeline) -> Parts:
        """See `Backbone.assembled`."""
        unet, vae = pipeline.modules["unet"], pipeline.modules["vae"]
        first, second = (pipeline.modules[part] for part in ("text_encoder", "text_encoder_2"))
        config = unet.config
        if config.addition_embed_type != "text_time" or config.time_cond_proj_dim is not None:
            raise InputError(
                f"{pipeline.source}: the UNet is no plain Stable Diffusion XL: its addition_embed_type is "
                f"{config.addition_embed_type!r}, its time_cond_proj_dim {config.time_cond_proj_dim!r}."
            )
        hidden = first.config.hidden_size + second.config.hidden_size
        added = SIZES * config.addition_time_embed_dim + second.config.projection_dim
        require_fit(pipeline, "numbers a token", config.cross_attention_dim, hidden)
        require_fit(pipeline, "numbers of sizes and pooled text", config.projection_class_embeddings_input_dim, added)
        readers = tuple(
            TextEncoder.clip(clip, pipeline.tokenizers[part])
            for clip, part in zip((first, second), ("tokenizer", "tokenizer_2"), strict=True)
        )
        require_fit(pipeline, "tokens", *(reader.limit for reader in readers))
        return Parts(
            pipeline=pipeline,
            text_encoders=readers,
            process=VariancePreserving.from_scheduler_config(pipeline.scheduler, str(pipeline.scheduler_file)),
            latent_shape=unet_latents(pipeline),
            guidance=cls.guidance_of(pipeline.source),
            zero_unconditional=bool(pipeline.index.get("force_zeros_for_empty_prompt", True)),
            wide_vae=vae.config.force_upcast,
        )

    def _read(self, prompts: Sequence[str]) -> Text:
        first, second = (encoder(prompts) for encoder in self.text_encoders)
        return {
            "encoder_hidden_states": torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1),
            "text_embeds": second.text_embeds,
        }

    def _predict(self, z: Tensor, times: Tensor, text: Text, scales: Tensor | None) -> Tensor:
        height, width = self.image_size
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        added = {
            "text_embeds": text["text_embeds"],
            "time_ids": sizes.to(self.device, non_blocking=True).expand(len(z), -1),
        }
        hidden = text["encoder_hidden_states"]
        return self.network(z, times, hidden, added_cond_kwargs=added, return_dict=False)[0]


FAMILY = StableDiffusionXL
