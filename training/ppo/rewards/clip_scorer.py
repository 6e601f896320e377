"""What every reward that stands on a CLIP model shares: features of images and texts, in batches, texts once each."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from errors import InputError
from models import clip
from models.devices import check_memory, to_device
from models.generate import recomputed
from models.recent import RecentTensors

log = logging.getLogger(__name__)


class ClipScorer:
    """A frozen CLIP model; its scores are differentiable in the images."""

    def __init__(
        self,
        name: str,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        """Take over a model (float32, on the CPU).

        Args:
            name: of the reward, for people and logs.
            model: changed in place.
            tokenizer: of the model's texts.
            device: where the model is to run.
            batch_size: images, or texts, in one forward pass.
            amp_dtype: float16 or bfloat16 for mixed precision (torch's autocast); None for float32.

        Raises:
            InputError: the tokenizer is not the model's, or the device has too little memory.
        """
        self.name = name
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.amp_dtype = amp_dtype
        self.tokenizer = tokenizer
        self.model = model.requires_grad_(False).eval()
        # CLIP pools a text at its end-of-text token, the last of the vocabulary.
        end, expected_end = tokenizer.eos_token_id, model.config.text_config.vocab_size - 1
        if end != expected_end:
            raise InputError(
                f"The tokenizer in {tokenizer.name_or_path} does not belong to {name}: its end-of-text token is "
                f"number {end}, the model's vocabulary ends with number {expected_end}."
            )
        if amp_dtype is not None:
            _hold_products_in(self.model, amp_dtype)
        if self.device.type != "cpu":
            size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
            check_memory(f"Reward {name}", size, self.device)
        self.model.to(self.device)
        self._context_length: int = model.config.text_config.max_position_embeddings
        self._text_features = RecentTensors()

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine similarity of each image's features with those of its own prompt, [N] float32 in [-1, 1].

        A non-finite pixel, or a half-precision overflow, gives that image NaN. It is returned as it is: only the caller
        knows which samples must go with it.

        Args:
            images: [N, 3, H, W], N > 0, RGB in [0, 1], any floating-point type, on any device.
            prompts: N texts.

        Raises:
            ValueError: the numbers of images and prompts differ, or the images are no [N, 3, H, W] of floats.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        image_features = functional.normalize(self.image_features(images), dim=-1)
        text_features = functional.normalize(self.text_features(prompts), dim=-1)
        return (image_features * text_features).sum(dim=-1)

    def say_what_is_cut(self, prompts: Sequence[str]) -> None:
        """Warn in one line, once for a whole job, of prompts too long for it, which it judges by their beginning."""
        different = list(dict.fromkeys(prompts))
        if cut := clip.number_cut(self.tokenizer, different, self._context_length):
            log.warning(
                "reward %s reads %d tokens of a prompt: %d of %d prompts are longer and judged by these",
                *(self.name, self._context_length - 2, cut, len(different)),  # without the marks of start and end
            )

    def image_features(self, images: Tensor) -> Tensor:
        """Embed images [N, 3, H, W] in [0, 1]: [N, D] float32, projected but not normalised, on the reward's device.

        Where the device's memory does not suffice for `batch_size` of them it is halved, for this and all later calls.
        """
        if not images.is_floating_point():
            raise ValueError(f"images must be floating-point numbers in [0, 1], not {images.dtype}")
        features: list[Tensor] = []
        start = 0
        while start < len(images):
            chunk = images[start : start + self.batch_size]
            embedded = self._embed_if_it_fits(chunk)
            if embedded is None:
                self._halve(len(chunk))
                continue
            features.append(embedded)
            start += len(chunk)
        return torch.cat(features)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Embed texts: [N, D] float32, projected but not normalised, on the reward's device."""
        found = {prompt: self._text_features.get(prompt) for prompt in prompts}
        unseen = [prompt for prompt, features in found.items() if features is None]
        for start in range(0, len(unseen), self.batch_size):
            chunk = unseen[start : start + self.batch_size]
            tokens = to_device(clip.tokenize(self.tokenizer, chunk, self._context_length), self.device)
            with self._autocast():
                embedded = clip.text_features(self.model, tokens).float()
            for prompt, features in zip(chunk, embedded, strict=True):
                found[prompt] = self._text_features.keep(prompt, features.clone())
        return torch.stack([found[prompt] for prompt in prompts])

    def _embed_if_it_fits(self, images: Tensor) -> Tensor | None:
        """Features of one batch, or None when the device ran out of memory: past the handler, what it held is free."""
        try:
            return recomputed(self._embed, images)
        except torch.OutOfMemoryError:
            return None

    def _embed(self, images: Tensor) -> Tensor:
        pixels = clip.preprocess(images.to(self.device, non_blocking=True), self.model.config.vision_config.image_size)
        with self._autocast():
            return clip.image_features(self.model, pixels).float()

    def _halve(self, images: int) -> None:
        """Remember that `images` at once were too many."""
        if images == 1:
            raise InputError(
                f"The memory of {self.device} does not suffice for {self.name} to look at one image: free it, or use "
                "another device."
            )
        self.batch_size = images // 2
        log.warning("out of memory with %d images at once in %s: from now on %d", images, self.name, self.batch_size)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)


def _hold_products_in(model: CLIPModel, dtype: torch.dtype) -> None:
    """Keep the weights of matrix products in autocast's type, to which it would otherwise cast them in each call."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
