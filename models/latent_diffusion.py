"""A `Denoiser` over the modules of a Stable Diffusion 1.x or 2.x pipeline (latent diffusion, arXiv 2112.10752).

The network was trained on z = x / sqrt(1 + sigma^2) at integer steps; it is asked at the fractional step T t - 1, t the
continuous time of sigma (noise_levels.py). From its guided prediction the clean latents are

    epsilon prediction   D = x - sigma * eps
    v prediction         D = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) * v      (arXiv 2202.00512, section 4)
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from errors import InputError
from models.denoiser import USUAL_GUIDANCE_SCALE, Conditioning
from models.devices import check_memory, to_device
from models.noise_levels import NoiseLevels
from models.pictures import to_images
from models.prompts import text_fault

# A prompt of Stable Diffusion 1.5 takes 118 kB in half precision: a quarter of a gigabyte when full.
CACHED_PROMPTS = 2048
SHOWN_FAULTS = 10

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Components:
    """The parts of a pipeline as they come from its files: modules on the CPU, in the type they were stored in, and the
    guidance scale that it is meant to be used at.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    noise_levels: NoiseLevels
    prediction_type: Literal["epsilon", "v_prediction"]
    guidance_scale: float = USUAL_GUIDANCE_SCALE


class LatentDiffusion:
    """Stable Diffusion 1.x or 2.x as a `Denoiser`; the modules are frozen and kept in evaluation mode.

    The modules compute in `dtype`; guidance and the estimate D are formed in x's dtype, the noise levels in float64.
    """

    backend = "ldm"
    code = tuple(
        Path(__file__).with_name(f"{module}.py")
        for module in ("latent_diffusion", "loading", "checkpoints", "noise_levels", "pictures")
    )

    def __init__(
        self,
        name: str,
        components: Components,
        *,
        device: torch.device,
        dtype: torch.dtype,
        unknown_words: Callable[[str], list[str]] | None = None,
    ) -> None:
        """`unknown_words` names the words of a prompt that the model was never taught; None where it takes any.

        Raises `InputError` where the device has too little memory.
        """
        self.name = name
        self.device = device
        self.dtype = dtype
        self.default_guidance_scale = components.guidance_scale
        parts = (components.unet, components.vae, components.text_encoder)
        check_memory(f"Model {name}", sum(_bytes_to_move(part, device, dtype) for part in parts), device)
        self.unet = _frozen(components.unet, device, dtype)
        self.vae = _frozen(components.vae, device, dtype)
        self.text_encoder = _frozen(components.text_encoder, device, dtype)
        self.tokenizer = components.tokenizer
        self.noise_levels = components.noise_levels
        self.prediction_type = components.prediction_type
        self.time_min = self.noise_levels.time_min
        self.sigma_min, self.sigma_max = self.noise_levels.sigma_min, self.noise_levels.sigma_max
        self.latent_shape = _latent_shape(self.unet)
        pixels_per_latent = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_size = (self.latent_shape[1] * pixels_per_latent, self.latent_shape[2] * pixels_per_latent)
        # Begin and end marks included. A tokenizer without a limit of its own reports an astronomic one.
        self.token_limit = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        self._unknown_words = unknown_words
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()

    def compile_network(self, backend: str = "inductor") -> None:
        """Have the UNet compiled by torch, anew for each shape that it is asked at: minutes first, then faster."""
        self.unet.compile(dynamic=False, backend=backend)

    def sigma_of_time(self, time: Tensor) -> Tensor:
        """The noise level (float64) at a model time in [time_min, 1]."""
        return self.noise_levels.sigma_of_time(time)

    def validate_prompts(self, prompts: Sequence[str]) -> None:
        """Raise one `InputError` that lists the prompts that are empty, too long, or use words unknown to the model."""
        faults = [
            f"  prompt {number} ({_shortened(prompt)}): {fault}"
            for number, prompt in enumerate(prompts, start=1)
            for fault in self._prompt_faults(prompt)
        ]
        if faults:
            more = [f"  ... and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
            raise InputError("\n".join([f"Model {self.name} cannot take:", *faults[:SHOWN_FAULTS], *more]))

    def encode(
        self, prompts: Sequence[str], guidance_scale: float | None = None, negative_prompt: str = ""
    ) -> Conditioning:
        """Encode the prompts and bind the guidance: None is the model's default, 1 for none.

        Each prompt is encoded once, by itself, so that its embedding depends neither on its batch nor on what came
        before. Raises `InputError` for a prompt that the text encoder would cut off.
        """
        scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        if not (math.isfinite(scale) and scale >= 0):
            raise InputError(f"The guidance scale must be a finite number of at least 0, not {scale}.")
        if not prompts:
            raise InputError("No prompts to encode.")
        return Conditioning(
            embeddings=torch.stack([self._embedding(prompt) for prompt in prompts]),
            unconditional=self._embedding(negative_prompt)[None],
            guidance_scale=scale,
        )

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: Tensor | None = None) -> Tensor:
        """The estimate D(x, sigma) of the clean latents; see `Denoiser.denoise` for shapes."""
        levels = sigma.to(torch.float64).expand(len(x))
        inverse_norm = (1.0 + levels**2).rsqrt()
        timesteps = self._timesteps(levels, x.dtype)
        prediction = self._predict(x * _per_row(inverse_norm, x), timesteps, conditioning, guidance)
        if self.prediction_type == "epsilon":
            return x - _per_row(levels, x) * prediction
        return _per_row(inverse_norm**2, x) * x - _per_row(levels * inverse_norm, x) * prediction

    def decode(self, latents: Tensor, chunk_size: int = 16) -> Tensor:
        """Latents [N, C, H, W] to float32 images [N, 3, H, W] in [0, 1] or NaN, at most `chunk_size` at once."""
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        scaled = (latents / self.vae.config.scaling_factor).to(self.dtype)
        images = [self.vae.decode(chunk, return_dict=False)[0].float() for chunk in scaled.split(chunk_size)]
        return to_images(torch.cat(images))

    def _timesteps(self, levels: Tensor, dtype: torch.dtype) -> Tensor:
        """What the network takes for its noise level, [N]: 0 at its first training step, fractional between two."""
        steps = self.noise_levels.num_steps * self.noise_levels.time_of_sigma(levels) - 1.0
        # Half precision cannot tell step 998 from 998.3.
        return steps.to(self.device, torch.promote_types(dtype, torch.float32), non_blocking=True)

    def _predict(self, z: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance: Tensor | None) -> Tensor:
        """The network's guided prediction in z's dtype, both halves of the guidance in one call. z: [N, C, H, W]."""
        guided = conditioning.guidance_scale != 1.0 if guidance is None else bool((guidance != 1).any())
        inputs, rows = z.to(self.dtype), conditioning.rows(len(z), guided=guided)
        if not guided:
            return self.unet(inputs, timesteps, rows, return_dict=False)[0].to(z.dtype)
        # [2N, C, H, W], the unconditional half first
        doubled = self.unet(inputs.repeat(2, 1, 1, 1), timesteps.repeat(2), rows, return_dict=False)[0]
        without, with_text = doubled.to(z.dtype).chunk(2)
        scale = conditioning.guidance_scale if guidance is None else _per_row(guidance, z)
        return without + scale * (with_text - without)

    def _prompt_faults(self, prompt: str) -> list[str]:
        if fault := text_fault(prompt):
            return [fault]
        faults = []
        if (length := self._token_count(prompt)) > self.token_limit:
            faults.append(f"it is {length - 2} tokens long, the text encoder takes {self.token_limit - 2}")
        if self._unknown_words is not None and (words := self._unknown_words(prompt)):
            faults.append(f"words the model does not know: {', '.join(words)}")
        return faults

    def _token_count(self, prompt: str) -> int:
        return len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def _embedding(self, prompt: str) -> Tensor:
        """The text encoder's last hidden states for one prompt, [L, D], from the cache of the latest prompts."""
        if prompt not in self._embeddings:
            if len(self._embeddings) >= CACHED_PROMPTS:
                self._embeddings.popitem(last=False)
            self._embeddings[prompt] = self._encode_text(prompt)
        self._embeddings.move_to_end(prompt)
        return self._embeddings[prompt]

    @torch.no_grad()
    def _encode_text(self, prompt: str) -> Tensor:
        if (length := self._token_count(prompt)) > self.token_limit:
            raise InputError(
                f"The prompt {_shortened(prompt)} is {length - 2} tokens long; "
                f"model {self.name} takes {self.token_limit - 2}. Shorten it."
            )
        tokens = self.tokenizer(prompt, padding="max_length", max_length=self.token_limit, return_tensors="pt")
        return self.text_encoder(to_device(tokens.input_ids, self.device)).last_hidden_state[0]


def _frozen(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    # nn.Module's own `to`: the one of diffusers warns about layers to be kept in float32 even where there are none
    module = nn.Module.to(module, device, dtype).eval().requires_grad_(False)
    if device.type in ("cuda", "cpu"):  # the layout in which their convolutions are fastest
        nn.Module.to(module, memory_format=torch.channels_last)
    return module


def _bytes_to_move(module: nn.Module, device: torch.device, dtype: torch.dtype) -> int:
    """Memory that the module's weights will take on the device, less those that are there already as they shall be."""
    return sum(
        weight.numel() * dtype.itemsize
        for weight in module.parameters()
        if weight.device != device or weight.dtype != dtype or _is_laid_out_anew(weight)
    )


def _is_laid_out_anew(weight: Tensor) -> bool:
    return weight.ndim == 4 and not weight.is_contiguous(memory_format=torch.channels_last)


def _latent_shape(unet: UNet2DConditionModel) -> tuple[int, int, int]:
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def _per_row(factors: Tensor, x: Tensor) -> Tensor:
    """[N] factors as [N, 1, 1, 1], where x is and in its dtype."""
    # Not waited for: where the noise levels are on the host, a solver's steps queue up on the device without a stop.
    return factors.to(x.device, x.dtype, non_blocking=True)[:, None, None, None]


def _shortened(prompt: str, length: int = 60) -> str:
    return repr(prompt if len(prompt) <= length else prompt[: length - 3] + "...")
