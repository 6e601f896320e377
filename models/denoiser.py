"""What the floors above know of a frozen diffusion model: `Denoiser`, and the text bound to a call of it.

A solver starts from sigma_max * noise, whatever the model, and asks for the clean image's estimate D(x, sigma): of
x = x0 + sigma * noise (as in Karras et al., arXiv 2206.00364, table 1), or of x = (1 - sigma) x0 + sigma * noise where
the model was trained by flow matching (arXiv 2210.02747); its sigma is in (0, 1].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

USUAL_GUIDANCE_SCALE = 7.5
"""The scale of classifier-free guidance that Stable Diffusion 1.x is used at, and models that name none of their own.

Which one is best differs by model and by solver.
"""

Text = Mapping[str, Tensor]
"""What a network reads of prompts, by the names that it calls it: tensors with one row a prompt."""


class GuidanceKind(Enum):
    """What a guidance scale does to a model. 1 is always no guidance."""

    CLASSIFIER_FREE = "classifier-free"
    """prediction = uncond + g (cond - uncond), by two rows of the network (arXiv 2207.12598)."""
    EMBEDDED = "embedded"
    """The network was distilled to take g as one of its inputs (arXiv 2210.03142)."""
    NONE = "none"
    """The network knows no guidance: only 1 can be asked for."""

    @property
    def doubles(self) -> bool:
        """Whether an evaluation at another scale than 1 takes two rows of the network."""
        return self is GuidanceKind.CLASSIFIER_FREE


class Guidance(NamedTuple):
    """What a guidance scale does to a model, and the scale that it is used at where nothing else is said."""

    kind: GuidanceKind
    usual_scale: float


@dataclass
class Conditioning:
    """Encoded prompts, with the guidance they are used at.

    count: how many. text: what the network reads of them; nothing where it reads no prompts. unconditional: the same of
    the one text, often the empty one, that classifier-free guidance leads away from; None where nothing asks for it.
    guidance_scale: g of `GuidanceKind`.
    """

    count: int
    text: Text
    unconditional: Text | None
    guidance_scale: float
    _repeated: dict[tuple[int, int], Text] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        """The number of prompts."""
        return self.count

    def rows(self, count: int, unconditional: int = 0) -> Text:
        """The text for `unconditional` rows without a prompt, then for `count` latents; made once and kept.

        `count` is K times the number of prompts; latents are sample-major, so row b*K + k holds prompt b. Returns
        tensors of `unconditional + count` rows.
        """
        if (count, unconditional) not in self._repeated:
            if count == 0 or count % len(self):
                raise ValueError(f"{count} latents cannot be shared out among {len(self)} prompts: it is no multiple")
            rows = {name: part.repeat_interleave(count // len(self), dim=0) for name, part in self.text.items()}
            if unconditional:
                for name, part in self.unconditional.items():
                    rows[name] = torch.cat([part.expand(unconditional, *part.shape[1:]), rows[name]])
            self._repeated[count, unconditional] = rows
        return self._repeated[count, unconditional]


class Denoiser(Protocol):
    """A frozen diffusion model.

    name: for people and file names. backend: its family, by the name that the public EPD code base has for it, else the
    common one: ldm for Stable Diffusion 1.x and 2.x. latent_shape: (C, H, W). image_size: (H, W) in pixels. sigma_min,
    sigma_max: the range of noise levels the model was trained on. time_min: the time of sigma_min; sigma_max is at time
    1. guidance: what a scale of it does. takes_prompts: False of an unconditional model, whose prompts are all empty.
    device: where latents are expected. dtype: that the network computes in. code: the source files whose change may
    change what it answers; results that are kept on disk count as made by them. scheduler_config: its noise levels and
    its kind of prediction, as a diffusers `scheduler_config.json` says them.
    """

    name: str
    backend: str
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    sigma_min: float
    sigma_max: float
    time_min: float
    guidance: GuidanceKind
    takes_prompts: bool
    default_guidance_scale: float
    device: torch.device
    dtype: torch.dtype
    code: tuple[Path, ...]
    scheduler_config: Mapping[str, Any]

    def sigma_of_time(self, time: Tensor) -> Tensor:
        """The noise level (float64) at a model time in [time_min, 1]."""
        ...

    def validate_prompts(self, prompts: Sequence[str]) -> None:
        """Raise one `InputError` that lists every prompt the model cannot take, with the reason."""
        ...

    def too_long(self, prompt: str) -> bool:
        """Whether the model would read no more than a prompt's beginning."""
        ...

    def check_guidance(self, scales: float | Tensor) -> None:
        """Raise `InputError` where the model is asked for guidance of a kind that it does not have."""
        ...

    def encode(self, prompts: Sequence[str], guidance_scale: float | None = None) -> Conditioning:
        """Encode the prompts and bind the guidance: None is the model's default, 1 for none."""
        ...

    def compile_network(self, rows: Collection[int] = ()) -> None:
        """Have the network compiled, if wanted for these numbers of rows alone."""
        ...

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: Tensor | None = None) -> Tensor:
        """The estimate D(x, sigma) of the clean latents, [N, C, H, W], in x's dtype; differentiable in x and sigma.

        x: [N, C, H, W], noisy latents of level sigma, N a multiple of the number of prompts, sample-major. sigma:
        scalar or [N]. guidance: [N] on the CPU, a scale for each row in place of the conditioning's one scale; a row at
        1 costs one row of the network.
        """
        ...

    def decode(self, latents: Tensor, chunk_size: int = 16) -> Tensor:
        """Latents [N, C, H, W] to float32 images [N, 3, H, W] in [0, 1], at most `chunk_size` at once.

        NaN, and never a colour, where the decoder gives no finite number: its type may be too narrow for what it adds.
        """
        ...
