"""A few plain lines that draw latents, as an oracle for the road that all commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.denoiser import Denoiser
from models.generate import initial_noise
from solvers import Denoise


@torch.no_grad()
def latents_by_hand(
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    solve: Callable[[Denoise, Tensor, Tensor], Tensor],
    sigmas: Tensor,
    guidance_scale: float,
) -> Tensor:
    """Latents [N, C, H, W] of `solve(denoise, x, sigmas)`, one prompt and seed after another."""
    latents = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        text = denoiser.encode([prompt], guidance_scale)
        noise = initial_noise([seed], denoiser.latent_shape, device=denoiser.device, dtype=torch.float32)
        latents.append(
            solve(lambda x, sigma, text=text: denoiser.denoise(x, sigma, text), noise * sigmas[0].float(), sigmas)
        )
    return torch.cat(latents)
