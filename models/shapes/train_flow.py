"""Train the flow-matching model of the shapes world: `python -m models.shapes.train_flow`.

Needs `src/shapes` and writes `src/shapes_flow`, a pipeline of Stable Diffusion 3's classes without T5: a rectified flow
(arXiv 2209.03003) in the same latents, with an MMDiT (arXiv 2403.03206) of 5.2 million parameters that reads two CLIPs.
Its teacher is the first model: of noisy scenes it learns that model's denoised estimates. Scenes alone as targets say
the same on average, but what a caption leaves open is noise in them, three quarters of the loss: after 4,500 steps
so, it drew colours in their places and no shapes. Run the same command again to resume, with more --steps to go on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.denoiser import Conditioning, Denoiser
from models.families.stable_diffusion_3 import T5_TOKENS, SharedTokenAttention, joint_text
from models.loading import fill, load_module, quiet_and_repeatable
from models.randomness import seed_globally
from models.registry import load_denoiser
from models.shapes.data import cached_scenes
from models.shapes.tokenizer import build_tokenizer
from models.shapes.train_diffusion import (
    LATENT_CHANNELS,
    TEXT_DROPPED,
    TEXT_WIDTH,
    cached_latents,
    text_encoder_config,
    tokenize,
    write_pipeline,
)
from models.shapes.training_loop import (
    TrainingOptions,
    TrainingRun,
    compile_option,
    fit,
    leads,
    own_share,
    start_option,
    step_generator,
    training_command,
)

SHIFT = 3.0  # of the noise levels, towards noise, where what stands where is decided
LOGIT_MEAN = 0.5  # of the logit-normal noise levels of training: their median is 0.62
LARGEST_SIGMA = 1 - 1e-4  # of training; at 1 the level in the teacher's terms is infinite
ENCODERS = ("text_encoder", "text_encoder_2")


def build_network() -> SD3Transformer2DModel:
    """An untrained MMDiT for latents [N, 4, 16, 16], 64 tokens each.

    Every block begins as the identity (adaLN-Zero, arXiv 2212.09748), which diffusers leaves to the training code.
    """
    network = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=6 * 32,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, module in network.named_modules():
        if name == "proj_out" or (name.endswith(".linear") and "norm" in name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return network


def build_parts(tokenizer: CLIPTokenizer, world: Path, start: Path | None = None) -> nn.ModuleDict:
    """The network and its two text encoders, the larger one with the weights of the pipeline in the folder `world`.

    start: a pipeline's folder whose weights are taken over for all three.
    """
    first, second = (CLIPTextModelWithProjection(text_encoder_config(tokenizer, layers)) for layers in (4, 2))
    read = world / "text_encoder"
    fill(first.text_model, load_module(CLIPTextModel, read).state_dict(), read)
    nn.init.eye_(first.text_projection.weight)
    parts = nn.ModuleDict(dict(zip(("network", *ENCODERS), (build_network(), first, second), strict=True)))
    if start is not None:
        for part, name in zip(parts.values(), ("transformer", *ENCODERS), strict=True):
            fill(part, load_module(type(part), start / name).state_dict(), start / name)
    return parts


@torch.no_grad()
def taught(
    teacher: Denoiser, clean: Tensor, sigma: Tensor, conditioning: Conditioning, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy images of the flow, and what another model of the same latents takes for the velocity there.

    With x = (1 - sigma) x0 + sigma n, that model's noise level is sigma / (1 - sigma), and the velocity (x - D) / sigma
    with its estimate D of x0. Where there is more noise than it knows, it gives its estimate before the rest of the
    noise is added: the mean of these is the estimate that is wanted.

    Args:
        teacher: that model.
        clean: x0 [N, C, H, W].
        sigma: [N], in (0, 1).
        conditioning: of N captions.
        noise: [2, N, C, H, W], standard normal.

    Returns:
        x and the velocities, both [N, C, H, W].
    """
    sigma = sigma.view(-1, 1, 1, 1)
    level = sigma / (1 - sigma)
    known = level.clamp(max=teacher.sigma_max)
    seen = clean + known * noise[0]
    noisy = (1 - sigma) * (seen + (level**2 - known**2).sqrt() * noise[1])
    estimate = teacher.denoise(seen, known.flatten().double(), conditioning)
    return noisy, (noisy - estimate) / sigma


def noise_levels(number: int, least: float, generator: torch.Generator) -> Tensor:
    """Noise levels [number] to train at, from `least`, below which a teacher's errors are divided by next to nothing.

    Three of four lie about where shapes and their places are decided, logit-normal (arXiv 2403.03206, section 3.1);
    the others are spread evenly, so that no level is forgotten.
    """
    share = (torch.arange(number) + torch.rand(number, generator=generator)) / number
    even = torch.lerp(torch.tensor(least), torch.tensor(LARGEST_SIGMA), share)
    shaped = torch.sigmoid(LOGIT_MEAN + torch.special.ndtri(share)).clamp(least, LARGEST_SIGMA)
    return torch.where(torch.randperm(number, generator=generator) % 4 == 0, even, shaped)


def train(
    captions: list[str],
    latents: Tensor,
    options: TrainingOptions,
    *,
    batch: int,
    seed: int,
    device: torch.device | str,
    world: Path,
    start: Path | None = None,
    compiled: bool = False,
) -> nn.ModuleDict:
    """Train a network and its text encoders by the first model, from where the checkpoints stopped.

    Args:
        captions: N of them.
        latents: [N, 4, 16, 16], scaled.
        options: how long and how fast.
        batch: rows of a step.
        seed: of every draw.
        device: where to.
        world: the first model's folder: its text encoder is taken over, and it teaches.
        start: see `build_parts`.
        compiled: whether torch.compile makes the network's code.

    Returns:
        The parts `network`, `text_encoder` and `text_encoder_2`, their weights averaged.
    """
    seed_globally(seed)
    tokenizer = build_tokenizer()
    tokens, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    model = build_parts(tokenizer, world, start).to(device)
    teacher = load_denoiser(str(world), device=device, dtype=torch.float32)
    model["network"].set_attn_processor(SharedTokenAttention(T5_TOKENS))
    for encoder in ENCODERS:
        model[encoder].set_attn_implementation("eager")
    least = teacher.sigma_min / (1 + teacher.sigma_min)
    (reader,) = teacher.text_encoders
    network: Callable = torch.compile(model["network"]) if compiled else model["network"]

    def loss(step: int) -> dict[str, Tensor]:
        generator = step_generator(seed, step)
        rows = torch.randint(len(latents), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < TEXT_DROPPED
        noise = torch.randn(2, batch, *latents.shape[1:], generator=generator)
        sigma = noise_levels(batch, least, generator)
        rows, dropped, sigma, *noise = own_share(rows, dropped, sigma, *noise)
        text = torch.where(dropped[:, None], empty, tokens[rows]).to(device)
        noise, sigma = torch.stack(noise).to(device), sigma.to(device)
        # On a CPU the fused attention's backward pass takes longer than all else together.
        with torch.autocast(text.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():  # in one batch: `encode` reads one by one, which takes a fifth of a step
                told = Conditioning(len(rows), {"encoder_hidden_states": reader.module(text)[0]}, None, 1.0)
            noisy, target = taught(teacher, latents[rows].to(device), sigma, told, noise)
            read = [model[encoder](text, output_hidden_states=True) for encoder in ENCODERS]
            conditioning = joint_text(read, 2 * TEXT_WIDTH, blank_tokens=1)
            velocity = network(noisy, timestep=1000 * sigma, **conditioning, return_dict=False)[0]
        return {"loss": functional.mse_loss(velocity.float(), target)}

    return fit(model, loss, options)


@training_command(
    output="src/shapes_flow", steps=10_000, images=80_000, batch=64, learning_rate=2e-3, seed=1, shared=True
)
@click.option("--world", type=click.Path(path_type=Path), default=Path("src/shapes"), help="Folder of the first model.")
@start_option("A pipeline's folder")
@compile_option
def main(run: TrainingRun, world: Path, start: Path | None, compiled: bool) -> None:
    """Train the flow-matching model on rendered scenes and write its pipeline as a diffusers folder."""
    autoencoder = load_module(AutoencoderKL, world / "vae").to(run.device)
    rendered = cached_scenes(run.scratch, "train", run.images, run.seed)
    latents = cached_latents(run.scratch, autoencoder, torch.from_numpy(rendered.images))
    options = run.options("flow.pt", {"start": start, "world": world}, muon=True)
    averaged = train(
        rendered.captions,
        latents,
        options,
        batch=run.batch,
        seed=run.seed,
        device=run.device,
        world=world,
        start=start,
        compiled=compiled,
    )
    save_flow_pipeline(run.output, averaged, autoencoder, build_tokenizer())
    if leads():
        click.echo(f"wrote {run.output}")


def save_flow_pipeline(
    output: Path, model: nn.ModuleDict, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer
) -> None:
    """Write the folder of the pipeline that these parts make; see `write_pipeline`."""
    autoencoder.register_to_config(shift_factor=0.0)  # the classes of Stable Diffusion 3 want a number
    with quiet_and_repeatable():
        from diffusers import StableDiffusion3Pipeline
    pipeline = StableDiffusion3Pipeline(
        transformer=model["network"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=autoencoder,
        text_encoder=model["text_encoder"],
        tokenizer=tokenizer,
        text_encoder_2=model["text_encoder_2"],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    write_pipeline(output, pipeline)


if __name__ == "__main__":
    main()
