"""The network that is trained: all weights of a copy of the DDPM's, or low-rank additions to it (LoRA)."""

from __future__ import annotations

import copy

import peft
import torch
from diffusers import UNet2DModel
from torch import nn

from models.randomness import seed_globally

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
"""Names of the layers that get additions: the attention's projections and the residual blocks' convolutions."""


def trained_copy(network: UNet2DModel, lora_rank: int, seed: int) -> nn.Module:
    """A copy that does what `network` does, with the weights that are to be trained requiring gradients.

    Args:
        network: left alone.
        lora_rank: 0 for all weights; otherwise the rank of the additions (arXiv 2106.09685), which begin at zero.
        seed: of the additions' other factor.
    """
    copied = copy.deepcopy(network).requires_grad_(lora_rank == 0)
    if lora_rank == 0:
        return copied
    with torch.random.fork_rng(devices=[]):
        seed_globally(seed)
        settings = peft.LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=list(LORA_TARGETS))
        return peft.get_peft_model(copied, settings).eval()


def merged(network: nn.Module) -> UNet2DModel:
    """A plain copy of a trained network, with additions worked into the weights."""
    copied = copy.deepcopy(network)
    return copied.merge_and_unload() if isinstance(copied, peft.PeftModel) else copied
