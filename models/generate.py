"""The sampling loop that every command line shares: prompts and seeds in, latents out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from models.denoiser import Conditioning, Denoiser
from models.devices import to_device
from models.randomness import generator_of
from solvers import Denoise

Solve = Callable[[Denoise, Tensor, Tensor], Tensor]


def initial_noise(
    seeds: Sequence[int], shape: tuple[int, int, int], *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Standard normal noise [N, C, H, W], one row a seed (integers in [0, 2^63)).

    Each row is drawn in float32 by a CPU generator of its own: it depends on its seed alone, to the last bit, whatever
    the device and the batch, and no global random state is touched.
    """
    rows = [torch.randn(shape, generator=generator_of(seed), dtype=torch.float32) for seed in seeds]
    return to_device(torch.stack(rows).to(dtype), device)


def conditioned(denoiser: Denoiser, conditioning: Conditioning) -> Denoise:
    """The closure that a sampler asks: D(x, sigma), or D(x, sigma, guidance) by a table with guidance."""

    def denoise(x: Tensor, sigma: Tensor, *guidance: Tensor) -> Tensor:
        return denoiser.denoise(x, sigma, conditioning, *guidance)

    return denoise


@torch.no_grad()
def generate(
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    solve: Solve,
    sigmas: Tensor,
    *,
    guidance_scale: float | None = None,
    batch_size: int = 16,
    progress: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One latent for every pair of a prompt and a seed: [N, C, H, W] in `dtype`, on the denoiser's device.

    `solve(denoise, x, sigmas)` is a sampler with its options bound; x starts as sigmas[0] * noise. `sigmas`:
    [num_steps] float64, descending. `guidance_scale`: None is the model's default. At most `batch_size` latents are
    carried at once.

    A latent depends on its prompt, its seed and the solver only. The noise and the text embeddings are identical to the
    last bit in every batch; the network's matrix products may be summed in another order when the batch has another
    size, which moves latents by a few units of the last place a step.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"need as many prompts as seeds, and at least one: got {len(prompts)} and {len(seeds)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    batches = []
    with tqdm(total=len(prompts), unit="image", disable=not progress) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            conditioning = denoiser.encode(prompts[batch], guidance_scale)
            noise = initial_noise(seeds[batch], denoiser.latent_shape, device=denoiser.device, dtype=dtype)
            denoise = conditioned(denoiser, conditioning)
            batches.append(solve(denoise, noise * sigmas[0], sigmas))
            bar.update(len(noise))
    return torch.cat(batches)
