"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): an MMDiT trained by flow matching, which reads two CLIPs and a T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers.models import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from models.backbone import Pipeline, code_files, sides
from models.denoiser import Guidance, GuidanceKind, Text
from models.latent_diffusion import LatentDiffusion, Parts, TextEncoder, pixels_per_latent, require_fit
from models.loading import require_size
from models.processes import FlowMatching

T5_TOKENS = 256  # that the transformer reads of T5, its mark included


class StableDiffusion3(LatentDiffusion):
    """Stable Diffusion 3 or 3.5.

    A pipeline may do without T5, the largest of the text encoders: its part of the text is then zeros. Where it is
    there, a prompt may be longer than what the CLIPs read.
    """

    backend = "sd3"
    usual_guidance = Guidance(GuidanceKind.CLASSIFIER_FREE, 7.0)
    modules: ClassVar = {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    tokenizers: ClassVar = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5Tokenizer}
    known_options = LatentDiffusion.known_options | {"without_t5"}
    optional: ClassVar = {"text_encoder_3": "tokenizer_3"}
    code = (*LatentDiffusion.code, *code_files("families.stable_diffusion_3"))

    @classmethod
    def assembled(cls, pipeline: Pipeline) -> Parts:
        """See `Backbone.assembled`."""
        transformer, vae = pipeline.modules["transformer"], pipeline.modules["vae"]
        clips = [pipeline.modules[part] for part in ("text_encoder", "text_encoder_2")]
        t5 = pipeline.modules.get("text_encoder_3")
        config = transformer.config
        native, patch = require_size(transformer, pipeline.source), config.patch_size
        largest = patch * config.pos_embed_max_size
        height, width = sides(pipeline, native, pixels=pixels_per_latent(vae), patch=patch, largest=largest)
        projected = sum(clip.config.projection_dim for clip in clips)
        require_fit(pipeline, "latent channels", config.in_channels, vae.config.latent_channels)
        require_fit(pipeline, "numbers of pooled text", config.pooled_projection_dim, projected)
        encoders = [
            TextEncoder.clip(clip, pipeline.tokenizers[part], reads_all=t5 is None)
            for clip, part in zip(clips, ("tokenizer", "tokenizer_2"), strict=True)
        ]
        require_fit(pipeline, "tokens", *(encoder.limit for encoder in encoders))
        if t5 is not None:
            require_fit(pipeline, "numbers a token of T5", config.joint_attention_dim, t5.config.d_model)
            encoders.append(TextEncoder(t5, pipeline.tokenizers["tokenizer_3"], T5_TOKENS))
        tokens = height * width // patch**2
        return Parts(
            network=transformer,
            vae=vae,
            text_encoders=tuple(encoders),
            process=FlowMatching.from_scheduler_config(pipeline.scheduler, str(pipeline.scheduler_file), tokens),
            latent_shape=(config.in_channels, height, width),
            guidance=cls.guidance_of(pipeline.source),
            options=pipeline.options,
        )

    def _read(self, prompts: Sequence[str]) -> Text:
        first, second, *t5 = (encoder(prompts) for encoder in self.text_encoders)
        width = self.network.config.joint_attention_dim
        short = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        long = t5[0].last_hidden_state if t5 else short.new_zeros(len(short), T5_TOKENS, width)
        padded = functional.pad(short, (0, width - short.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([padded, long], dim=1),
            "pooled_projections": torch.cat([first.text_embeds, second.text_embeds], dim=-1),
        }

    def _predict(self, z: Tensor, times: Tensor, text: Text, scales: Tensor | None) -> Tensor:
        return self.network(z, timestep=times, **text, return_dict=False)[0]


FAMILY = StableDiffusion3
