"""Train the preference reward of the shapes world: `python -m models.shapes.train_reward`.

Writes `weights/shapes_reward.pt` in the checkpoint layout of open_clip, which is HPS v2.1's, with its configuration
beside it in `weights/shapes_reward.json`. Three losses: images and captions of a batch find each other (Radford et
al., arXiv 2103.00020), the true caption beats captions that are wrong in one respect, and a good image beats a worse
one and that a still worse one, for the same caption (Bradley and Terry, as in HPS v2, arXiv 2306.09341). Run the same
command again to resume.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel

from models.clip import image_features, new_clip, preprocess, save_open_clip_checkpoint, text_features, tokenize
from models.shapes.data import cached_scenes
from models.shapes.negatives import CORRUPTIONS, worse_images, wrong_scene
from models.shapes.scenes import IMAGE_SIZE, parse, to_tensor
from models.shapes.tokenizer import CONTEXT_LENGTH, build_tokenizer
from models.shapes.training_loop import TrainingOptions, fit, step_generator, training_command

WRONG_CAPTIONS = 2  # for each image
COMPARED_SHARE = 0.5  # of the images whose corrupted copies are compared in a step


def model_configuration(vocabulary_size: int) -> dict[str, Any]:
    """A small CLIP in open_clip's terms: 64 patches of 8x8 pixels."""
    return {
        "embed_dim": 128,
        "quick_gelu": False,
        "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary_size,
            "width": 128,
            "heads": 4,
            "layers": 2,
        },
    }


def reward_terms(
    model: CLIPModel, images: Tensor, light: Tensor, heavy: Tensor, right: Tensor, wrong: Tensor
) -> dict[str, Tensor]:
    """The three losses and how often each comparison is right.

    Args:
        model: in training.
        images: good images [N, 3, 64, 64] in [0, 1].
        light: lightly corrupted copies of the first M <= N of them.
        heavy: the same ones, heavily corrupted.
        right: tokens [N, L] of the true captions.
        wrong: tokens [N * W, L]: W wrong captions of each image in turn.
    """
    number, compared = len(images), len(light)
    with torch.autocast(images.device.type, torch.bfloat16):
        pixels = preprocess(torch.cat([images, light, heavy]), IMAGE_SIZE)
        seen = image_features(model, pixels)
        read = text_features(model, torch.cat([right, wrong]))
    seen, read = functional.normalize(seen.float(), dim=-1), functional.normalize(read.float(), dim=-1)
    scale = model.logit_scale.exp().clamp(max=100)
    good, light_seen, heavy_seen = seen.split([number, compared, compared])
    true, false = read[:number], read[number:].view(number, -1, read.shape[-1])
    logits = scale * good @ true.T  # [N, N]
    others = scale * torch.einsum("nd,nwd->nw", good, false)
    rows = torch.arange(number, device=images.device)
    matching = functional.cross_entropy(torch.cat([logits, others], dim=1), rows) + functional.cross_entropy(
        logits.T, rows
    )
    best, middle, worst = (
        scale * (part * true[:compared]).sum(-1) for part in (good[:compared], light_seen, heavy_seen)
    )
    order = functional.softplus(middle - best).mean() + functional.softplus(worst - middle).mean()
    return {
        "loss": 0.5 * matching + order,
        "matching": matching,
        "order": order,
        "true_caption_wins": (logits.diagonal() > others.amax(dim=1)).float().mean(),
        "good_beats_light": (best > middle).float().mean(),
        "light_beats_heavy": (middle > worst).float().mean(),
    }


@training_command(output="weights/shapes_reward.pt", steps=3500, images=80_000, batch=48, learning_rate=1e-3, seed=1)
@click.option(
    "--tokenizer",
    "tokenizer_folder",
    type=click.Path(path_type=Path),
    default=Path("src/shapes/tokenizer"),
    help="Where its tokenizer is written.",
)
def main(
    output: Path,
    tokenizer_folder: Path,
    scratch: Path,
    steps: int,
    images: int,
    batch: int,
    learning_rate: float,
    seed: int,
    device: str,
) -> None:
    """Train the reward and write its checkpoint, its configuration and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    rendered = cached_scenes(scratch, "train", images, seed)
    pixels = torch.from_numpy(rendered.images)  # uint8 [N, 64, 64, 3]
    configuration = model_configuration(len(tokenizer))
    model = new_clip(configuration).to(device)
    model.set_attn_implementation("eager")  # on a CPU the fused attention's backward pass is the slowest part of a step
    compared = max(int(COMPARED_SHARE * batch), 1)

    def loss(step: int) -> dict[str, Tensor]:
        generator, random = step_generator(seed, step), np.random.default_rng([seed, step])
        rows = torch.randint(len(pixels), (batch,), generator=generator)
        good = to_tensor(pixels[rows].numpy())
        captions = [rendered.captions[row] for row in rows.tolist()]
        wrong = [wrong_scene(parse(text), random).caption() for text in captions for _ in range(WRONG_CAPTIONS)]
        kind = torch.randint(len(CORRUPTIONS), (compared,), generator=generator)
        severities = torch.rand(2, compared, generator=generator).sort(dim=0).values
        light, heavy = (
            worse_images(good[:compared], severity, kind, good[-compared:], step_generator(seed + 1, step))
            for severity in (0.7 * severities[0], 0.3 + 0.7 * severities[1])
        )
        right, wrong_tokens = (tokenize(tokenizer, texts, CONTEXT_LENGTH).to(device) for texts in (captions, wrong))
        return reward_terms(model, good.to(device), light.to(device), heavy.to(device), right, wrong_tokens)

    averaged = fit(model, loss, TrainingOptions(steps, learning_rate, scratch / "reward.pt", weight_decay=0.05))
    tokenizer.save_pretrained(tokenizer_folder)
    save_open_clip_checkpoint(averaged, output)
    description = {
        "model_cfg": configuration,
        "tokenizer": Path(os.path.relpath(tokenizer_folder, output.parent)).as_posix(),
    }
    output.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n")
    click.echo(f"wrote {output} and {output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
