"""What the floors above know of a frozen text-to-image diffusion model: `Denoiser`, and the text bound to a call of it.

Every model is used in the scaling x = x0 + sigma * noise, whatever its own (as in Karras et al., arXiv 2206.00364,
table 1): a solver starts from sigma_max * noise and asks for the clean image's estimate D(x, sigma).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
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

    embeddings: [B, L, D], one row a prompt. unconditional: [1, L, D], or None where nothing will ask for guidance.
    guidance_scale: g of classifier-free guidance (arXiv 2207.12598): prediction = uncond + g (cond - uncond); 1 without
    guidance.
    """

    embeddings: Tensor
    unconditional: Tensor | None
    guidance_scale: float
    _repeated: dict[tuple[int, bool], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.embeddings)

    def rows(self, count: int, *, guided: bool | None = None) -> Tensor:
        """The text rows for `count` latents, made once for each count and kept.

        `count` is K times the number of prompts; latents are sample-major, so row b*K + k holds prompt b. Returns
        [count, L, D], or where `guided` [2 * count, L, D], the unconditional half first; None: as the scale says.
        """
        doubled = self.unconditional is not None and (self.guidance_scale != 1.0 if guided is None else guided)
        if (count, doubled) not in self._repeated:
            if count == 0 or count % len(self):
                raise ValueError(f"{count} latents cannot be shared out among {len(self)} prompts: it is no multiple")
            rows = self.embeddings.repeat_interleave(count // len(self), dim=0)
            if doubled:
                rows = torch.cat([self.unconditional.expand_as(rows), rows])
            self._repeated[count, doubled] = rows
        return self._repeated[count, doubled]


class Denoiser(Protocol):
    """A frozen diffusion model.

    name: for people and file names. backend: its family, as the public EPD code base calls it: ldm for Stable Diffusion
    1.x and 2.x. latent_shape: (C, H, W). image_size: (H, W) in pixels. sigma_min, sigma_max: the
    range of noise levels the model was trained on. time_min: the time of sigma_min; sigma_max is at time 1. device:
    where latents are expected. dtype: that the network computes in. code: the source files whose change may change what
    it answers; results that are kept on disk count as made by them.
    """

    name: str
    backend: str
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    sigma_min: float
    sigma_max: float
    time_min: float
    default_guidance_scale: float
    device: torch.device
    dtype: torch.dtype
    code: tuple[Path, ...]

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

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: Tensor | None = None) -> Tensor:
        """The estimate D(x, sigma) of the clean latents, [N, C, H, W], in x's dtype; differentiable in x and sigma.

        x: [N, C, H, W] = x0 + sigma * noise, N a multiple of the number of prompts, sample-major. sigma: scalar or [N].
        guidance: [N] on the CPU, a scale for each row in place of the conditioning's one scale; where none of them
        differs from 1 the unconditional half is left out.
        """
        ...

    def decode(self, latents: Tensor, chunk_size: int = 16) -> Tensor:
        """Latents [N, C, H, W] to float32 images [N, 3, H, W] in [0, 1], at most `chunk_size` at once.

        NaN, and never a colour, where the decoder gives no finite number: its type may be too narrow for what it adds.
        """
        ...
