"""The evaluation of the quoted baseline at two prompts, without the weights: random ones of full size, in true files.

    python -m benchmarks.rehearse_evaluation --intervals 1

As `benchmarks.rehearse_sd15` does for tuning, and with its assets: a copy of the checkout gets Stable Diffusion v1.5,
HPS v2.1, CLIP ViT-L/14, captions and real images of random numbers, and the true commands run in it: an undistilled
table, statistics of the real images, dry run, evaluation, and the evaluation again, which draws nothing. InceptionV3
alone is a stand-in, one convolution to as many features: its file is code, and only the published one is ever run, so
the copy's table of assets is told the stand-in's digest.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from benchmarks.rehearse_sd15 import Passed, only_one, placed, rehearse, run, write_assets
from errors import shows_input_errors
from files import replacing
from models.asset_table import CLIP, INCEPTION
from models.clip import clip_config
from models.devices import DTYPES, resolve_device
from models.digests import digest_of

PROTOCOL = "coco_30k_nfe36"
PROMPTS, PHOTOGRAPHS = 2, 4
REAL, STATISTICS = "real", "weights/coco_val2014_legacy.npz"  # the latter by the protocol
FEATURES = 2048  # of InceptionV3
NEEDED_DISK = 10 * 10**9
VIT_L_14 = {
    "embed_dim": 768,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "patch_size": 14, "width": 1024, "layers": 24, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
}


class _Layers(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, features, 23, stride=23)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.convolution(x)).mean((2, 3), keepdim=True)


class StandInInception(nn.Module):
    """What `models.inception` asks of InceptionV3: `layers`, of normalised images, and a whole that resizes itself."""

    def __init__(self, features: int) -> None:
        """With random weights."""
        super().__init__()
        self.layers = _Layers(features)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        """Features [N, D] of images [N, 3, H, W] in [0, 255]."""
        x = functional.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
        return self.layers((x - 128) / 128).flatten(1)


def write_judges(house: Path, store: Path) -> Iterator[Passed]:
    """Put in its place what the evaluation needs beside the assets of the other rehearsal."""
    config, clip = clip_config(VIT_L_14), house / CLIP[1].path
    config.save_pretrained(clip.parent)
    described = (clip.parent / CLIP[0].name).read_bytes()
    yield placed(house, store, CLIP[1].path, described, lambda file: write_clip(file, config))
    write_stand_in(house)
    (house / REAL).mkdir()
    for number in range(PHOTOGRAPHS):
        pixels = np.random.default_rng(number).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(house / REAL / f"{number}.png")


def write_clip(path: Path, config: CLIPConfig) -> None:
    """Write random weights, float32, as transformers has them; the file is whole or not there."""
    with torch.random.fork_rng(devices=[]), replacing(path) as temporary:
        torch.manual_seed(0)
        save_file(CLIPModel(config).state_dict(), temporary)


def write_stand_in(house: Path) -> None:
    """Write the stand-in of InceptionV3, and name it in the house's table of assets."""
    path, table = house / INCEPTION.path, house / "models" / "asset_table.py"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and what InceptionV3 is published in
        torch.manual_seed(0)
        torch.jit.script(StandInInception(FEATURES)).save(path)
    named = {f"{INCEPTION.size:_}": str(path.stat().st_size), INCEPTION.digest: f"sha256:{digest_of(path)}"}
    text = table.read_text()
    for published, ours in named.items():
        text = text.replace(published, ours)
    table.write_text(text)


def run_commands(house: Path, intervals: int, solvers: str | None, dtype: str, device: str) -> Iterator[Passed]:
    """The commands, one after another, in a house that has its assets; yields each as it ends."""
    table = ("--num_steps", str(intervals + 1), "--num_points", "2", "--guidance_rate", "7.5")
    yield run(house, "python", "train.py", "--dataset_name", "ms_coco", *table, "--init-only")
    statistics = ("--resize", "legacy", "--out", STATISTICS, "--device", device)
    yield run(house, "python", "-m", "scripts.image_statistics", REAL, *statistics)
    evaluate = ("python", "evaluate.py", "--protocol", PROTOCOL, "--number", str(PROMPTS), "--nfe", str(2 * intervals))
    evaluate += ("--batch", "1", "--dtype", dtype, "--device", device)
    evaluate += () if solvers is None else ("--solvers", solvers)
    yield run(house, *evaluate, "--dry-run")
    yield run(house, *evaluate)
    yield run(house, *evaluate)
    only_one(house, "outputs/evaluation/index.html")


@click.command(
    epilog="Example:  python -m benchmarks.rehearse_evaluation --intervals 1", context_settings={"show_default": True}
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("scratch/rehearsal"),
    help="Scratch, about 9 GB; removed at the end. After a failure the same command goes on with what was made.",
)
@click.option(
    "--intervals",
    type=click.IntRange(min=1),
    default=9,
    help="Of the table, two evaluations each; the classical solvers take as many. The baseline has nine.",
)
@click.option("--solvers", help="As evaluate.py takes them. [the protocol's]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", help="Of the network.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--keep", is_flag=True, help="Leave the folder.")
@shows_input_errors
def main(folder: Path, intervals: int, solvers: str | None, dtype: str, device: str, keep: bool) -> None:
    """Rehearse evaluate.py --protocol coco_30k_nfe36 at two prompts, at full size with random weights."""
    chosen = str(resolve_device(device))

    def commands(house: Path, store: Path) -> Iterator[Passed]:
        yield from write_assets(house, store)
        yield from write_judges(house, store)
        yield from run_commands(house, intervals, solvers, dtype, chosen)

    rehearse(folder, commands, NEEDED_DISK)
    if not keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
