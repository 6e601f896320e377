"""From a seed to noise, and from latents to images, with the one rule for what was lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, noop_context_fn

from models.denoiser import Conditioning, Denoiser
from models.devices import to_device
from models.randomness import generator_of
from solvers import Denoise

# Latents of images lie within some tens. What leaves this range has exploded, finite or not.
LATENT_LIMIT = 1e4

Answer = TypeVar("Answer")

Measure = Callable[[str], AbstractContextManager[object]]
"""Times what is done inside it, by the name of a phase: text, solver, network, decode."""

Asked = Callable[[int], object]
"""Is told at each call of the network of how many latents it was asked."""


def initial_noise(
    seeds: Sequence[int], shape: tuple[int, int, int], *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Standard normal noise [N, C, H, W], one row a seed (integers in [0, 2^63)).

    Each row is drawn in float32 by a CPU generator of its own: it depends on its seed alone, to the last bit, whatever
    the device and the batch, and no global random state is touched.
    """
    rows = [torch.randn(shape, generator=generator_of(seed), dtype=torch.float32) for seed in seeds]
    return to_device(torch.stack(rows).to(dtype), device)


def recomputed(function: Callable[..., Tensor], *inputs: object, dtype: torch.dtype = torch.float32) -> Tensor:
    """function(*inputs), of which a backward pass keeps the inputs alone, and computes the rest again (no new draws).

    The memory of a chain of such calls is that of one of them; it takes about a third more time. dtype: what the
    function computes in; on a CPU the fused attention's backward pass takes longer in half precision than all else.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    plain = dtype.itemsize < torch.float32.itemsize and inputs[0].device.type == "cpu"
    contexts = _plain_attention if plain else noop_context_fn
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _plain_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What `checkpoint` computes in: the first time, and again."""
    return sdpa_kernel(SDPBackend.MATH), sdpa_kernel(SDPBackend.MATH)


def in_parts_that_fit(
    number: int, at_once: Callable[[], int], ask: Callable[[slice], Answer], too_many: Callable[[int], object]
) -> list[Answer]:
    """What `ask` answers of rows 0 to `number`, in order, at most `at_once()` of them together.

    Where the device's memory does not suffice, `too_many` is told for how many, and they are asked for again: it has to
    lower `at_once`, or to raise.
    """
    answers: list[Answer] = []
    start = 0
    while start < number:
        rows = slice(start, min(start + at_once(), number))
        with suppress(torch.OutOfMemoryError):
            answers.append(ask(rows))
            start = rows.stop
            continue
        too_many(rows.stop - rows.start)  # past the handler: what was allocated is free again
    return answers


def conditioned(
    denoiser: Denoiser,
    conditioning: Conditioning,
    measure: Measure = nullcontext,
    asked: Asked = int,
    *,
    recompute: bool = False,
) -> Denoise:
    """The closure that a sampler asks: D(x, sigma), or D(x, sigma, guidance) by a table with guidance.

    recompute: each call as in `recomputed`, where a gradient is asked for.
    """

    def denoise(x: Tensor, sigma: Tensor, *guidance: Tensor) -> Tensor:
        asked(len(x))
        with measure("network"):
            inputs = (x, sigma, conditioning, *guidance)
            if recompute:
                return recomputed(denoiser.denoise, *inputs, dtype=denoiser.dtype)
            return denoiser.denoise(*inputs)

    return denoise


class Decoded(NamedTuple):
    """Images of N latents, and what became of each.

    images: [N, 3, H, W] float32 in [0, 1], all finite. solved: bool [N], whether the latents were within the limit.
    decoded: bool [N], whether the decoder gave numbers; where it gave none the image is black.
    """

    images: Tensor
    solved: Tensor
    decoded: Tensor

    @property
    def fine(self) -> Tensor:
        """Bool [N]: neither lost by the solver nor by the decoder."""
        return self.solved & self.decoded


def bounded(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Latents clamped into the limit (NaN to 0), and which of them [N] did not have to be."""
    inside = latents.abs() <= LATENT_LIMIT  # False for NaN
    return latents.nan_to_num(0.0, LATENT_LIMIT, -LATENT_LIMIT).clamp(-LATENT_LIMIT, LATENT_LIMIT), _whole(inside)


def decode(denoiser: Denoiser, latents: Tensor, chunk_size: int = 16) -> Decoded:
    """Images of latents [N, C, H, W], at most `chunk_size` decoded at once; see `Decoded` for those that are lost.

    Differentiable in the latents, a chunk at a time (`recomputed`).
    """
    within, solved = bounded(latents)
    parts = within.split(chunk_size)
    images = torch.cat([recomputed(denoiser.decode, part, chunk_size, dtype=denoiser.dtype) for part in parts])
    return Decoded(images.nan_to_num(0.0, 1.0, 0.0), solved, _whole(images.isfinite()))


def _whole(mask: Tensor) -> Tensor:
    """Whether all of each sample [N, ...] holds: [N]."""
    return mask.flatten(1).all(dim=1)
