"""Train the small unconditional DDPM of the shapes world: `python -m models.shapes.train_ddpm`.

Writes `src/shapes_ddpm`, a diffusers pipeline folder of 32x32 images, in float16: what `configs/shapes.yaml` starts
from. It is small and stopped early on purpose, so that fine-tuning it has something to gain. About 17 minutes on one
core; run the same command again to resume.
"""

from __future__ import annotations

import click
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional

from models.pixel_diffusion import save_pixel_diffusion
from models.randomness import seed_globally
from models.shapes.data import cached_scenes
from models.shapes.scenes import to_tensor
from models.shapes.training_loop import TrainingRun, fit, step_generator, training_command

SIZE = 32  # pixels: half of the world's own, averaged down


def build_network() -> UNet2DModel:
    """An untrained denoising network for images [N, 3, 32, 32]: 1.0 million parameters.

    Narrow where the maps are large, for a CPU's sake: 0.18 GFLOP an image. No attention either; the lowest maps have
    4x4 pixels, so that every pixel knows of all others.
    """
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        add_attention=False,
        norm_num_groups=8,
    )


def build_scheduler() -> DDPMScheduler:
    """The linear noise schedule of the DDPM paper (arXiv 2006.11239, section 4), with predictions of the velocity.

    In few steps a predicted noise will not do: at the first one the clean image is guessed from it by a division by
    sqrt(alpha) = 0.006, which makes every background a random pure colour.
    """
    return DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=True, prediction_type="v_prediction")


def small_images(images: Tensor) -> Tensor:
    """Scenes [N, 3, 64, 64] in [0, 1] averaged down to [N, 3, 32, 32] in [-1, 1]."""
    return 2 * functional.avg_pool2d(images, images.shape[-1] // SIZE) - 1


def velocity_error(network: UNet2DModel, clean: Tensor, alphas_cumprod: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted velocity at random steps (arXiv 2202.00512, appendix D).

    Args:
        network: in training.
        clean: [N, 3, H, W] in [-1, 1].
        alphas_cumprod: [T].
        generator: for steps and noise.
    """
    timesteps = torch.randint(len(alphas_cumprod), (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    device = network.device
    return functional.mse_loss(network(noisy.to(device), timesteps.to(device)).sample, velocity.to(device))


@training_command(output="src/shapes_ddpm", steps=5000, images=10_000, batch=32, learning_rate=1e-3, seed=100)
def main(run: TrainingRun) -> None:
    """Train the network on rendered scenes and write it as a diffusers folder."""
    seed_globally(run.seed)
    clean = small_images(to_tensor(cached_scenes(run.scratch, "train", run.images, run.seed).images))  # [N, 3, 32, 32]
    network, scheduler = build_network().to(run.device), build_scheduler()

    def loss(step: int) -> dict[str, Tensor]:
        generator = step_generator(run.seed, step)
        rows = torch.randint(len(clean), (run.batch,), generator=generator)
        return {"loss": velocity_error(network, clean[rows], scheduler.alphas_cumprod, generator)}

    averaged = fit(network, loss, run.options("ddpm.pt", {}, averaging_decay=0.995))
    save_pixel_diffusion(averaged.to("cpu", torch.float16), scheduler.config, run.output)
    click.echo(f"wrote {run.output}")


if __name__ == "__main__":
    main()
