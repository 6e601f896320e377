"""What a person has put into a model beside its own weights: another VAE, and LoRA weights (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from diffusers.models import AutoencoderKL
from torch import nn

from errors import InputError, first_line, is_too_little_memory
from models.checkpoints import check_checkpoint, read_state_dict
from models.loading import load_module
from models.options import ModelOptions


def check_additions(options: ModelOptions) -> None:
    """Raise `InputError` where the files that the options name are not there, or not what they should be."""
    for file, _ in options.loras():
        if not file.is_file():
            raise InputError(f"LoRA {file}: there is no such file")
        check_checkpoint(file)
    if options.vae is not None:
        _vae_folder(options.vae)


def with_additions(
    modules: Mapping[str, nn.Module],
    options: ModelOptions,
    pipeline_class: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> dict[str, nn.Module]:
    """The modules of a pipeline, by the names of their folders, with what the options ask for.

    `device` is that of the modules: see `load_module`.
    Raises `InputError` where the files are not there, or do not suit the pipeline.
    """
    check_additions(options)
    modules = dict(modules)
    if options.vae is not None:
        folder = _vae_folder(options.vae)
        modules["vae"] = load_module(AutoencoderKL, folder, dtype=dtype, device=device)
    for file, scale in options.loras():
        _add(file, scale, pipeline_class, modules)
    return modules


def _vae_folder(name: str) -> Path:
    for folder in (Path(name), Path(name) / "vae"):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(f"VAE {name}: there is no folder with a config.json, nor a pipeline's folder with a vae in it")


def _add(file: Path, scale: float, pipeline_class: str, modules: Mapping[str, nn.Module]) -> None:
    """Add `scale` times a LoRA's weights, by diffusers' own reader of its many layouts.

    Raises `InputError` where it holds weights for layers that the modules do not have.
    """
    read_state_dict(file)  # is it whole?
    bare = _bare(pipeline_class, modules)
    try:
        bare.load_lora_weights(str(file), adapter_name="added")
        state = bare.lora_state_dict(str(file))
    except Exception as error:  # what a file makes the libraries trip over can be anything
        if is_too_little_memory(error):
            raise
        raise InputError(f"{file} is no LoRA for this {pipeline_class}: {first_line(error)}") from error
    given = len(state[0] if isinstance(state, tuple) else state)
    used = sum("lora_" in name for module in modules.values() for name, _ in module.named_parameters())
    if used != given:
        raise InputError(
            f"{file} is no LoRA for this {pipeline_class}: of its {given} tensors {used} belong to layers of the model"
        )
    bare.fuse_lora(components=[part for part in bare._lora_loadable_modules if part in modules], lora_scale=scale)
    bare.unload_lora_weights()


def _bare(pipeline_class: str, modules: Mapping[str, nn.Module]) -> diffusers.DiffusionPipeline:
    """A pipeline of these modules and no more: its class's own constructor may change their configurations."""
    kind = getattr(diffusers, pipeline_class)

    class Bare(kind):
        components = modules

        def __init__(self) -> None:
            self.register_modules(**modules)

    return Bare()
