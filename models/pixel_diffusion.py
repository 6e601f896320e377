"""Unconditional pixel-space DDPMs (arXiv 2006.11239): a diffusers UNet2DModel with its noise schedule.

Read from a diffusers pipeline folder, from a folder in the flat layout of the first public DDPMs, from a hub id whose
files are in the local cache, or from a bare state dict (`ddpm.pth`) beside the architecture it belongs to.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor

from errors import InputError, first_line
from files import replacing
from models.asset_table import HUB_ID
from models.checkpoints import read_state_dict
from models.digests import record_weights
from models.loading import fill, load_module, quiet_and_repeatable, read_json, require_size
from models.processes import Prediction, VariancePreserving
from models.skeletons import require_counts, skeleton

NEWER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLDER_ATTENTION = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")


@dataclass(frozen=True)
class PixelDiffusion:
    """A DDPM.

    Attributes:
        network: (x [N, 3, H, W], timestep) -> what `prediction_type` says, in `.sample`; float32.
        process: how noise was added, and what the network predicts.
        alphas_cumprod: [T] float64, the squared signal level of each training step (DDPM, equation 4).
        clip_range: estimates of the clean image are clamped to +- this; None: they are not.
        scheduler_config: as in scheduler_config.json.
    """

    network: UNet2DModel
    process: VariancePreserving
    alphas_cumprod: Tensor
    clip_range: float | None
    scheduler_config: Mapping[str, Any]

    @property
    def prediction_type(self) -> Prediction:
        """What the network predicts."""
        return self.process.prediction

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        size = self.network.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)


def load_pixel_diffusion(spec: str, architecture: str | None = None) -> PixelDiffusion:
    """Load a DDPM onto the CPU, in float32, ready to sample (dropout off).

    Args:
        spec: a diffusers folder, a hub id in the local cache, or a file (.pth, .pt, .ckpt, .safetensors) with the
            state dict of a UNet2DModel.
        architecture: for such a file, the folder or hub id whose network and noise schedule it belongs to (its own
            weights are not used); None: the folder that the file lies in.

    Raises:
        InputError: it is not there, is of another kind, or its weights are not those of the architecture (the
            differences are listed).
    """
    path = Path(spec)
    if not path.is_file():
        folder = _folder(spec)
        with quiet_and_repeatable():
            inner = _network_folder(folder)
            return checked(load_module(UNet2DModel, inner), _scheduler_file(folder), spec)
    folder = _folder(architecture) if architecture else path.parent
    config_file = _network_folder(folder) / "config.json"
    if not config_file.is_file():
        raise InputError(
            f"{path} holds weights alone, and {config_file} is not there: set path.architecture to the folder or hub "
            "id of the DDPM whose architecture it has, for example google/ddpm-celebahq-256"
        )
    with quiet_and_repeatable():
        return checked(_with_weights(config_file, path), _scheduler_file(folder), spec)


def save_pixel_diffusion(network: UNet2DModel, scheduler_config: Mapping[str, Any], folder: Path) -> None:
    """Write a DDPM as a diffusers pipeline folder: it appears whole, or what was there before stays.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with replacing(folder, folder=True) as temporary, quiet_and_repeatable():
            DDPMPipeline(network, DDPMScheduler.from_config(dict(scheduler_config))).save_pretrained(temporary)
            record_weights(temporary)
    except SafetensorError as error:  # what its library says of a full disk
        raise InputError(f"{folder}: cannot be written ({error})") from error


def _folder(spec: str) -> Path:
    path = Path(spec)
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(spec):
        raise InputError(f"{spec}: there is no such DDPM; give a diffusers folder, a state dict (.pth) or a hub id")
    try:
        return Path(snapshot_download(spec, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise InputError(
            f"{spec}: there is no such folder, and no hub model of that id in the local cache; nothing is downloaded "
            f"on the way. Fetch it first:  hf download {spec}"
        ) from None


def _network_folder(folder: Path) -> Path:
    inner = folder / "unet"
    return inner if inner.is_dir() else folder


def _scheduler_file(folder: Path) -> Path:
    inner = folder / "scheduler" / "scheduler_config.json"
    return inner if inner.is_file() else folder / "scheduler_config.json"


def _with_weights(config_file: Path, path: Path) -> UNet2DModel:
    given = read_state_dict(path)
    settings = read_json(config_file)
    try:
        require_counts(settings)
        network = skeleton(lambda: UNet2DModel.from_config(settings), given)
    except InputError:
        raise
    except Exception as error:  # what a configuration makes the library trip over can be anything
        raise InputError(f"{config_file}: this is no UNet2DModel: {first_line(error)}") from error
    weights = {name: tensor.to(torch.float32) for name, tensor in in_newer_names(given).items()}
    fill(network, weights, path, assign=True)
    return network


def in_newer_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with an attention's four layers called as diffusers calls them now."""
    return {OLDER_ATTENTION.sub(lambda old: NEWER_ATTENTION[old[0]], name): tensor for name, tensor in state.items()}


def checked(network: UNet2DModel, scheduler: Path, spec: str) -> PixelDiffusion:
    """The DDPM of a network and a scheduler's file; `spec` names it in messages. `InputError` where it is none."""
    config = network.config
    if config.in_channels != 3 or config.out_channels != 3:
        raise InputError(
            f"{spec}: the network takes {config.in_channels} channels and gives {config.out_channels}; a DDPM of RGB "
            "images with 3 and 3 is needed"
        )
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        raise InputError(f"{spec}: the network is conditioned on classes; an unconditional DDPM is needed")
    require_size(network, spec)
    described = read_json(scheduler)
    if described.get("thresholding"):
        raise InputError(f"{scheduler}: thresholding is true, which is not supported; its images would be others")
    process = VariancePreserving.from_scheduler_config(described, str(scheduler), known=get_args(Prediction))
    try:
        betas = DDPMScheduler.from_config(described).betas.double()
        clip_range = float(described.get("clip_sample_range", 1.0)) if described.get("clip_sample", True) else None
    except Exception as error:  # what a configuration makes the library trip over can be anything
        raise InputError(f"{scheduler}: this is no DDPMScheduler: {first_line(error)}") from error
    if clip_range is not None and not 0 < clip_range < math.inf:
        raise InputError(f"{scheduler}: clip_sample_range is {clip_range:g}; it must be a positive number")
    # Copied: weights that are mapped from a file lie at odd addresses, where the same products are rounded otherwise.
    network = copy.deepcopy(network).float().eval()
    return PixelDiffusion(network, process, (1 - betas).cumprod(0), clip_range, {**described})
