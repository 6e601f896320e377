"""An independent CLIP (arXiv 2103.00020) for tests: plain torch, with open_clip's parameter names."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: nn.Module) -> None:
        super().__init__()
        inner = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = OrderedDict(c_fc=nn.Linear(width, inner), gelu=activation, c_proj=nn.Linear(inner, width))
        self.mlp = nn.Sequential(layers)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, mlp_ratio: float, activation: nn.Module) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp_ratio, activation) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, cfg: dict[str, Any], embed_dim: int, activation: nn.Module) -> None:
        super().__init__()
        width, patch = cfg["width"], cfg["patch_size"]
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((cfg["image_size"] // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        heads = width // cfg["head_width"]
        self.transformer = Transformer(width, heads, cfg["layers"], cfg.get("mlp_ratio", 4.0), activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).mT  # [N, patches, width]
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class PlainCLIP(nn.Module):
    def __init__(self, model_cfg: dict[str, Any]) -> None:
        super().__init__()
        activation = QuickGELU() if model_cfg.get("quick_gelu", False) else nn.GELU()
        text = model_cfg["text_cfg"]
        width, length = text["width"], text["context_length"]
        self.visual = Vision(model_cfg["vision_cfg"], model_cfg["embed_dim"], activation)
        self.token_embedding = nn.Embedding(text["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.transformer = Transformer(width, text["heads"], text["layers"], text.get("mlp_ratio", 4.0), activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, model_cfg["embed_dim"]))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("mask", torch.full((length, length), -torch.inf).triu(1), persistent=False)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, self.mask))
        return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection


def random_plain_clip(model_cfg: dict[str, Any], seed: int = 0) -> PlainCLIP:
    """A plain CLIP all of whose parameters matter: biases and layer norms are random too."""
    generator = torch.Generator().manual_seed(seed)
    model = PlainCLIP(model_cfg).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
        fan_in = parameter[0].numel() if parameter.ndim > 1 and "embedding" not in name else 1
        parameter.copy_(centre + noise * (fan_in**-0.5 if parameter.ndim > 1 else 0.3))
    return model


def write_letter_tokenizer(folder: Path) -> int:
    """Write vocab.json and merges.txt in which each letter is a token, and `ab` too; return the vocabulary's size.

    Ids: `a` .. `z` inside a word 0 .. 25, at its end 26 .. 51, `ab` at a word's end 52, start 53, end 54.
    """
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return len(vocabulary)
