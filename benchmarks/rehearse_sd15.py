"""The whole job with Stable Diffusion v1.5 and HPS v2.1, without their weights: random ones, in the true files.

    python -m benchmarks.rehearse_sd15 --folder scratch/rehearsal

A copy of the checkout gets full-size assets of random numbers where the true ones belong, and the true commands run in
it: distilled predictor (cold start), dry run, a few steps of RL, export, images. What comes out means nothing; that it
comes out, how long it takes and how much memory it needs is what is seen.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import click
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel

from benchmarks.compvis_layout import compvis_state_dict
from errors import InputError, shows_input_errors
from models.asset_table import COCO_PROMPTS, HPS, ROOT, SD15_CKPT, TOKENIZER
from models.clip import clip_config, to_open_clip
from models.devices import gigabytes, resolve_device
from models.loading import read_json

PIPELINE = "src/pipelines/sd15"
NEEDED_DISK = 8 * 10**9
LEFT_OUT = (".*", "__pycache__", "exps", "outputs", "runs", "scratch", "weights", "ms_coco", "*.safetensors")
CAPTIONS = (
    "A man riding a wave on top of a surfboard.",
    "A kitchen with a stove, a sink and a window.",
    "Two dogs are lying on a couch.",
    "A red double decker bus driving down a street.",
    "A plate with a sandwich and some fries.",
    "A giraffe standing next to a tree.",
    "A group of people flying kites on a beach.",
    "A bathroom with a white toilet and a mirror.",
)


@dataclass(frozen=True)
class Scale:
    """How much is done: grid points and points of the table, steps, images a step, and further overrides."""

    num_steps: int
    num_points: int
    rl_steps: int
    images: int
    overrides: tuple[str, ...]


ON_CPU = Scale(2, 2, 2, 2, ("model.dtype=float32", "ppo.max_rows=8", "ppo.decode_chunk_size=1", "reward.batch_size=2"))
ON_GPU = Scale(11, 2, 3, 32, ())


@dataclass(frozen=True)
class Passed:
    """A command that ended well: its seconds, and the most bytes of main memory that it held."""

    command: str
    seconds: float
    memory: int


def copy_house(folder: Path) -> Path:
    """The checkout's code and configurations, without weights and results, in `folder`."""
    house = folder / "house"
    shutil.copytree(ROOT, house, ignore=shutil.ignore_patterns(*LEFT_OUT, folder.name))
    return house


def write_assets(house: Path) -> Iterator[Path]:
    """Write every asset of the job to its place, of the sizes that the house's configurations say; yields each."""
    torch.manual_seed(0)
    text_config = CLIPTextConfig.from_pretrained(house / PIPELINE / "text_encoder")
    yield write_tokenizer((house / TOKENIZER[0].path).parent, text_config.vocab_size)
    yield write_checkpoint(house / SD15_CKPT.path, random_stable_diffusion(house / PIPELINE, text_config))
    yield write_checkpoint(house / HPS["v2.1"].path, random_open_clip(house / "src/pipelines/clip/ViT-H-14.json"))
    prompts = house / COCO_PROMPTS.path
    prompts.write_text("text\n" + "".join(f'"{caption}"\n' for caption in CAPTIONS))
    yield prompts


def write_tokenizer(folder: Path, vocab_size: int) -> Path:
    """A tokenizer in CLIP's files: all bytes, so many merges of two as the vocabulary has room for, the two marks."""
    alphabet = sorted(ByteLevel.alphabet())
    room = vocab_size - 2 * len(alphabet) - 2
    if not 0 <= room <= len(alphabet) ** 2:
        raise InputError(f"A vocabulary of {vocab_size} cannot be made of bytes and pairs of bytes.")
    merges = list(itertools.islice(itertools.product(alphabet, alphabet), room))
    ends = [f"{letter}</w>" for letter in alphabet]
    pairs = [f"{first}{second}</w>" for first, second in merges]
    tokens = [*alphabet, *ends, *pairs, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    lines = "".join(f"{first} {second}</w>\n" for first, second in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    return folder


def random_stable_diffusion(configs: Path, text_config: CLIPTextConfig) -> dict[str, Tensor]:
    """Fresh modules of these configurations, float32, under the names of the CompVis code."""
    unet = UNet2DConditionModel.from_config(read_json(configs / "unet/config.json"))
    vae = AutoencoderKL.from_config(read_json(configs / "vae/config.json"))
    return compvis_state_dict(unet, vae, CLIPTextModel(text_config))


def random_open_clip(model_cfg: Path) -> dict[str, Tensor]:
    """Random weights of a CLIP of this configuration, float16, in open_clip's layout."""
    with torch.device("meta"):
        shapes = to_open_clip(CLIPModel(clip_config(read_json(model_cfg))))
    return {name: _random_clip_tensor(name, tuple(tensor.shape)) for name, tensor in shapes.items()}


def _random_clip_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    if name == "logit_scale":
        return torch.tensor(math.log(100), dtype=torch.float16)
    if ".ln_" in name or name.startswith("ln_"):
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
    return torch.randn(shape).mul_(0.02).half()


def write_checkpoint(path: Path, state: dict[str, Tensor]) -> Path:
    """Write tensors as the published files hold them, under `state_dict`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {name: tensor.detach() for name, tensor in state.items()}}, path)
    return path


def run(house: Path, *arguments: str) -> Passed:
    """Run a command of the house in the house.

    Raises:
        InputError: it failed; the end of its output is shown.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    start = perf_counter()
    log = house / "rehearsal.log"
    with log.open("w") as output:
        environment = {**os.environ, "PATH": path}
        with subprocess.Popen(arguments, cwd=house, stdout=output, stderr=output, env=environment) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    command = " ".join(arguments)
    if process.returncode:
        ending = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise InputError(f"{command} ended with {process.returncode}:\n{ending}")
    return Passed(command, perf_counter() - start, usage.ru_maxrss * 1024)


def run_commands(house: Path, scale: Scale, device: str) -> Iterator[Passed]:
    """The job's commands, one after another, in a house that has its assets; yields each as it ends."""
    python = "python"
    shape = ("--num_steps", str(scale.num_steps), "--num_points", str(scale.num_points))
    yield run(house, python, "train.py", "--dataset_name", "ms_coco", "--guidance_rate", "7.5", *shape, "--init-only")
    overrides = [
        f"data.predictor_snapshot={_only(house, 'exps/*/network-snapshot-*.pkl')}",
        f"ppo.steps={scale.rl_steps}",
        f"ppo.rollout_batch_size={scale.images}",
        f"ppo.minibatch_size={scale.images}",
        f"ppo.rloo_k={min(scale.images, 4)}",
        *scale.overrides,
    ]
    launch = ("bash", "launch_rl.sh", "--device", device, "--run-name", "rehearsal", "--override", *overrides)
    yield run(house, *launch, "--dry-run")
    yield run(house, *launch)
    finished = _only(house, "exps/*-rehearsal")
    yield run(house, python, "-m", "training.ppo.export_epd_predictor", finished)
    dtype = "float32" if device == "cpu" else "float16"
    drawing = ("--predictor_path", finished, "--prompt", CAPTIONS[0], "--seeds", "0", "--batch", "1")
    yield run(house, python, "sample.py", *drawing, "--device", device, "--dtype", dtype)
    _only(house, "outputs/samples/*.png")


def _only(house: Path, pattern: str) -> str:
    """The one path that the commands so far must have written, relative to the house."""
    found = [str(path.relative_to(house)) for path in house.glob(pattern)]
    if len(found) != 1:
        raise InputError(f"{house}: expected one {pattern}, found {', '.join(found) or 'none'}")
    return found[0]


def describe(passed: Sequence[Passed]) -> list[str]:
    """A line for each command, and their sum."""
    lines = [f"{one.seconds:8.1f} s  {gigabytes(one.memory):>8}  {one.command}" for one in passed]
    return [*lines, f"{sum(one.seconds for one in passed):8.1f} s  in all"]


@click.command(epilog="Example:  python -m benchmarks.rehearse_sd15 --folder scratch/rehearsal")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("scratch/rehearsal"),
    show_default=True,
    help="Scratch; about 7 GB, removed at the end.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--keep", is_flag=True, help="Leave the folder.")
@shows_input_errors
def main(folder: Path, device: str, keep: bool) -> None:
    """Rehearse the job at full size with random weights. Smallest settings on a CPU, usual ones on a GPU."""
    chosen = resolve_device(device)
    if folder.exists():
        raise InputError(f"{folder} is there already: remove it, or name another --folder")
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < NEEDED_DISK:
        raise InputError(f"{folder} has {gigabytes(free)} free; {gigabytes(NEEDED_DISK)} are needed")
    try:
        house = copy_house(folder)
        for path in write_assets(house):
            click.echo(f"made {path.relative_to(house)}")
        passed = []
        for one in run_commands(house, ON_CPU if chosen.type == "cpu" else ON_GPU, str(chosen)):
            passed.append(one)
            click.echo(f"passed: {one.command}")
        for line in describe(passed):
            click.echo(line)
    finally:
        if not keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
