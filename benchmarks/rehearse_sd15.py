"""The whole job with Stable Diffusion v1.5 and HPS v2.1, without their weights: random ones, in the true files.

    python -m benchmarks.rehearse_sd15 --folder scratch/rehearsal

A copy of the checkout gets full-size assets of random numbers where the true ones belong, and the true commands run in
it: doctor, an undistilled predictor (cold start), dry run, a few steps of RL, export, images. What comes out means
nothing; that it comes out, how long it takes and how much memory it needs is what is seen.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import click
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel

from benchmarks.compvis_layout import compvis_state_dict
from errors import InputError, shows_input_errors
from files import replacing
from models.asset_table import COCO_PROMPTS, HPS, ROOT, SD15_CKPT, TOKENIZER
from models.clip import clip_config, to_open_clip
from models.devices import gigabytes, resolve_device
from models.loading import read_json
from training.runs.run_folder import RunFolder, read_metrics, seconds_by_phase

PIPELINE = "src/pipelines/sd15"
CLIP_CONFIG = "src/pipelines/clip/ViT-H-14.json"
NEEDED_DISK = 8 * 10**9
LEFT_OUT = (".*", "__pycache__", "exps", "outputs", "scratch", "weights", "ms_coco", "*.safetensors")
LOG = "rehearsal.log"
RESETS_PEAK = Path("/proc/self/clear_refs")
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


ON_CPU = Scale(2, 2, 2, 2, ("model.dtype=float32", "ppo.max_rows=4", "ppo.decode_chunk_size=1", "reward.batch_size=1"))
ON_GPU = Scale(11, 2, 3, 32, ())


@dataclass(frozen=True)
class Passed:
    """What went well: its seconds, and the most bytes of main memory that its process held."""

    what: str
    seconds: float
    memory: int


def copy_house(folder: Path) -> Path:
    """The checkout's code and configurations, without weights and results, fresh in `folder`."""
    house = folder / "house"
    if house.exists():
        shutil.rmtree(house)
    by_name, itself = shutil.ignore_patterns(*LEFT_OUT), folder.resolve()

    def leave_out(directory: str, names: list[str]) -> set[str]:
        return by_name(directory, names) | {name for name in names if Path(directory, name).resolve() == itself}

    shutil.copytree(ROOT, house, ignore=leave_out)
    return house


# ---------------------------------------------------------------------------------------------------------------------
# Assets


def write_assets(house: Path, store: Path) -> Iterator[Passed]:
    """Put every asset of the job in its place, of the sizes that the house's configurations say; yields each.

    The large ones are written to `store` and linked; one that is there already is not made again.
    """
    pipeline, clip_file = house / PIPELINE, house / CLIP_CONFIG
    text_config = CLIPTextConfig.from_pretrained(pipeline / "text_encoder")
    write_tokenizer((house / TOKENIZER[0].path).parent, text_config.vocab_size)
    (house / COCO_PROMPTS.path).write_text("text\n" + "".join(f'"{caption}"\n' for caption in CAPTIONS))
    makers: dict[str, tuple[list[Path], Callable[[], dict[str, Tensor]]]] = {
        SD15_CKPT.path: (sorted(pipeline.glob("*/config.json")), lambda: random_stable_diffusion(pipeline)),
        HPS["v2.1"].path: ([clip_file], lambda: random_open_clip(clip_file)),
    }
    for path, (configs, make) in makers.items():
        described = b"".join(config.read_bytes() for config in configs)
        yield placed(house, store, path, described, lambda file, make=make: write_checkpoint(file, make()))


def placed(house: Path, store: Path, path: str, described: bytes, write: Callable[[Path], None]) -> Passed:
    """Put a large asset in its place in the house: a link to the store, where `write` writes it unless it is there."""
    start = perf_counter()
    forget_peak()
    stored = store / f"{hashlib.sha256(described).hexdigest()[:12]}-{Path(path).name}"
    is_there = stored.exists()
    if not is_there:
        write(stored)
    (house / path).parent.mkdir(parents=True, exist_ok=True)
    (house / path).symlink_to(stored.resolve())
    return Passed(f"{'found' if is_there else 'made'} {path}", perf_counter() - start, own_peak())


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


def random_stable_diffusion(configs: Path) -> dict[str, Tensor]:
    """Random modules of these configurations, float32, under the names of the CompVis code."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = _disturbed(UNet2DConditionModel.from_config(read_json(configs / "unet/config.json")))
        vae = _disturbed(AutoencoderKL.from_config(read_json(configs / "vae/config.json")))
        text_encoder = _disturbed(CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder")))
    return compvis_state_dict(unet, vae, text_encoder)


def _disturbed(module: nn.Module) -> nn.Module:
    """The module with norms and biases that differ: they start as ones and zeros, and a mix-up would not show."""
    for parameter in module.requires_grad_(False).parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return module


def random_open_clip(model_cfg: Path) -> dict[str, Tensor]:
    """Random weights of a CLIP of this configuration, float16, in open_clip's layout."""
    with torch.device("meta"):
        shapes = to_open_clip(CLIPModel(clip_config(read_json(model_cfg))))
    generator = torch.Generator().manual_seed(0)
    return {name: _random_clip_tensor(name, tuple(tensor.shape), generator) for name, tensor in shapes.items()}


def _random_clip_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name == "logit_scale":
        return torch.tensor(math.log(100), dtype=torch.float16)
    centre = float((".ln_" in name or name.startswith("ln_")) and name.endswith("weight"))
    return torch.randn(shape, generator=generator).mul_(0.02).add_(centre).half()


def write_checkpoint(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors as the published files hold them, under `state_dict`; the file is whole or not there."""
    with replacing(path) as temporary:
        torch.save({"state_dict": state}, temporary)


def own_peak() -> int:
    """Most bytes of main memory that this process held since `forget_peak`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Let this process's peak memory count from here on; Linux hands it down to the commands that are started."""
    if RESETS_PEAK.exists():
        RESETS_PEAK.write_text("5")  # proc(5)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def run(house: Path, *arguments: str, status: int = 0) -> Passed:
    """Run a command of the house in the house, without a hub; its output goes to the end of rehearsal.log.

    Raises:
        InputError: it ended with another status; the end of its output is shown.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    command = " ".join(arguments)
    forget_peak()
    start = perf_counter()
    with (house / LOG).open("a+") as log:
        log.write(f"\n$ {command}\n")
        log.flush()
        before = log.tell()
        with subprocess.Popen(arguments, cwd=house, stdout=log, stderr=log, env=environment) as process:
            _, waited, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(waited)
        log.seek(before)
        ending = "\n".join(log.read().splitlines()[-20:])
    if process.returncode != status:
        raise InputError(f"{command} ended with {process.returncode}:\n{ending}")
    return Passed(command, perf_counter() - start, usage.ru_maxrss * 1024)


def run_commands(house: Path, scale: Scale, device: str) -> Iterator[Passed]:
    """The job's commands, one after another, in a house that has its assets; yields each as it ends."""
    python = "python"
    # 1: it has to find that these are not the published files
    yield run(house, python, "-m", "models.assets", "doctor", "sd15", "hpsv2", "coco-prompts", status=1)
    shape = ("--num_steps", str(scale.num_steps), "--num_points", str(scale.num_points))
    yield run(house, python, "train.py", "--dataset_name", "ms_coco", "--guidance_rate", "7.5", *shape, "--init-only")
    overrides = [
        f"data.predictor_snapshot={only_one(house, 'exps/*/network-snapshot-*.pkl')}",
        f"ppo.steps={scale.rl_steps}",
        f"ppo.rollout_batch_size={scale.images}",
        f"ppo.minibatch_size={scale.images}",
        f"ppo.rloo_k={min(scale.images, 4)}",
        *scale.overrides,
    ]
    launch = ("bash", "launch_rl.sh", "--device", device, "--run-name", "rehearsal", "--override", *overrides)
    yield run(house, *launch, "--dry-run")
    yield run(house, *launch)
    finished = only_one(house, "exps/*-rehearsal")
    yield run(house, python, "-m", "training.ppo.export_epd_predictor", finished)
    dtype = "float32" if device == "cpu" else "float16"
    drawing = ("--predictor_path", finished, "--prompt", CAPTIONS[0], "--seeds", "0", "--batch", "1")
    yield run(house, python, "sample.py", *drawing, "--device", device, "--dtype", dtype)
    only_one(house, "outputs/samples/*.png")


def only_one(house: Path, pattern: str) -> str:
    """The one path that the commands so far must have written, relative to the house."""
    found = [str(path.relative_to(house)) for path in house.glob(pattern)]
    if len(found) != 1:
        raise InputError(f"{house}: expected one {pattern}, found {', '.join(found) or 'none'}")
    return found[0]


def step_phases(house: Path) -> dict[str, float]:
    """Mean seconds of a step of the RL that ran in the house, by phase."""
    return seconds_by_phase(read_metrics(RunFolder.open(house / only_one(house, "exps/*-rehearsal")).metrics))


def describe(passed: Sequence[Passed]) -> list[str]:
    """A table: what was done, its seconds and peak memory."""
    lines = [f"{one.seconds:9.1f}  {gigabytes(one.memory):>11}  {one.what}" for one in passed]
    return [
        f"{'seconds':>9}  {'peak memory':>11}  what",
        *lines,
        f"{sum(one.seconds for one in passed):9.1f}  {gigabytes(max(one.memory for one in passed)):>11}  in all",
    ]


def describe_phases(phases: dict[str, float]) -> list[str]:
    """A table: where the time of a step of RL went."""
    whole = sum(phases.values())
    shares = [f"{seconds:9.1f}  {seconds / whole:>11.1%}  {phase}" for phase, seconds in phases.items()]
    return [f"{'seconds':>9}  {'of a step':>11}  phase of RL", *shares]


def rehearse(folder: Path, commands: Callable[[Path, Path], Iterator[Passed]], needed: int = NEEDED_DISK) -> Path:
    """Do what `commands` yields of a fresh house and a store of large assets; `needed`: bytes of disk.

    Each is said as it ends, and all together at the end. Gives the house.

    Raises:
        InputError: the folder holds other things, the disk is too full, or a command failed.
    """
    store = prepare_store(folder, needed)
    house = copy_house(folder)
    passed = []
    try:
        for one in commands(house, store):
            passed.append(one)
            click.echo(f"{one.seconds:.0f} s: {one.what}")
    except InputError as error:
        raise InputError(f"{error}\n{folder} is left as it is; the same command goes on with its assets.") from None
    for line in describe(passed):
        click.echo(line)
    return house


@click.command(
    epilog="Example:  python -m benchmarks.rehearse_sd15 --folder scratch/rehearsal",
    context_settings={"show_default": True},
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("scratch/rehearsal"),
    help="Scratch, about 7 GB; removed at the end. After a failure the same command goes on with what was made.",
)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--keep", is_flag=True, help="Leave the folder.")
@shows_input_errors
def main(folder: Path, device: str, keep: bool) -> None:
    """Rehearse the job at full size with random weights. Smallest settings on a CPU, usual ones on a GPU."""
    chosen = resolve_device(device)
    scale = ON_CPU if chosen.type == "cpu" else ON_GPU

    def commands(house: Path, store: Path) -> Iterator[Passed]:
        yield from write_assets(house, store)
        yield from run_commands(house, scale, str(chosen))

    house = rehearse(folder, commands)
    for line in ["", *describe_phases(step_phases(house))]:
        click.echo(line)
    if not keep:
        shutil.rmtree(folder)


def prepare_store(folder: Path, needed: int = NEEDED_DISK) -> Path:
    """The place of the large assets in the rehearsal's folder, which is made if it is not there.

    Raises:
        InputError: the folder holds other things than a rehearsal, or the disk is too full.
    """
    store = folder / "assets"
    if folder.exists() and any(folder.iterdir()) and not store.is_dir():
        raise InputError(f"{folder} holds something else than a rehearsal: name another --folder")
    store.mkdir(parents=True, exist_ok=True)
    needed -= sum(file.stat().st_size for file in store.iterdir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder} has {gigabytes(free)} free; {gigabytes(needed)} are needed")
    return store


if __name__ == "__main__":
    main()
