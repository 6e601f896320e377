"""Train the preference reward of the shapes world: `python -m models.shapes.train_reward`.

Writes `weights/shapes_reward.pt` in the checkpoint layout of open_clip, which is HPS v2.1's, with its configuration
beside it in `weights/shapes_reward.json`. Three losses: images and captions of a batch find each other (Radford et
al., arXiv 2103.00020), the true caption beats captions that are wrong in one respect, and a good image beats a worse
one and that a still worse one, for the same caption (Bradley and Terry, as in HPS v2, arXiv 2306.09341).

These alone do not teach what stands where: a reward that was trained with them only told `a star left of a circle`
from `a star right of a circle` at chance. So both towers learn first to say it: a linear map reads a coarse layout off
either embedding, and goes on doing so beside the three losses. The text model starts from the diffusion model's (needs
`src/shapes/text_encoder`, from `python -m models.shapes.train_diffusion`). Run the same command again to resume.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from models.clip import (
    image_features,
    load_open_clip_checkpoint,
    new_clip,
    preprocess,
    save_open_clip_checkpoint,
    text_features,
    tokenize,
)
from models.loading import fill, load_module
from models.randomness import seed_globally
from models.registry import load_denoiser
from models.shapes.data import RenderedScenes, cached_scenes
from models.shapes.drawings import cached_drawings
from models.shapes.layout import CELLS, layout_of
from models.shapes.negatives import CHANGES, CORRUPTIONS, contradicts, worse_images, wrong_scene
from models.shapes.scenes import IMAGE_SIZE, impossible, parse, to_tensor
from models.shapes.tokenizer import CONTEXT_LENGTH, build_tokenizer
from models.shapes.training_loop import (
    TrainingOptions,
    TrainingRun,
    fit,
    start_option,
    step_generator,
    training_command,
)

WRONG_CAPTIONS = 3  # for each image
COMPARED_SHARE = 1 / 3  # of the images whose corrupted copies are compared in a step
DRAWINGS = 3072  # captions that the diffusion model draws
DRAWN_SHARE = 1 / 4  # of a batch, besides: drawings that are compared in a step
COMPARED_SCENES = 1000  # whose captions are compared with wrong ones after training
LAYOUT_STEPS = 1500
LAYOUT_BATCH = 64
LAYOUT_LEARNING_RATE = 8e-4
LAYOUT_WEIGHT = 50.0  # of the squared error of a layout of colours in [0, 1]


def model_configuration(vocabulary_size: int) -> dict[str, Any]:
    """A small CLIP in open_clip's terms: 64 patches of 8x8 pixels."""
    return {
        "embed_dim": 128,
        "quick_gelu": True,  # as the diffusion model's text encoder
        "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary_size,
            "width": 128,
            "heads": 4,
            "layers": 4,
        },
    }


class RewardInTraining(nn.Module):
    """The reward and what is thrown away after training: two maps from an embedding to a layout of colours.

    They are linear: a deeper head found its own use for the embedding and left what stands left or right out of it.
    """

    def __init__(self, configuration: dict[str, Any]) -> None:
        """`configuration`: see `model_configuration`; fresh weights from torch's global generator."""
        super().__init__()
        width = configuration["embed_dim"]
        self.clip: CLIPModel = new_clip(configuration)
        self.layouts = nn.ModuleDict({name: nn.Linear(width, 3 * CELLS**2) for name in ("image", "text")})
        # On a CPU the fused attention's backward pass is the slowest part of a step.
        self.clip.set_attn_implementation("eager")

    def layout_error(self, name: str, features: Tensor, images: Tensor) -> Tensor:
        """Mean squared error of the layout of `images` [N, 3, 64, 64] as read off unit features [N, D], a scalar."""
        read = self.layouts[name](features * features.shape[-1] ** 0.5)  # components of size 1
        return functional.mse_loss(read, layout_of(images).flatten(1))


def learn_layout(
    model: RewardInTraining,
    pixels: Tensor,
    tokens: Tensor,
    options: TrainingOptions,
    *,
    seed: int,
    device: torch.device,
) -> None:
    """Train both towers to say what stands where; pixels uint8 [N, 64, 64, 3], tokens [N, L] of their captions."""

    def loss(step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(pixels), (LAYOUT_BATCH,), generator=step_generator(seed, step))
        images = to_tensor(pixels[rows].numpy()).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            seen = image_features(model.clip, preprocess(images, IMAGE_SIZE))
            read = text_features(model.clip, tokens[rows].to(device))
        image_layout = model.layout_error("image", functional.normalize(seen.float(), dim=-1), images)
        text_layout = model.layout_error("text", functional.normalize(read.float(), dim=-1), images)
        loss = LAYOUT_WEIGHT * (image_layout + text_layout)
        return {"loss": loss, "image_layout": image_layout, "text_layout": text_layout}

    averaged = fit(model, loss, options)
    model.load_state_dict(averaged.state_dict())


def reward_terms(
    model: RewardInTraining, images: Tensor, triples: Tensor, right: Tensor, wrong: Tensor, described: Tensor
) -> dict[str, Tensor]:
    """The losses and how often each comparison is right.

    Args:
        model: in training.
        images: good images [N, 3, 64, 64] in [0, 1].
        triples: [M, 3, 3, 64, 64], each an image, a worse and a still worse one.
        right: tokens [N, L] of the true captions.
        wrong: tokens [N * W, L]: W wrong captions of each image in turn.
        described: tokens [M, L] of the triples' captions.
    """
    number = len(images)
    with torch.autocast(images.device.type, torch.bfloat16):
        seen = image_features(model.clip, preprocess(torch.cat([images, triples.flatten(0, 1)]), IMAGE_SIZE))
        read = text_features(model.clip, torch.cat([right, wrong, described]))
    seen, read = functional.normalize(seen.float(), dim=-1), functional.normalize(read.float(), dim=-1)
    image_layout = model.layout_error("image", seen[:number], images)
    text_layout = model.layout_error("text", read[:number], images)
    scale = model.clip.logit_scale.exp().clamp(max=100)
    true, false, captions = read.split([number, len(wrong), len(described)])
    logits = scale * seen[:number] @ true.T  # [N, N]
    others = scale * torch.einsum("nd,nwd->nw", seen[:number], false.view(number, -1, false.shape[-1]))
    rows = torch.arange(number, device=images.device)
    matching = functional.cross_entropy(torch.cat([logits, others], dim=1), rows) + functional.cross_entropy(
        logits.T, rows
    )
    compared = seen[number:].view(len(triples), 3, -1)
    best, middle, worst = (scale * torch.einsum("mtd,md->mt", compared, captions)).unbind(1)
    order = functional.softplus(middle - best).mean() + functional.softplus(worst - middle).mean()
    return {
        "loss": 0.5 * matching + order + LAYOUT_WEIGHT * (image_layout + text_layout),
        "matching": matching,
        "order": order,
        "image_layout": image_layout,
        "text_layout": text_layout,
        "true_caption_wins": (logits.diagonal() > others.amax(dim=1)).float().mean(),
        "good_beats_light": (best > middle).float().mean(),
        "light_beats_heavy": (middle > worst).float().mean(),
    }


@torch.no_grad()
def told_apart(model: CLIPModel, tokenizer: CLIPTokenizer, scenes: RenderedScenes, seed: int) -> dict[str, float]:
    """How often an image's own caption scores higher than one that is wrong in one respect, by the kind of fault."""
    random = np.random.default_rng(seed)
    seen = functional.normalize(image_features(model, preprocess(to_tensor(scenes.images), IMAGE_SIZE)), dim=-1)

    def scores(captions: Sequence[str]) -> Tensor:
        tokens = tokenize(tokenizer, captions, CONTEXT_LENGTH)
        return (seen * functional.normalize(text_features(model, tokens), dim=-1)).sum(-1)  # [N]

    shares: dict[str, float] = {}
    right = scores(scenes.captions)
    for change in dict.fromkeys(CHANGES):
        right_scenes = [parse(caption) for caption in scenes.captions]
        changed = [change(scene, random) for scene in right_scenes]
        differs = torch.tensor(
            [contradicts(a, b) and not impossible(a) for a, b in zip(changed, right_scenes, strict=True)]
        )
        wrong = [scene.caption() for scene in changed]
        shares[change.__name__] = (right > scores(wrong))[differs].float().mean().item()
    return shares


@training_command(output="weights/shapes_reward.pt", steps=3500, images=80_000, batch=48, learning_rate=1e-3, seed=1)
@click.option(
    "--tokenizer",
    "tokenizer_folder",
    type=click.Path(path_type=Path),
    default=Path("src/shapes/tokenizer"),
    help="Where its tokenizer is written.",
)
@click.option(
    "--pipeline",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("src/shapes"),
    help="The diffusion model: its text encoder is the start, its drawings are compared.",
)
@start_option("A checkpoint of the same configuration")
def main(run: TrainingRun, tokenizer_folder: Path, pipeline: Path, start: Path | None) -> None:
    """Train the reward and write its checkpoint, its configuration and its tokenizer."""
    seed_globally(run.seed)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tokenizer_folder)  # before use: it would write down how long its last text might be
    rendered = cached_scenes(run.scratch, "train", run.images, run.seed)
    pixels = torch.from_numpy(rendered.images)  # uint8 [N, 64, 64, 3]
    configuration = model_configuration(len(tokenizer))
    model = RewardInTraining(configuration).to(run.device)
    tokens = tokenize(tokenizer, rendered.captions, CONTEXT_LENGTH)
    options = run.options("reward.pt", {"start": start, "pipeline": pipeline})
    if start is None:
        read = pipeline / "text_encoder"
        fill(model.clip.text_model, load_module(CLIPTextModel, read).state_dict(), read)
        layout_options = replace(
            options,
            steps=LAYOUT_STEPS,
            learning_rate=LAYOUT_LEARNING_RATE,
            checkpoint=run.scratch / "reward-layout.pt",
        )
        learn_layout(model, pixels, tokens, layout_options, seed=run.seed, device=run.device)
    else:
        model.clip.load_state_dict(load_open_clip_checkpoint(start, configuration).state_dict())
    denoiser = load_denoiser(pipeline, device=run.device, dtype=torch.bfloat16)
    drawings = cached_drawings(run.scratch, pipeline, denoiser, rendered.captions[:DRAWINGS], run.seed)
    compared, drawn = (max(int(share * run.batch), 1) for share in (COMPARED_SHARE, DRAWN_SHARE))

    def loss(step: int) -> dict[str, Tensor]:
        generator, random = step_generator(run.seed, step), np.random.default_rng([run.seed, step])
        rows = torch.randint(len(pixels), (run.batch,), generator=generator)
        good = to_tensor(pixels[rows].numpy())
        captions = [rendered.captions[row] for row in rows.tolist()]
        wrong = [wrong_scene(parse(text), random).caption() for text in captions for _ in range(WRONG_CAPTIONS)]
        wrong_tokens = tokenize(tokenizer, wrong, CONTEXT_LENGTH)
        kind = torch.randint(len(CORRUPTIONS), (compared,), generator=generator)
        severities = torch.rand(2, compared, generator=generator).sort(dim=0).values
        corrupted = [
            worse_images(good[:compared], severity, kind, good[-compared:], step_generator(run.seed + 1, step))
            for severity in (0.7 * severities[0], 0.3 + 0.7 * severities[1])
        ]
        shown = torch.randint(len(drawings), (drawn,), generator=generator)
        triples = torch.cat([torch.stack([good[:compared], *corrupted], dim=1), to_tensor(drawings[shown.numpy()])])
        described = torch.cat([tokens[rows[:compared]], tokens[shown]])
        return reward_terms(
            model, *(part.to(run.device) for part in (good, triples, tokens[rows], wrong_tokens, described))
        )

    averaged = fit(model, loss, replace(options, weight_decay=0.05))
    save_open_clip_checkpoint(averaged.clip, run.output)
    description = {
        "model_cfg": configuration,
        "tokenizer": Path(os.path.relpath(tokenizer_folder, run.output.parent)).as_posix(),
    }
    run.output.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n")
    click.echo(f"wrote {run.output} and {run.output.with_suffix('.json')}")
    unseen = cached_scenes(run.scratch, "validation", COMPARED_SCENES, run.seed)
    for change, share in told_apart(averaged.clip.cpu().eval(), tokenizer, unseen, run.seed).items():
        click.echo(f"unseen scenes, right caption preferred after {change}: {share:.3f}")


if __name__ == "__main__":
    main()
