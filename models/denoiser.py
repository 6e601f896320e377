"""What the floors above know of a frozen text-to-image diffusion model: `Denoiser`, and the text bound to a call of it.

Every model is used in the scaling x = x0 + sigma * noise, whatever its own (as in Karras et al., arXiv 2206.00364,
table 1): a solver starts from sigma_max * noise and asks for the clean image's estimate D(x, sigma).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

USUAL_GUIDANCE_SCALE = 7.5
"""The scale of classifier-free guidance that Stable Diffusion 1.x is used at, and models that name none of their own.

Which one is best differs by model and by solver.
"""


@dataclass
class Conditioning:
    """Encoded prompts, with the guidance they are used at.

    embeddings: [B, L, D], one row a prompt. unconditional: [1, L, D], or None where there is no unconditional half.
    guidance_scale: g of classifier-free guidance (arXiv 2207.12598): prediction = uncond + g (cond - uncond); 1 without
    guidance.
    """

    embeddings: Tensor
    unconditional: Tensor | None
    guidance_scale: float
    _repeated: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.embeddings)

    def rows(self, count: int) -> Tensor:
        """The text rows for `count` latents, made once for each count and kept.

        `count` is K times the number of prompts; latents are sample-major, so row b*K + k holds prompt b. Returns
        [count, L, D], or with guidance [2 * count, L, D], the unconditional half first.
        """
        if count not in self._repeated:
            if count == 0 or count % len(self):
                raise ValueError(f"{count} latents cannot be shared out among {len(self)} prompts: it is no multiple")
            rows = self.embeddings.repeat_interleave(count // len(self), dim=0)
            if self.unconditional is not None:
                rows = torch.cat([self.unconditional.expand_as(rows), rows])
            self._repeated[count] = rows
        return self._repeated[count]


class Denoiser(Protocol):
    """A frozen diffusion model.

    name: for people and file names. latent_shape: (C, H, W). image_size: (H, W) in pixels. sigma_min, sigma_max: the
    range of noise levels the model was trained on. time_min: the time of sigma_min; sigma_max is at time 1. device:
    where latents are expected.
    """

    name: str
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    sigma_min: float
    sigma_max: float
    time_min: float
    default_guidance_scale: float
    device: torch.device

    def sigma_of_time(self, time: Tensor) -> Tensor:
        """The noise level (float64) at a model time in [time_min, 1]."""
        ...

    def validate_prompts(self, prompts: Sequence[str]) -> None:
        """Raise one `InputError` that lists every prompt the model cannot take, with the reason."""
        ...

    def encode(
        self, prompts: Sequence[str], guidance_scale: float | None = None, negative_prompt: str = ""
    ) -> Conditioning:
        """Encode the prompts and bind the guidance: None is the model's default, 1 drops the unconditional half."""
        ...

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The estimate D(x, sigma) of the clean latents, [N, C, H, W], in x's dtype; differentiable in x and sigma.

        x: [N, C, H, W] = x0 + sigma * noise, N a multiple of the number of prompts, sample-major. sigma: scalar or [N].
        """
        ...

    def decode(self, latents: Tensor, chunk_size: int = 16) -> Tensor:
        """Latents [N, C, H, W] to float32 images [N, 3, H, W] in [0, 1], at most `chunk_size` at once."""
        ...
