"""Train the autoencoder of the shapes world: `python -m models.shapes.train_autoencoder`.

Writes `src/shapes/vae`. About 15 minutes on 2 cores; run the same command again to resume.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from models.digests import record_weights
from models.loading import fill, load_module
from models.randomness import seed_globally
from models.shapes.data import cached_scenes
from models.shapes.scenes import IMAGE_SIZE, to_tensor
from models.shapes.training_loop import (
    TrainingOptions,
    TrainingRun,
    fit,
    start_option,
    step_generator,
    training_command,
)

KL_WEIGHT = 3e-4  # per latent number, against the mean absolute error of a pixel in [-1, 1]
SQUARED_WEIGHT = 2.0  # of the mean squared error: without it small coloured parts are learned late
EDGE_WEIGHT = 0.5  # of the error of neighbouring pixels' differences: what keeps thin parts sharp

# Added to the posterior's deviation: what a decoder is given later is a denoiser's guess, and latents whose meaning
# hangs on their last digits are hard to guess.
LATENT_NOISE = 0.2
INITIAL_LOG_VARIANCE = -6.0  # of the posterior
WINDOW = 32  # pixels: most steps see windows of this size, four times as many a second; the last ones see whole images
WINDOW_SHARE = 0.9  # of the steps
DECODER_BATCH = 16


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder [N, 3, 64, 64] <-> [N, 4, 16, 16]; no attention, so that decoding is cheap.

    Two groups in the normalisation: with few channels a group, it would wipe out plain colours.
    """
    autoencoder = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    # Start with a narrow posterior: from the usual deviation of 1 the decoder sees little but noise and learns slowly.
    moments = autoencoder.quant_conv
    with torch.no_grad():
        moments.weight[moments.out_channels // 2 :] = 0.0
        moments.bias[moments.out_channels // 2 :] = INITIAL_LOG_VARIANCE
    return autoencoder


def reconstruction_terms(autoencoder: AutoencoderKL, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Absolute and squared error, error of the differences between neighbours, and Kullback-Leibler divergence to the
    unit normal.

    Args:
        autoencoder: in training.
        images: [N, 3, 64, 64] in [-1, 1].
        generator: for the draw from the posterior.
    """
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = autoencoder.encode(images).latent_dist
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    deviation = (log_variance.exp() + LATENT_NOISE**2).sqrt()
    with torch.autocast(images.device.type, torch.bfloat16):
        decoded = autoencoder.decode(mean + deviation * noise).sample
    decoded = decoded.float()
    error = functional.l1_loss(decoded, images)
    squared = functional.mse_loss(decoded, images)
    edges = sum(functional.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (-1, -2))
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {
        "loss": error + SQUARED_WEIGHT * squared + EDGE_WEIGHT * edges + KL_WEIGHT * divergence,
        "absolute_error": error,
        "squared_error": squared,
        "divergence": divergence,
        "posterior_deviation": (0.5 * log_variance).exp().mean(),
    }


def random_windows(images: Tensor, generator: torch.Generator) -> Tensor:
    """A window [N, 3, 32, 32] of each image [N, 3, 64, 64], at a random place."""
    corners = torch.randint(IMAGE_SIZE - WINDOW + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack(
        [image[:, y : y + WINDOW, x : x + WINDOW] for image, (y, x) in zip(images, corners, strict=True)]
    )


@torch.no_grad()
def measured_scaling_factor(autoencoder: AutoencoderKL, images: Tensor) -> float:
    """1 / standard deviation of the latents, as Stable Diffusion defines its scaling factor."""
    return 1.0 / float(autoencoder.encode(images).latent_dist.mean.std())


def refine_decoder(autoencoder: AutoencoderKL, images: Tensor, options: TrainingOptions, *, seed: int) -> None:
    """Train the decoder alone on whole images [N, 3, 64, 64] in [0, 1], in place: latents stay what they are.

    Small outlines and stripes are the last thing that a decoder learns, and without the encoder's backward pass a step
    takes half the time.
    """
    autoencoder.requires_grad_(False)
    decoder = nn.ModuleDict({"convolution": autoencoder.post_quant_conv, "decoder": autoencoder.decoder})
    decoder.requires_grad_(True)
    device = autoencoder.device

    def loss(step: int) -> dict[str, Tensor]:
        generator = step_generator(seed, step)
        rows = torch.randint(len(images), (DECODER_BATCH,), generator=generator)
        return reconstruction_terms(autoencoder, (2 * images[rows] - 1).to(device), generator)

    decoder.load_state_dict(fit(decoder, loss, options).state_dict())


@training_command(output="src/shapes/vae", steps=7000, images=20_000, batch=8, learning_rate=7e-4, seed=0)
@start_option("An autoencoder's folder")
@click.option("--decoder-steps", type=click.IntRange(min=0), default=2500, help="More, of the decoder alone.")
def main(run: TrainingRun, start: Path | None, decoder_steps: int) -> None:
    """Train the autoencoder on rendered scenes and write it as a diffusers folder."""
    seed_globally(run.seed)
    rendered = to_tensor(cached_scenes(run.scratch, "train", run.images, run.seed).images)  # [N, 3, 64, 64] in [0, 1]
    autoencoder = build_autoencoder()
    if start is not None:
        fill(autoencoder, load_module(AutoencoderKL, start).state_dict(), start)
    autoencoder.to(run.device)

    def loss(step: int) -> dict[str, Tensor]:
        generator = step_generator(run.seed, step)
        rows = torch.randint(len(rendered), (run.batch,), generator=generator)
        pixels = rendered[rows] if step >= WINDOW_SHARE * run.steps else random_windows(rendered[rows], generator)
        return reconstruction_terms(autoencoder, (2 * pixels - 1).to(run.device), generator)

    options = run.options("autoencoder.pt", {"start": start}, averaging_decay=0.995)
    averaged = fit(autoencoder, loss, options)
    some = (2 * rendered[:512] - 1).to(run.device)
    averaged.register_to_config(scaling_factor=measured_scaling_factor(averaged, some))
    # One that was refined after fewer steps of the autoencoder does not know the latents of this one.
    options = replace(options, steps=decoder_steps, checkpoint=run.scratch / f"decoder-after-{run.steps}.pt")
    refine_decoder(averaged, rendered, options, seed=run.seed + 1)
    averaged.to(torch.float16).save_pretrained(run.output)
    record_weights(run.output)
    click.echo(f"wrote {run.output}, scaling factor {averaged.config.scaling_factor:.4f}")


if __name__ == "__main__":
    main()
