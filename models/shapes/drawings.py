"""What the model itself draws with many network evaluations and with few: the worse images that tuning meets.

Preference data of the real target are such images too: HPD v2 compares what diffusion models drew (arXiv 2306.09341).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from files import replacing
from models.denoiser import Denoiser
from models.digests import digest_of
from models.generate import conditioned, decode, initial_noise
from models.randomness import generator_of
from models.shapes.data import reading_scratch
from schedules import get_schedule
from solvers import dpmpp_sampler

MANY = 12  # network evaluations of the best image
FEW, FEWEST = (4, 5, 6, 7, 8), (2, 3)  # of the other two, one of each drawn for a batch
GUIDANCES = (1.5, 2.0, 3.0, 4.5)
RHOS = (1.0, 4.0, 7.0)  # of the few evaluations' polynomial schedule
BATCH = 64


@torch.no_grad()
def draw_threefold(denoiser: Denoiser, captions: Sequence[str], seed: int) -> np.ndarray:
    """Images uint8 [N, 3, H, W, 3]: of a caption and one noise, with `MANY`, one of `FEW` and of `FEWEST` evaluations.

    DPM-Solver++ 2M on polynomial schedules; guidance and schedule are drawn anew for each batch, from `seed`.
    """
    drawn = []
    for start in trange(0, len(captions), BATCH, desc="drawing with many and few evaluations", mininterval=10):
        texts = captions[start : start + BATCH]
        generator = generator_of(seed * 1_000_003 + start)

        def choose(values: Sequence[float], generator: torch.Generator = generator) -> float:
            return values[int(torch.randint(len(values), (), generator=generator))]

        denoise = conditioned(denoiser, denoiser.encode(texts, choose(GUIDANCES)))
        seeds = [seed * len(captions) + start + row for row in range(len(texts))]
        noise = initial_noise(seeds, denoiser.latent_shape, device=denoiser.device, dtype=torch.float32)
        images = []
        for evaluations, rho in ((MANY, 4.0), (choose(FEW), choose(RHOS)), (choose(FEWEST), choose(RHOS))):
            sigmas = get_schedule("polynomial", int(evaluations) + 1, denoiser.sigma_min, denoiser.sigma_max, rho=rho)
            latents = dpmpp_sampler(denoise, sigmas[0].item() * noise, sigmas, max_order=2)
            images.append(decode(denoiser, latents).images.cpu())
        drawn.append((255 * torch.stack(images, dim=1)).round().byte().movedim(2, -1))
    return torch.cat(drawn).numpy()


def cached_drawings(folder: Path, pipeline: Path, denoiser: Denoiser, captions: Sequence[str], seed: int) -> np.ndarray:
    """`draw_threefold`, kept in `folder` between runs with the very weights of `pipeline` and these captions."""
    weights = [digest_of(path) for path in sorted(pipeline.rglob("*.safetensors"))]
    digest = hashlib.sha256(repr((weights, list(captions), seed)).encode()).hexdigest()
    file = folder / f"drawings-{digest[:12]}.npy"
    if not file.exists():
        drawn = draw_threefold(denoiser, captions, seed)
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, drawn)
    with reading_scratch(file):
        return np.load(file, allow_pickle=False)
