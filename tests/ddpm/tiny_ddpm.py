"""A small random DDPM, and the tiny configuration around it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

from models.pixel_diffusion import PixelDiffusion, load_pixel_diffusion, save_pixel_diffusion
from training.ddpm.policy import DDIMSteps, DenoisingPolicy

SIZE = 8
SHAPE = (3, SIZE, SIZE)
SCHEDULER = {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.1, "clip_sample": False}


def tiny_network(seed: int = 0, *, channels: tuple[int, int] = (8, 16), image_channels: int = 3) -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=SIZE,
            in_channels=image_channels,
            out_channels=image_channels,
            layers_per_block=1,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=4,
        ).eval()


def write_tiny_ddpm(folder: Path, seed: int = 0, **scheduler: object) -> Path:
    config = dict(DDPMScheduler(**(SCHEDULER | scheduler)).config)
    save_pixel_diffusion(tiny_network(seed), config, folder)
    return folder


def tiny_model(folder: Path, **scheduler: object) -> PixelDiffusion:
    model = load_pixel_diffusion(str(write_tiny_ddpm(folder, **scheduler)))
    model.network.requires_grad_(False)
    return model


def tiny_policy(model: PixelDiffusion, num_steps: int = 4, eta: float = 1.0) -> DenoisingPolicy:
    return DenoisingPolicy(model.network, model, DDIMSteps(model.alphas_cumprod, num_steps, eta))


def tiny_overrides(folder: Path) -> list[str]:
    """Overrides that make configs/smoke.yaml tinier still, with every path below `folder`."""
    return [
        f"path.ddpm={folder / 'start'}",
        f"path.runs={folder / 'runs'}",
        f"finetune.save={folder / 'tuned'}",
        f"train_reward.save={folder / 'reward.pt'}",
    ]
