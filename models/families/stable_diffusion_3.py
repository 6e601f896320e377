"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): an MMDiT trained by flow matching, which reads two CLIPs and a T5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from models.backbone import Pipeline, code_files, sides
from models.denoiser import Guidance, GuidanceKind, Text
from models.latent_diffusion import LatentDiffusion, Parts, TextEncoder, pixels_per_latent, require_fit
from models.loading import require_size
from models.processes import FlowMatching

T5_TOKENS = 256  # that the transformer reads of T5, its mark included


class SharedTokenAttention:
    """Joint attention in which the last token of the text stands for several equal ones.

    Without T5 the transformer reads 256 zeros in its place. No position is added to text, so they stay equal in every
    block, and one of them whose key counts as many is the same, up to rounding; of an image of few tokens they would
    be most of the work. A larger image is better served by the fused attention that no bias slows.
    """

    def __init__(self, count: int) -> None:
        """`count`: how many equal tokens the last one stands for."""
        self.bias = math.log(count)  # exp(score + log n) = n exp(score)

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image tokens [N, L, D] and text [N, M, D] -> both after attention; without text, the image's alone."""

        def split(projected: Tensor, norm: nn.Module | None = None) -> Tensor:
            heads = projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [N, H, L, D / H]
            return heads if norm is None else norm(heads)

        queries = split(attn.to_q(hidden_states), attn.norm_q)
        keys = split(attn.to_k(hidden_states), attn.norm_k)
        values = split(attn.to_v(hidden_states))
        if encoder_hidden_states is None:
            mixed = functional.scaled_dot_product_attention(queries, keys, values)
            return attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        queries = torch.cat([queries, split(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], dim=2)
        keys = torch.cat([keys, split(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], dim=2)
        values = torch.cat([values, split(attn.add_v_proj(encoder_hidden_states))], dim=2)
        bias = queries.new_zeros(keys.shape[2])
        bias[-1] = self.bias
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias.expand(1, 1, 1, -1))
        image, text = (
            mixed.transpose(1, 2).flatten(2).split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        )
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def joint_text(clips: Sequence[Any], width: int, *, t5: Tensor | None = None, blank_tokens: int = T5_TOKENS) -> Text:
    """What the transformer reads of both CLIPs' outputs, and of T5's states [N, T, width] or so many zeros."""
    short = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
    long = short.new_zeros(len(short), blank_tokens, width) if t5 is None else t5
    padded = functional.pad(short, (0, width - short.shape[-1]))
    return {
        "encoder_hidden_states": torch.cat([padded, long], dim=1),
        "pooled_projections": torch.cat([clip.text_embeds for clip in clips], dim=-1),
    }


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
        if t5 is None and tokens <= T5_TOKENS:
            transformer.set_attn_processor(SharedTokenAttention(T5_TOKENS))
        return Parts(
            pipeline=pipeline,
            text_encoders=tuple(encoders),
            process=FlowMatching.from_scheduler_config(pipeline.scheduler, str(pipeline.scheduler_file), tokens),
            latent_shape=(config.in_channels, height, width),
            guidance=cls.guidance_of(pipeline.source),
        )

    def _read(self, prompts: Sequence[str]) -> Text:
        clips, t5 = (encoder(prompts) for encoder in self.text_encoders[:2]), self.text_encoders[2:]
        shared = any(isinstance(one, SharedTokenAttention) for one in self.network.attn_processors.values())
        return joint_text(
            list(clips),
            self.network.config.joint_attention_dim,
            t5=t5[0](prompts).last_hidden_state if t5 else None,
            blank_tokens=1 if shared else T5_TOKENS,
        )


FAMILY = StableDiffusion3
