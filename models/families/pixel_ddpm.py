"""Unconditional DDPMs in pixel space (arXiv 2006.11239) as denoisers: no text, no VAE, no guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import UNet2DModel
from torch import Tensor

from errors import InputError
from models.backbone import Backbone, Pipeline, bytes_to_move, code_files, sides
from models.denoiser import Conditioning, Guidance, GuidanceKind
from models.devices import check_memory
from models.loading import require_size
from models.pictures import to_images
from models.pixel_diffusion import PixelDiffusion, checked


@dataclass(frozen=True)
class PixelParts:
    """A DDPM, and the size (H, W) that it is to draw."""

    model: PixelDiffusion
    size: tuple[int, int]


class PixelDDPM(Backbone):
    """An unconditional DDPM; its latents are the images, in [-1, 1].

    The estimate D is clamped to the range that the model's own scheduler clips it to, if it does.
    """

    backend = "ddpm"
    modules: ClassVar = {"unet": UNet2DModel}
    known_options = frozenset({"height", "width"})
    usual_guidance = Guidance(GuidanceKind.NONE, 1.0)
    takes_prompts = False
    code = (*Backbone.code, *code_files("families.pixel_ddpm", "pixel_diffusion"))

    @classmethod
    def assembled(cls, pipeline: Pipeline) -> PixelParts:
        """See `Backbone.assembled`."""
        unet = pipeline.modules["unet"]
        # Each of its layers but the last halves the image, and what comes back up must meet what went down.
        patch = 2 ** (len(unet.config.block_out_channels) - 1)
        size = sides(pipeline, require_size(unet, pipeline.source), pixels=1, patch=patch)
        return PixelParts(checked(unet, pipeline.scheduler_file, str(pipeline.source)), size)

    def __init__(self, name: str, parts: PixelParts, *, device: torch.device, dtype: torch.dtype) -> None:
        """Raises `InputError` where the device has too little memory."""
        model = parts.model
        check_memory(f"Model {name}", bytes_to_move(model.network, device, dtype), device)
        super().__init__(name, model.network, model.process, self.usual_guidance, device=device, dtype=dtype)
        self.latent_shape = (model.network.config.in_channels, *parts.size)
        self.image_size = parts.size
        self._clip_range = math.inf
        if model.clip_range is not None:
            self._clip_range = model.clip_range
            self.scheduler_config = {
                **self.scheduler_config,
                "clip_sample": True,
                "clip_sample_range": model.clip_range,
            }

    def validate_prompts(self, prompts: Sequence[str]) -> None:
        """Raise `InputError` where there is a prompt."""
        if prompt := next(filter(None, prompts), None):
            raise InputError(f"Model {self.name} is unconditional and takes no prompt: leave {prompt!r:.60} out.")

    def too_long(self, prompt: str) -> bool:
        """It reads none."""
        return False

    def encode(self, prompts: Sequence[str], guidance_scale: float | None = None) -> Conditioning:
        """As many images as there are prompts, all of them empty; see `Denoiser.encode`."""
        self.validate_prompts(prompts)
        if not prompts:
            raise InputError("No images to draw.")
        scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        self.check_guidance(scale)
        return Conditioning(len(prompts), {}, None, scale)

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: Tensor | None = None) -> Tensor:
        """The estimate D(x, sigma) of the clean images; see `Denoiser.denoise` for shapes."""
        return super().denoise(x, sigma, conditioning, guidance).clamp(-self._clip_range, self._clip_range)

    def decode(self, latents: Tensor, chunk_size: int = 16) -> Tensor:
        """Latents [N, 3, H, W] to float32 images [N, 3, H, W] in [0, 1] or NaN; all at once, as nothing is computed."""
        return to_images(latents.float())


FAMILY = PixelDDPM
