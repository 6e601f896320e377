"""ImageReward (Xu et al., arXiv 2304.05977): a BLIP that reads the prompt with an eye on the image, and a head.

Published as `ImageReward.pt`, the tensors of a BLIP (arXiv 2201.12086) under `blip.` and of a stack of linear layers
under `mlp.`, and `med_config.json`, which describes the text half. The halves are held as transformers' modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from errors import InputError, first_line
from models.checkpoints import read_state_dict
from models.devices import to_device
from models.loading import fill, load_tokenizer
from models.skeletons import require_counts, skeleton
from training.ppo.rewards.aesthetic import linear_head
from training.ppo.rewards.batched import BatchedScorer, Scoring, require_pairs
from training.ppo.rewards.named import NamedReward, RewardFiles

TOKENS = 35  # that it was trained to read of a prompt, the marks of start and end among them
HEAD_WIDTH = 64  # of the attention in BLIP's image half
# Of the rewards on the authors' validation set: what is published is standardised by them.
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072

# From BLIP's names to those of transformers, the first that fits; those of the text half are the same.
_RENAMED = (
    (r"visual_encoder\.cls_token", "embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.(\w+)", r"embeddings.patch_embedding.\1"),
    (r"visual_encoder\.norm\.(\w+)", r"post_layernorm.\1"),
    (r"visual_encoder\.blocks\.(\d+)\.norm(\d)\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.(\w+)\.(\w+)", r"encoder.layers.\1.mlp.\2.\3"),
)
# In the file and no part of the reward: what BLIP was trained by, and the numbers 0, 1, 2, ... of the positions.
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.\w+|blip\.text_encoder\.embeddings\.position_ids")


class Blip(nn.Module):
    """BLIP's two halves: the text half looks at the image through cross-attention."""

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel) -> None:
        """Take over both."""
        super().__init__()
        self.vision, self.text = vision, text

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, S, S] to [N, 1 + patches, D]; the first sums the image up."""
        return self.vision(pixel_values=pixels).last_hidden_state

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The text's first token [N, W], having seen the image; tokens, mask: [N, L]."""
        seen = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=self.image_tokens(pixels),
            is_decoder=False,  # every token sees all others
        )
        return seen.last_hidden_state[:, 0]


class ImageReward(BatchedScorer):
    """How well an image answers its prompt, in standard deviations from the mean of the authors' images."""

    reads_prompts = True

    def __init__(self, files: RewardFiles, **scoring: Unpack[Scoring]) -> None:
        """Load the checkpoint, described by med_config.json; the rest as `BatchedScorer` takes it.

        Raises:
            InputError: a file is missing or malformed, they do not fit each other, or there is too little memory.
        """
        weights, tokenizer = files.weights, files.tokenizer
        state = {name: tensor for name, tensor in read_state_dict(weights).items() if not _UNUSED.fullmatch(name)}
        blip = load_blip(_below(state, "blip."), files.model_cfg, weights)
        width = blip.text.config.hidden_size
        left = {name: tensor for name, tensor in state.items() if not name.startswith("blip.")}
        weight, bias = linear_head(_below(left, "mlp."), width, f"{weights}: its head")
        size = blip.vision.config.image_size
        super().__init__("imagereward", blip, size, **scoring)
        self.weight, self.bias = weight.to(self.device), bias.to(self.device)
        self.tokenizer = load_tokenizer(tokenizer, BertTokenizer)
        if len(self.tokenizer) > blip.text.config.vocab_size:
            raise InputError(
                f"The tokenizer in {tokenizer} does not belong to {weights}: it has {len(self.tokenizer)} "
                f"tokens, the model knows {blip.text.config.vocab_size}."
            )

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [N, 3, H, W] in [0, 1] against their N prompts: [N] float32; NaN stays NaN."""
        require_pairs(images, prompts)
        read = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        tokens, mask = (to_device(read[name], self.device) for name in ("input_ids", "attention_mask"))
        features = self.of_pixels(images, lambda pixels, rows: self.model(pixels, tokens[rows], mask[rows]))
        return (features @ self.weight + self.bias - MEAN) / DEVIATION

    def image_features(self, images: Tensor) -> Tensor:
        """Embed images [N, 3, H, W] in [0, 1]: [N, D] float32, the token that sums each up."""
        return self.of_pixels(images, lambda pixels, _: self.model.image_tokens(pixels)[:, 0])

    def say_what_is_cut(self, prompts: Sequence[str]) -> None:
        """See `Reward.say_what_is_cut`."""
        different = list(dict.fromkeys(prompts))
        rows = self.tokenizer(different, truncation=False, verbose=False)["input_ids"]
        self.say_what_is_lost(self.tokenizer, different, sum(len(row) > TOKENS for row in rows), TOKENS - 2)


def load_blip(state: Mapping[str, Tensor], med_config: Mapping[str, Any], source: Path) -> Blip:
    """BLIP's halves (float32, CPU, in evaluation mode) of tensors under its own names.

    The size of the image half is that of its tensors; `med_config` says that of the text half.

    Raises:
        InputError: tensors are missing, left over or of another shape, or the description is none.
    """
    renamed = {_renamed(name): tensor.to(torch.float32) for name, tensor in state.items()}
    text = {
        name.removeprefix("text_encoder."): renamed.pop(name)
        for name in list(renamed)
        if name.startswith("text_encoder.")
    }
    try:
        vision_config = _vision_config(renamed)
        require_counts(dict(med_config))
        text_config = BlipTextConfig.from_dict(
            {
                **{key: value for key, value in med_config.items() if key not in ("architectures", "model_type")},
                "encoder_hidden_size": vision_config.hidden_size,
                "is_decoder": True,  # has cross-attention
                **{f"{mark}_token_id": None for mark in ("bos", "eos", "sep")},
            }
        )
        vision = skeleton(lambda: BlipVisionModel(vision_config), renamed)
        written = skeleton(lambda: BlipTextModel(text_config, add_pooling_layer=False), text)
    except Exception as error:  # what a description makes the library trip over can be anything
        raise InputError(f"{source} holds no BLIP that its description fits: {first_line(error)}") from error
    fill(vision, renamed, source, assign=True)
    fill(written, text, source, assign=True)
    # The one tensor that no checkpoint holds, and that is therefore still without memory.
    written.embeddings.position_ids = torch.arange(text_config.max_position_embeddings)[None]
    return Blip(vision, written).eval()


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _renamed(name: str) -> str:
    for pattern, ours in _RENAMED:
        if found := re.fullmatch(pattern, name):
            return found.expand(ours)
    return name


def _vision_config(state: Mapping[str, Tensor]) -> BlipVisionConfig:
    """What the tensors of the image half say of it."""
    width = state["embeddings.class_embedding"].shape[-1]
    patch = state["embeddings.patch_embedding.weight"].shape[-1]
    patches = state["embeddings.position_embedding"].shape[1] - 1
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.layers.")}
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * math.isqrt(patches),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


REWARD = NamedReward("imagereward", ImageReward, tokenizer="weights/bert-base-uncased")
