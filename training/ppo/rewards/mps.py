"""MPS (Zhang et al., CVPR 2024, arXiv 2405.14705): a CLIP ViT-H/14 whose image looks at what a condition asks about.

The condition, a list of words, says which tokens of the prompt count; the image's tokens attend to these alone. Trained
on overall preference, it is published as a module pickled whole, with the CLIP under `model.` as transformers names it,
and the layers between image and text under `cross_model.`. No code of the file is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from errors import InputError
from models import clip
from models.checkpoints import read_module
from models.devices import to_device
from models.loading import check_fit, load_tokenizer, read_json
from models.recent import RecentTensors
from training.ppo.rewards.batched import Scoring, require_pairs
from training.ppo.rewards.clip_scorer import ClipScorer
from training.ppo.rewards.named import NamedReward, RewardFiles

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
"""What overall preference asks about, as the authors do."""

RELEVANT = 0.01  # share of the most similar token's similarity to the condition, above which a token is looked at
HEAD_WIDTH = 64


class CrossAttention(nn.Module):
    """x + attention to another sequence + feed-forward, both of one normalised x; all heads share key and value."""

    def __init__(self, width: int, heads: int) -> None:
        """New weights; `width` of both sequences."""
        super().__init__()
        self.norm = Norm(width)
        self.to_q = nn.Linear(width, heads * HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(heads * HEAD_WIDTH, width, bias=False)
        inner = 4 * width
        self.ff = nn.Sequential(nn.Linear(width, 2 * inner, bias=False), SwiGLU(), nn.Linear(inner, width, bias=False))

    def forward(self, x: Tensor, context: Tensor, looked_at: Tensor) -> Tensor:
        """x [N, I, D], context [N, J, D], looked_at bool [N, J]."""
        y = self.norm(x)
        keys, values = self.to_kv(context).chunk(2, dim=-1)
        mask = looked_at[:, None, None, :]
        return x + self.to_out(_attended(self.to_q(y), keys, values, mask)) + self.ff(y)


class SelfAttention(nn.Module):
    """x + attention to itself, by rotary positions + feed-forward, both of the same normalised x, in one product."""

    def __init__(self, width: int, heads: int) -> None:
        """New weights."""
        super().__init__()
        inner = 4 * width
        self.parts = (heads * HEAD_WIDTH, HEAD_WIDTH, HEAD_WIDTH, 2 * inner)
        self.norm = Norm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * HEAD_WIDTH, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(inner, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, I, D]."""
        queries, keys, values, gated = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        heads = queries.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)  # [N, heads, I, HEAD_WIDTH]
        queries, keys = _rotated(heads).transpose(1, 2).flatten(2), _rotated(keys)
        return x + self.attn_out(_attended(queries, keys, values)) + self.ff_out(gated)


class Norm(nn.Module):
    """A layer norm whose bias is no parameter: it is there, and was never trained."""

    def __init__(self, width: int) -> None:
        """New weights."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias)


class SwiGLU(nn.Module):
    """silu(b) a of the halves a and b (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 D] to [..., D]."""
        value, gate = x.chunk(2, dim=-1)
        return functional.silu(gate) * value


class Preference(nn.Module):
    """The CLIP, and the layers through which the image looks at the prompt."""

    def __init__(self, model: nn.Module, width: int, layers: int, heads: int) -> None:
        """Take over the CLIP model; the rest has new weights."""
        super().__init__()
        self.clip, self.config = model, model.config
        self.layers = nn.ModuleList(
            nn.ModuleList([CrossAttention(width, heads), SelfAttention(width, heads)]) for _ in range(layers)
        )

    def forward(self, pixels: Tensor, text: Tensor, looked_at: Tensor) -> Tensor:
        """The image's features [N, D], having looked at the text's tokens [N, L, D] where `looked_at` [N, L]."""
        x = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).last_hidden_state)
        for cross, own in self.layers:
            x = own(cross(x, text, looked_at))
        return x[:, 0]


class MPS(ClipScorer):
    """Temperature times the cosine of the prompt and of the image that looked at it; some 5 to 20 of good images."""

    def __init__(self, files: RewardFiles, **scoring: Unpack[Scoring]) -> None:
        """Load the checkpoint, a CLIP ViT-H/14's unless it is described; the rest as `ClipScorer` takes it.

        Raises:
            InputError: a file is missing or malformed, or there is too little memory.
        """
        model = load_preference(files.weights, files.model_cfg.get("model_cfg") or read_json(clip.VIT_H_14))
        super().__init__("mps", model, load_tokenizer(files.tokenizer), **scoring)
        self._texts: RecentTensors[dict[str, Tensor]] = RecentTensors()
        self._condition = self._embedded([CONDITION])[0][0]

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [N, 3, H, W] in [0, 1] against their N prompts: [N] float32; NaN stays NaN."""
        require_pairs(images, prompts)
        kept = [self._read(prompt) for prompt in prompts]
        tokens, looked_at, pooled = (torch.stack([one[part] for one in kept]) for part in ("tokens", "mask", "pooled"))
        features = self.of_pixels(images, lambda pixels, rows: self.model(pixels, tokens[rows], looked_at[rows]))
        return self.model.clip.logit_scale.exp().float() * functional.cosine_similarity(features, pooled, dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """See `ClipScorer.image_features`: those of the CLIP, which looked at no text."""
        return self.of_pixels(images, lambda pixels, _: clip.image_features(self.model.clip, pixels))

    @torch.no_grad()
    def _read(self, prompt: str) -> dict[str, Tensor]:
        """Of a prompt: tokens [L, D], the mask of those that the condition asks about [L], pooled [D]."""
        if (kept := self._texts.get(prompt)) is not None:
            return kept
        (tokens,), (pooled,) = self._embedded([prompt])
        similarity = (tokens @ self._condition.T).amax(dim=1)
        mask = similarity / similarity.max() > RELEVANT
        return self._texts.keep(prompt, {"tokens": tokens.clone(), "mask": mask, "pooled": pooled.clone()})

    @torch.no_grad()
    def _embedded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Every token's features [N, L, D], and those of the text [N, D], float32."""
        length = self._context_length
        rows = self.tokenizer(list(texts), truncation=True, max_length=length, padding=False)["input_ids"]
        end = self.tokenizer.eos_token_id  # also in the place of what is not there: other tokens look at it
        tokens = torch.tensor([[*row, *[end] * (length - len(row))] for row in rows])
        model = self.model.clip
        with self.autocast():
            read = model.text_model(input_ids=to_device(tokens, self.device))
            every, whole = model.text_projection(read.last_hidden_state), model.text_projection(read.pooler_output)
        return every.float(), whole.float()


def load_preference(path: Path, model_cfg: Mapping[str, Any]) -> Preference:
    """Read a checkpoint of MPS (float32, CPU, in evaluation mode).

    Raises:
        InputError: it cannot be read, or its tensors do not fit `model_cfg`; each is listed.
    """
    state = read_module(path)
    model = clip.from_transformers(
        {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")},
        clip.clip_config(model_cfg),
        source=str(path),
    )
    # Each layer of theirs is wrapped, as `fn`, by what adds x; and keeps the frequencies of its positions.
    ours = {
        name.removeprefix("cross_model.").replace(".fn.", "."): tensor.to(torch.float32)
        for name, tensor in state.items()
        if name.startswith("cross_model.") and not name.endswith("rotary_emb.inv_freq")
    }
    numbers = {name.split(".")[1] for name in ours if name.startswith("layers.")}
    first = ours.get("layers.0.0.to_q.weight")
    if first is None or first.ndim != 2:
        raise InputError(f"{path} is no checkpoint of MPS: it has no cross_model.layers.0.0.fn.to_q.weight.")
    preference = Preference(model, first.shape[1], len(numbers), first.shape[0] // HEAD_WIDTH)
    expected = {name: tensor for name, tensor in preference.state_dict().items() if not name.startswith("clip.")}
    check_fit(Preference, path, expected, ours)
    preference.load_state_dict(ours, strict=False, assign=True)
    return preference.eval()


def _attended(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of queries [N, I, heads * W] to one key and value [N, J, W] for all heads: [N, I, heads * W]."""
    heads = queries.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
    keys, values = (part[:, None].expand(-1, heads.shape[1], -1, -1) for part in (keys, values))
    return functional.scaled_dot_product_attention(heads, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)


def _rotated(x: Tensor) -> Tensor:
    """x [..., I, W] turned by its places 0, 1, ... (arXiv 2104.09864), each number with the one half the width away."""
    width = x.shape[-1]
    places = torch.arange(x.shape[-2], dtype=torch.float32, device=x.device)
    rates = 10_000 ** -(torch.arange(0, width, 2, dtype=torch.float32, device=x.device) / width)
    angles = torch.outer(places, rates)
    turned = torch.polar(torch.ones_like(angles), angles)
    first, second = x.float().chunk(2, dim=-1)
    complex_x = torch.complex(first, second) * turned
    return torch.cat([complex_x.real, complex_x.imag], dim=-1).to(x.dtype)


REWARD = NamedReward("mps", MPS)
