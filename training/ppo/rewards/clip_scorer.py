"""What every reward that stands on a CLIP model shares: features of images and texts, in batches, texts once each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from errors import InputError
from models import clip
from models.devices import to_device
from models.recent import RecentTensors
from training.ppo.rewards.batched import BatchedScorer, Scoring, require_pairs

TEXTS_AT_ONCE = 8  # on CUDA, where a text alone is mostly launches


class ClipScorer(BatchedScorer):
    """A frozen CLIP model; what it says is differentiable in the images."""

    reads_prompts = True

    def __init__(self, name: str, model: CLIPModel, tokenizer: CLIPTokenizer, **scoring: Unpack[Scoring]) -> None:
        """Take over a model (float32, on the CPU); `tokenizer`: of its texts, the rest as `BatchedScorer` takes it.

        Raises:
            InputError: the tokenizer is not the model's, or the device has too little memory.
        """
        # CLIP pools a text at its end-of-text token, the last of the vocabulary.
        end, expected_end = tokenizer.eos_token_id, model.config.text_config.vocab_size - 1
        if end != expected_end:
            raise InputError(
                f"The tokenizer in {tokenizer.name_or_path} does not belong to {name}: its end-of-text token is "
                f"number {end}, the model's vocabulary ends with number {expected_end}."
            )
        super().__init__(name, model, model.config.vision_config.image_size, **scoring)
        self.tokenizer = tokenizer
        self._context_length: int = model.config.text_config.max_position_embeddings
        self._text_features = RecentTensors()

    def cosine(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine similarity of each image's features [N, D] with those of its own prompt, [N] float32 in [-1, 1]."""
        text_features = functional.normalize(self.text_features(prompts), dim=-1)
        return (functional.normalize(features, dim=-1) * text_features).sum(dim=-1)

    def say_what_is_cut(self, prompts: Sequence[str]) -> None:
        """See `Reward.say_what_is_cut`."""
        different = list(dict.fromkeys(prompts))
        cut = clip.number_cut(self.tokenizer, different, self._context_length)
        tokens = self._context_length - 2  # without the marks of start and end
        self.say_what_is_lost(self.tokenizer, different, cut, tokens)

    def image_features(self, images: Tensor) -> Tensor:
        """Embed images [N, 3, H, W] in [0, 1]: [N, D] float32, projected but not normalised, on the reward's device."""
        return self.of_pixels(images, lambda pixels, _: clip.image_features(self.model, pixels))

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Embed texts: [N, D] float32, projected but not normalised, on the reward's device."""
        found = {prompt: self._text_features.get(prompt) for prompt in prompts}
        unseen = [prompt for prompt, features in found.items() if features is None]
        size = TEXTS_AT_ONCE if self.device.type == "cuda" else 1  # always so many: a text's last bits depend on it
        for start in range(0, len(unseen), size):
            chunk = unseen[start : start + size]
            padded = chunk + chunk[-1:] * (size - len(chunk))
            tokens = to_device(clip.tokenize(self.tokenizer, padded, self._context_length), self.device)
            with self.autocast():
                embedded = clip.text_features(self.model, tokens).float()
            for prompt, features in zip(chunk, embedded, strict=False):
                found[prompt] = self._text_features.keep(prompt, features.clone())
        return torch.stack([found[prompt] for prompt in prompts])


class FeatureScorer(ClipScorer, ABC):
    """A CLIP model that scores an image by its features alone: who needs both asks the image tower once."""

    @abstractmethod
    def score_features(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images by their `image_features` [N, D], N > 0, against their N prompts: [N] float32; NaN stays NaN."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [N, 3, H, W], N > 0, RGB in [0, 1], on any device, against their N prompts: [N] float32.

        A non-finite pixel, or a half-precision overflow, gives that image NaN. It is returned as it is: only the caller
        knows which samples must go with it.

        Raises:
            ValueError: the numbers of images and prompts differ, or the images are no [N, 3, H, W] of floats.
        """
        require_pairs(images, prompts)
        return self.score_features(self.image_features(images), prompts)
