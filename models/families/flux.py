"""FLUX.1: a transformer trained by flow matching on patches of latents, which reads a T5, and a CLIP's pooled text.

[dev] was distilled to be told its guidance: a scale is one of its inputs. [schnell] knows none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers.models import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from models.backbone import Pipeline, code_files, sides
from models.denoiser import Guidance, GuidanceKind, Text
from models.latent_diffusion import LatentDiffusion, Parts, TextEncoder, pixels_per_latent, require_fit
from models.loading import read_json
from models.processes import FlowMatching

DEV, SCHNELL = Guidance(GuidanceKind.EMBEDDED, 3.5), Guidance(GuidanceKind.NONE, 1.0)
T5_TOKENS = {DEV.kind: 512, SCHNELL.kind: 256}  # that the transformer reads of T5
PATCH = 2  # latents a token along each side
NATIVE_SIDE = 128  # latents; the transformer's configuration does not say it


class Flux(LatentDiffusion):
    """FLUX.1 [dev] or [schnell]."""

    backend = "flux"
    modules: ClassVar = {
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }
    half = torch.bfloat16
    known_options = LatentDiffusion.known_options - {"negative_prompt"}
    tokenizers: ClassVar = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5Tokenizer}
    code = (*LatentDiffusion.code, *code_files("families.flux"))

    @classmethod
    def assembled(cls, pipeline: Pipeline) -> Parts:
        """See `Backbone.assembled`."""
        transformer, vae = pipeline.modules["transformer"], pipeline.modules["vae"]
        clip, t5 = (pipeline.modules[part] for part in ("text_encoder", "text_encoder_2"))
        config = transformer.config
        channels = vae.config.latent_channels
        require_fit(pipeline, "numbers a patch", config.in_channels, channels * PATCH**2)
        require_fit(pipeline, "numbers a token of T5", config.joint_attention_dim, t5.config.d_model)
        require_fit(pipeline, "numbers of pooled text", config.pooled_projection_dim, clip.config.hidden_size)
        height, width = sides(pipeline, (NATIVE_SIDE, NATIVE_SIDE), pixels=pixels_per_latent(vae), patch=PATCH)
        tokens = height * width // PATCH**2
        guidance = cls.guidance_of(pipeline.source)
        return Parts(
            pipeline=pipeline,
            text_encoders=(
                TextEncoder.clip(clip, pipeline.tokenizers["tokenizer"], reads_all=False),
                TextEncoder(t5, pipeline.tokenizers["tokenizer_2"], T5_TOKENS[guidance.kind]),
            ),
            process=FlowMatching.from_scheduler_config(pipeline.scheduler, str(pipeline.scheduler_file), tokens),
            latent_shape=(channels, height, width),
            guidance=guidance,
        )

    @classmethod
    def usual_guidance_of(cls, folder: Path) -> Guidance:
        """See `Backbone.usual_guidance_of`."""
        return DEV if read_json(folder / "transformer" / "config.json").get("guidance_embeds") else SCHNELL

    def _read(self, prompts: Sequence[str]) -> Text:
        clip, t5 = (encoder(prompts) for encoder in self.text_encoders)
        return {"encoder_hidden_states": t5.last_hidden_state, "pooled_projections": clip.pooler_output}

    def _predict(self, z: Tensor, times: Tensor, text: Text, scales: Tensor | None) -> Tensor:
        patches = functional.pixel_unshuffle(z, PATCH)  # [N, 4C, H/2, W/2]
        height, width = patches.shape[2:]
        counted = [torch.arange(float(count), device=self.device) for count in (1, height, width)]
        prediction = self.network(
            hidden_states=patches.flatten(2).transpose(1, 2),
            timestep=times / self.process.num_steps,
            guidance=scales if self.guidance is GuidanceKind.EMBEDDED else None,
            img_ids=torch.cartesian_prod(*counted),
            txt_ids=torch.zeros(text["encoder_hidden_states"].shape[1], 3, device=self.device),
            **text,
            return_dict=False,
        )[0]
        return functional.pixel_shuffle(prediction.transpose(1, 2).unflatten(2, (height, width)), PATCH)


FAMILY = Flux
