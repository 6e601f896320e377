"""Train the text encoder and the denoising network of the shapes world: `python -m models.shapes.train_diffusion`.

Needs `src/shapes/vae` (from `python -m models.shapes.train_autoencoder`) and completes the pipeline folder
`src/shapes`: epsilon prediction on the latents under Stable Diffusion's scaled-linear betas (0.00085 to 0.012, 1000
steps), text dropped in one case of ten for classifier-free guidance (Ho and Salimans, arXiv 2207.12598). First the text
encoder learns alone what a caption says about the layout (`LayoutHead`), then the network and it learn together. Run
the same command again to resume, with more --steps to go on. In two processes, each on a core of its own:
`OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m -- models.shapes.train_diffusion --compile`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.checkpoints import load_archive, write_archive
from models.digests import record_weights
from models.loading import fill, load_module, load_tokenizer, quiet_and_repeatable
from models.randomness import seed_globally
from models.shapes.data import cached_scenes, reading_scratch
from models.shapes.layout import LayoutHead, layout_of
from models.shapes.scenes import PLURALS, to_tensor
from models.shapes.tokenizer import CONTEXT_LENGTH, build_tokenizer
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
from models.upsampling import double_by_copies

LATENT_CHANNELS = 4
TEXT_WIDTH = 128
LAYOUT_STEPS = 600
LAYOUT_BATCH = 128
LAYOUT_LEARNING_RATE = 1e-3
LAYOUT_WEIGHT = 0.2  # of the layout beside the denoising, so that the text encoder does not forget it
TEXT_DROPPED = 0.1  # share of the captions that are replaced by the empty one


def text_encoder_config(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextConfig:
    """Of a text encoder [N, 32] -> [N, 32, 128] for the world's vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder [N, 32] -> [N, 32, 128] for the world's vocabulary."""
    return CLIPTextModel(text_encoder_config(tokenizer, layers=4))


def build_network() -> UNet2DConditionModel:
    """An untrained denoising network for latents [N, 4, 16, 16]: 5.6 million parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode_images(autoencoder: AutoencoderKL, images: Tensor, batch: int = 64) -> Tensor:
    """Scaled latent means [N, 4, 16, 16] of images uint8 [N, 64, 64, 3]."""
    latents = []
    for start in trange(0, len(images), batch, desc="encoding images", mininterval=10):
        pixels = 2 * to_tensor(images[start : start + batch].numpy()) - 1
        latents.append(autoencoder.encode(pixels.to(autoencoder.device)).latent_dist.mean.cpu())
    return torch.cat(latents) * autoencoder.config.scaling_factor


def cached_latents(folder: Path, autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """`encode_images`, kept in `folder` between runs with these very weights and images."""
    digest = hashlib.sha256(images.numpy())
    for weight in autoencoder.state_dict().values():
        digest.update(weight.cpu().contiguous().numpy())
    file = folder / f"latents-{digest.hexdigest()[:12]}.pt"
    if not file.exists():
        write_archive(file, encode_images(autoencoder, images).half())
    with reading_scratch(file):
        return load_archive(file, mapped=False).float()


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token numbers [N, 32] of captions."""
    return tokenizer(
        captions, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def spread_timesteps(batch: int, generator: torch.Generator) -> Tensor:
    """Integer timesteps [batch] in 0..999, rising, with a density that grows in proportion to the timestep.

    What stands where is decided at high noise, where the loss is small and its gradient is weak; equal shares would
    spend most of the training on texture. One draw falls into each of `batch` parts of equal probability, which has
    less variance than independent draws.
    """
    share = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return (1000 * share.sqrt()).long().clamp(max=999)


def take_over(parts: dict[str, nn.Module], tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Give a new network and text encoder the weights of a pipeline of the same architecture, whose words may differ.

    A word that its tokenizer knows keeps its embedding, and a plural that it does not know begins as the singular.
    """
    fill(parts["network"], load_module(UNet2DConditionModel, folder / "unet").state_dict(), folder / "unet")
    encoder = load_module(CLIPTextModel, folder / "text_encoder")
    old, new = (model.get_input_embeddings() for model in (encoder, parts["text_encoder"]))
    encoder.set_input_embeddings(new)
    fill(parts["text_encoder"], encoder.state_dict(), folder / "text_encoder")
    known = load_tokenizer(folder / "tokenizer").get_vocab()
    singular = {f"{many}</w>": f"{one}</w>" for one, many in PLURALS.items()}
    with torch.no_grad():
        for word, number in tokenizer.get_vocab().items():
            source = known.get(word, known.get(singular.get(word, "")))
            if source is not None:
                new.weight[number] = old.weight[source]


def learn_layout(
    model: nn.ModuleDict,
    tokens: Tensor,
    latents: Tensor,
    options: TrainingOptions,
    *,
    seed: int,
    device: torch.device | str,
) -> None:
    """Train the parts `text_encoder` and `layout` of `model` to say from a caption alone what stands where."""
    reader = nn.ModuleDict({name: model[name] for name in ("text_encoder", "layout")})

    def loss(step: int) -> dict[str, Tensor]:
        (rows,) = own_share(torch.randint(len(latents), (LAYOUT_BATCH,), generator=step_generator(seed, step)))
        text = tokens[rows].to(device)
        with torch.autocast(text.device.type, torch.bfloat16):
            guessed = reader["layout"](reader["text_encoder"](text).last_hidden_state)
        return {"loss": functional.mse_loss(guessed.float(), layout_of(latents[rows]).to(device))}

    averaged = fit(reader, loss, options)
    reader.load_state_dict(averaged.state_dict())


def train(
    captions: list[str],
    latents: Tensor,
    options: TrainingOptions,
    *,
    batch: int,
    seed: int,
    device: torch.device | str,
    start: Path | None = None,
    compiled: bool = False,
) -> nn.ModuleDict:
    """Train a network and its text encoder from fresh weights, or from where the checkpoints stopped.

    Args:
        captions: N of them.
        latents: [N, 4, 16, 16], scaled.
        options: of the second part; the layout's checkpoint lies beside its own.
        batch: rows of a step.
        seed: of every draw.
        device: where to.
        start: a pipeline's folder whose weights are taken over in place of fresh ones.
        compiled: whether torch.compile makes the network's code.

    Returns:
        The parts `network` and `text_encoder` (and the layout's head), their weights averaged.
    """
    seed_globally(seed)
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    tokens, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    parts = {
        "network": build_network(),
        "text_encoder": build_text_encoder(tokenizer),
        "layout": LayoutHead(TEXT_WIDTH, channels=LATENT_CHANNELS),
    }
    if start is not None:
        take_over(parts, tokenizer, start)
    model = nn.ModuleDict(parts).to(device)
    # On a CPU the fused attention's backward pass takes longer than all convolutions together.
    model["network"].set_attn_processor(AttnProcessor())
    model["text_encoder"].set_attn_implementation("eager")
    if start is None:  # a text encoder that already works with a network is not to move away from it alone
        layout_checkpoint = options.checkpoint.with_name(f"{options.checkpoint.stem}-layout.pt")
        steps = min(LAYOUT_STEPS, options.steps)
        layout_options = replace(options, steps=steps, learning_rate=LAYOUT_LEARNING_RATE, checkpoint=layout_checkpoint)
        learn_layout(model, tokens, latents, layout_options, seed=seed, device=device)
    network: Callable = model["network"]
    if compiled:
        double_by_copies(network)
        network = torch.compile(network)
    signal = scheduler.alphas_cumprod.sqrt()
    spread = (1 - scheduler.alphas_cumprod).sqrt()

    def loss(step: int) -> dict[str, Tensor]:
        generator = step_generator(seed, step)
        rows = torch.randint(len(latents), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < TEXT_DROPPED
        noise = torch.randn(batch, *latents.shape[1:], generator=generator)
        timesteps = spread_timesteps(batch, generator)
        rows, dropped, noise, timesteps = own_share(rows, dropped, noise, timesteps)
        dropped &= ~dropped.all()  # a small batch without any caption would leave the layout nothing to be read from
        text = torch.where(dropped[:, None], empty, tokens[rows]).to(device)
        noisy = signal[timesteps].view(-1, 1, 1, 1) * latents[rows] + spread[timesteps].view(-1, 1, 1, 1) * noise
        with torch.autocast(text.device.type, torch.bfloat16):
            states = model["text_encoder"](text).last_hidden_state
            (predicted,) = network(noisy.to(device), timesteps.to(device), states, return_dict=False)
            guessed = model["layout"](states[~dropped])
        errors = functional.mse_loss(predicted.float(), noise.to(device), reduction="none").mean(dim=(1, 2, 3))
        layout = functional.mse_loss(guessed.float(), layout_of(latents[rows[~dropped]]).to(device))
        # The weight lies halfway between those of epsilon (1) and velocity (1 + sigma^2) prediction, for the reason of
        # the timesteps' density: layout.
        weighted = (errors / signal[timesteps].to(device)).mean()
        return {"loss": weighted + LAYOUT_WEIGHT * layout, "epsilon": errors.mean(), "layout": layout}

    return fit(model, loss, options)


@training_command(output="src/shapes", steps=20_000, images=80_000, batch=32, learning_rate=5e-4, seed=1, shared=True)
@start_option("A pipeline's folder")
@compile_option
def main(run: TrainingRun, start: Path | None, compiled: bool) -> None:
    """Train text encoder and network on rendered scenes and write the pipeline as a diffusers folder."""
    autoencoder = load_module(AutoencoderKL, run.output / "vae").to(run.device)
    rendered = cached_scenes(run.scratch, "train", run.images, run.seed)
    latents = cached_latents(run.scratch, autoencoder, torch.from_numpy(rendered.images))
    options = run.options("diffusion.pt", {"start": start})
    averaged = train(
        rendered.captions,
        latents,
        options,
        batch=run.batch,
        seed=run.seed,
        device=run.device,
        start=start,
        compiled=compiled,
    )
    save_pipeline(run.output, averaged, autoencoder, build_tokenizer(), build_scheduler())
    if leads():
        click.echo(f"wrote {run.output}")


def save_pipeline(
    output: Path, model: nn.ModuleDict, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, scheduler: DDIMScheduler
) -> None:
    """Write the folder of the pipeline that these parts make; see `write_pipeline`."""
    with quiet_and_repeatable():  # its modules warn of what is not installed, even before a --help
        from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=model["text_encoder"],
        tokenizer=tokenizer,
        unet=model["network"],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    write_pipeline(output, pipeline)


def write_pipeline(output: Path, pipeline: DiffusionPipeline) -> None:
    """Write a pipeline's folder, weights in float16; read without a type, all of it comes back in float32.

    Of several processes the first one does.
    """
    if not leads():
        return
    with quiet_and_repeatable():  # it warns of each part that a pipeline does without
        pipeline.to(dtype=torch.float16).save_pretrained(output)
    record_weights(output)
    # diffusers writes down the folder that a module was read from; it means nothing to others.
    _amend(output / "vae" / "config.json", _name_or_path=None)
    # Where nobody asks for a type, diffusers takes float32, but transformers the one that it finds here.
    for folder in output.glob("text_encoder*"):
        _amend(folder / "config.json", dtype="float32")


def _amend(file: Path, **entries: str | None) -> None:
    """Set entries of a JSON file; None removes one."""
    described = {**json.loads(file.read_text()), **entries}
    kept = {name: value for name, value in described.items() if name not in entries or value is not None}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
