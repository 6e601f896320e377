"""A frozen latent diffusion model as a `Denoiser` (arXiv 2112.10752): text encoders, a network, a VAE.

What its families differ in is said in `models.families`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.models import AutoencoderKL
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput

from errors import InputError
from models.backbone import Backbone, Pipeline, bytes_to_move, code_files, frozen
from models.denoiser import Conditioning, Guidance, GuidanceKind, Text
from models.devices import check_memory, to_device
from models.pictures import to_images
from models.processes import Process
from models.prompts import text_fault
from models.recent import RecentTensors

# A prompt takes 118 kB in half precision with Stable Diffusion 1.5, 2.7 MB with Stable Diffusion 3.
CACHED_BYTES = 2**27
SHOWN_FAULTS = 10
TEXTS_AT_ONCE = 8  # on CUDA, where a text alone is mostly launches


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder with its tokenizer.

    limit: the tokens that it reads, its marks included; shorter texts are padded to it. reads_all: False where it may
    read no more than a prompt's beginning, since another encoder reads the whole.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    limit: int
    reads_all: bool = True

    @classmethod
    def clip(
        cls, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, reads_all: bool = True
    ) -> TextEncoder:
        """One of CLIP's kind, which reads what both of its parts can."""
        # A tokenizer without a limit of its own reports an astronomic one.
        limit = min(tokenizer.model_max_length, module.config.max_position_embeddings)
        return cls(module, tokenizer, limit, reads_all)

    def fault(self, prompt: str) -> str | None:
        """Why the encoder would cut a prompt off; None where it would not, or may."""
        length = len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if not self.reads_all or length <= self.limit:
            return None
        marks = self.tokenizer.num_special_tokens_to_add()
        return f"it is {length - marks} tokens long, the text encoder takes {self.limit - marks}"

    def __call__(self, prompts: Sequence[str]) -> ModelOutput:
        """What the module says of prompts, the hidden states of all its layers included."""
        tokens = self.tokenizer(
            [*prompts], padding="max_length", max_length=self.limit, truncation=True, return_tensors="pt"
        )
        return self.module(to_device(tokens.input_ids, self.module.device), output_hidden_states=True)


@dataclass(frozen=True)
class Parts:
    """A pipeline whose modules were seen to fit each other, and what a `LatentDiffusion` has to know of it besides.

    latent_shape: (C, H, W) of what is drawn. zero_unconditional: whether zeros are the unconditional text where there
    is no negative prompt. wide_vae: whether the VAE overflows in float16, and is kept in float32 there.
    """

    pipeline: Pipeline
    text_encoders: tuple[TextEncoder, ...]
    process: Process
    latent_shape: tuple[int, int, int]
    guidance: Guidance
    zero_unconditional: bool = False
    wide_vae: bool = False


class LatentDiffusion(Backbone):
    """The machinery of all families of them; one says what its network reads, and how it is called."""

    known_options = frozenset({"lora", "vae", "height", "width", "negative_prompt"})
    code = (*Backbone.code, *code_files("latent_diffusion", "recent"))

    def __init__(
        self,
        name: str,
        parts: Parts,
        *,
        device: torch.device,
        dtype: torch.dtype,
        unknown_words: Callable[[str], list[str]] | None = None,
        captions: str = "",
    ) -> None:
        """`unknown_words` names the words of a prompt that the model was never taught; None where it takes any.
        captions: the file of those it was taught.

        Raises `InputError` where the device has too little memory.
        """
        encoders = [encoder.module for encoder in parts.text_encoders]
        network, vae, options = parts.pipeline.network, parts.pipeline.modules["vae"], parts.pipeline.options
        vae_dtype = torch.float32 if parts.wide_vae and dtype == torch.float16 else dtype
        on_device = (network, *(() if options.text_on_cpu else encoders))
        needed = sum(bytes_to_move(module, device, dtype) for module in on_device)
        check_memory(f"Model {name}", needed + bytes_to_move(vae, device, vae_dtype), device)
        super().__init__(name, network, parts.process, parts.guidance, device=device, dtype=dtype)
        self.vae = frozen(vae, device, vae_dtype)
        for encoder in encoders:
            frozen(encoder, torch.device("cpu") if options.text_on_cpu else device, dtype)
        self.text_encoders = parts.text_encoders
        self.latent_shape = parts.latent_shape
        self._zero_unconditional = parts.zero_unconditional
        self._negative_prompt = options.negative_prompt or ""
        height, width = (side * pixels_per_latent(self.vae) for side in self.latent_shape[1:])
        self.image_size = (height, width)
        widest = self.vae.config.block_out_channels[:2][-1]  # channels that the decoder has at the images' full size
        self._decodable = max(1, (2**31 - 1) // (widest * height * width))
        self._unknown_words, self._captions = unknown_words, captions
        self._texts: RecentTensors[Text] = RecentTensors(CACHED_BYTES)
        self._texts_at_once = TEXTS_AT_ONCE if device.type == "cuda" and not options.text_on_cpu else 1

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

    def too_long(self, prompt: str) -> bool:
        """See `Denoiser.too_long`."""
        return any(encoder.fault(prompt) for encoder in self.text_encoders)

    def encode(self, prompts: Sequence[str], guidance_scale: float | None = None) -> Conditioning:
        """Encode the prompts and bind the guidance: None is the model's default, 1 for none.

        Each prompt is encoded once, in a batch of always one size, so that its embedding depends neither on the other
        prompts nor on what came before. Raises `InputError` for a prompt that the text encoders would cut off.
        """
        scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        if not (math.isfinite(scale) and scale >= 0):
            raise InputError(f"The guidance scale must be a finite number of at least 0, not {scale}.")
        if not prompts:
            raise InputError("No prompts to encode.")
        self.check_guidance(scale)
        texts = self._texts_of(prompts)
        return Conditioning(
            count=len(prompts),
            text={name: torch.stack([text[name] for text in texts]) for name in texts[0]},
            unconditional=self._unconditional(),
            guidance_scale=scale,
        )

    def decode(self, latents: Tensor, chunk_size: int = 16) -> Tensor:
        """Latents [N, C, H, W] to float32 images [N, 3, H, W] in [0, 1] or NaN, at most `chunk_size` at once.

        Fewer where a layer would hold more numbers than 32 bits count.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        scaled = latents / self.vae.config.scaling_factor
        if self.vae.config.shift_factor is not None:
            scaled = scaled + self.vae.config.shift_factor
        chunks = scaled.to(self.vae.dtype).split(min(chunk_size, self._decodable))
        images = [self.vae.decode(chunk, return_dict=False)[0].float() for chunk in chunks]
        return to_images(torch.cat(images))

    @abstractmethod
    def _read(self, prompts: Sequence[str]) -> Text:
        """What the network reads of prompts, a row each."""

    def _unconditional(self) -> Text | None:
        """What it reads in the unconditional half, one row; None where there is no such half."""
        if self.guidance is not GuidanceKind.CLASSIFIER_FREE:
            return None
        zeros = self._zero_unconditional and not self._negative_prompt
        (text,) = self._texts_of([self._negative_prompt])
        return {name: (torch.zeros_like(part) if zeros else part)[None] for name, part in text.items()}

    def _prompt_faults(self, prompt: str) -> list[str]:
        if fault := text_fault(prompt):
            return [fault]
        # Two encoders often have one tokenizer.
        faults = list(dict.fromkeys(filter(None, (encoder.fault(prompt) for encoder in self.text_encoders))))
        if self._unknown_words is not None and (words := self._unknown_words(prompt)):
            taught = f"; captions that it reads are in {self._captions}" if self._captions else ""
            faults.append(f"words the model does not know: {', '.join(words)}{taught}")
        return faults

    @torch.no_grad()
    def _texts_of(self, prompts: Sequence[str]) -> list[Text]:
        """`_read`, a row by itself for each prompt, from the cache of the latest prompts."""
        texts = {prompt: self._texts.get(prompt) for prompt in prompts}
        unread = [prompt for prompt, text in texts.items() if text is None]
        for prompt in unread:
            for fault in filter(None, (encoder.fault(prompt) for encoder in self.text_encoders)):
                raise InputError(f"The prompt {_shortened(prompt)} is too long for model {self.name}: {fault}.")
        size = self._texts_at_once
        for start in range(0, len(unread), size):
            batch = unread[start : start + size]
            read = self._read(batch + batch[-1:] * (size - len(batch)))
            for row, prompt in enumerate(batch):
                own = {name: part[row].to(self.device, copy=True) for name, part in read.items()}
                texts[prompt] = self._texts.keep(prompt, own)
        return [texts[prompt] for prompt in prompts]


def require_fit(pipeline: Pipeline, what: str, read: object, written: object) -> None:
    """Raise `InputError` where the network reads so many of something, and another part writes another number."""
    if read != written:
        raise InputError(f"{pipeline.source}: the network reads {read} {what}, and its other parts write {written}.")


def pixels_per_latent(vae: AutoencoderKL) -> int:
    """How many pixels a latent stands for along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _shortened(prompt: str, length: int = 60) -> str:
    return repr(prompt if len(prompt) <= length else prompt[: length - 3] + "...")
