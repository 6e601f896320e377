"""What every reward that is a frozen network shares: its type, its memory, and images in batches that fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import ClassVar, TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from errors import InputError
from models import clip
from models.devices import check_memory
from models.generate import in_parts_that_fit, recomputed

log = logging.getLogger(__name__)


class Scoring(TypedDict, total=False):
    """How a network looks at images; see `BatchedScorer`, to which every kind of reward hands it on."""

    device: torch.device | str
    batch_size: int
    amp_dtype: torch.dtype | None


class BatchedScorer:
    """A frozen network that looks at images; what it answers is differentiable in them."""

    sees_whole: ClassVar[bool] = False
    """Whether it is shown all of an image that is not square; see `clip.preprocess`."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        image_size: int,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        """Take over a model (float32, on the CPU).

        Args:
            name: of the reward, for people and logs.
            model: changed in place.
            image_size: side of the images that it looks at, in pixels, prepared as CLIP's are.
            device: where the model is to run.
            batch_size: images in one forward pass.
            amp_dtype: float16 or bfloat16 for mixed precision (torch's autocast); None for float32.

        Raises:
            InputError: the device has too little memory.
        """
        self.name = name
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.amp_dtype = amp_dtype
        self.model = model.requires_grad_(False).eval()
        if amp_dtype is not None:
            _hold_products_in(self.model, amp_dtype)
        if self.device.type != "cpu":
            size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
            check_memory(f"Reward {name}", size, self.device)
        self.model.to(self.device)
        self._image_size = image_size

    def of_pixels(self, images: Tensor, ask: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """What the network answers for images [N, 3, H, W] in [0, 1], on the reward's device, in float32.

        Where the device's memory does not suffice for `batch_size` of them it is halved, for this and all later calls.

        Args:
            images: N > 0, any floating-point type, on any device.
            ask: prepared pixels [n, 3, S, S] and which of the images they are -> [n, ...].
        """
        if not images.is_floating_point():
            raise ValueError(f"images must be floating-point numbers in [0, 1], not {images.dtype}")

        def answer(rows: slice) -> Tensor:
            return recomputed(self._answer, images[rows], rows, ask)

        return torch.cat(in_parts_that_fit(len(images), lambda: self.batch_size, answer, self._halve))

    def _answer(self, images: Tensor, rows: slice, ask: Callable[[Tensor, slice], Tensor]) -> Tensor:
        pixels = clip.preprocess(images.to(self.device, non_blocking=True), self._image_size, whole=self.sees_whole)
        with self.autocast():
            return ask(pixels, rows).float()

    def _halve(self, images: int) -> None:
        """Remember that `images` at once were too many."""
        if images == 1:
            raise InputError(
                f"The memory of {self.device} does not suffice for {self.name} to look at one image: free it, or use "
                "another device."
            )
        self.batch_size = images // 2
        log.warning("out of memory with %d images at once in %s: from now on %d", images, self.name, self.batch_size)

    def autocast(self) -> torch.autocast:
        """Mixed precision, where it was asked for."""
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def say_what_is_lost(
        self, tokenizer: PreTrainedTokenizerBase, different: Sequence[str], cut: int, tokens: int
    ) -> None:
        """Warn of prompts, `cut` of `different` ones, longer than the `tokens` that it reads, and of those unknown."""
        if cut:
            log.warning(
                "reward %s reads %d tokens of a prompt: %d of %d prompts are longer and judged by these",
                *(self.name, tokens, cut, len(different)),
            )
        if foreign := clip.without_known_words(tokenizer, different):
            log.warning(
                "reward %s was taught no word of %d of %d prompts, for example %.60r: its scores of them mean little; "
                "choose another reward or other prompts",
                *(self.name, len(foreign), len(different), foreign[0]),
            )


def require_pairs(images: Tensor, prompts: object) -> None:
    """Raise ValueError where there are not as many prompts as images."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")


def _hold_products_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of matrix products in autocast's type, to which it would otherwise cast them in each call."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
