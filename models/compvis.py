"""From a single file in the layout of the CompVis code to the parts of a Stable Diffusion 1.x."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    infer_diffusers_model_type,
)
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from errors import InputError, first_line, is_too_little_memory
from models.additions import with_additions
from models.backbone import Pipeline
from models.checkpoints import read_metadata, read_state_dict
from models.families.stable_diffusion import StableDiffusion
from models.latent_diffusion import Parts
from models.loading import SHOWN_KEYS, check_keys, check_report, load_tokenizer, quiet_and_repeatable, read_json
from models.options import AS_IT_IS, ModelOptions

UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)

# What a single file carries where its network predicts v, and where its noise schedule ends in pure noise: empty
# tensors of these names, or entries of a safetensors' metadata (Stability AI's modelspec, sd-scripts).
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
V_NAMES, EPSILON_NAMES = frozenset({"v", "v_pred", "v_prediction", "velocity"}), frozenset({"eps", "epsilon"})
SMALLEST_SIGNAL = 1e-6  # squared signal level of the last step; Stable Diffusion's is 0.0047

Diffuser = TypeVar("Diffuser", UNet2DConditionModel, AutoencoderKL)


def read_compvis(path: Path) -> dict[str, Tensor]:
    """The tensors of a whole Stable Diffusion 1.x in a single .safetensors or .ckpt file (the CompVis code's layout).

    What its metadata says of the kind of prediction is among them, as the marker tensors that other files carry.
    Raises `InputError` that says what the file is instead.
    """
    state = read_state_dict(path)
    for mark in _marks_of_metadata(state, path):
        state.setdefault(mark, torch.empty(0))
    _check_compvis(state, path)
    return state


def assemble_compvis(state: dict[str, Tensor], path: Path, configs: Path, options: ModelOptions = AS_IT_IS) -> Parts:
    """The parts of a pipeline from what `read_compvis` read from `path`.

    `configs` is a diffusers folder with the component configurations and the tokenizer, without weights. Raises
    `InputError` where the file does not hold exactly the weights that the configurations ask for.
    """
    scheduler = configs / "scheduler" / "scheduler_config.json"
    StableDiffusion.check_options(options, path)
    marked = {"prediction_type": "v_prediction"} if V_MARK in state else {}
    with quiet_and_repeatable():
        modules = {
            "unet": _converted(
                UNet2DConditionModel, convert_ldm_unet_checkpoint, state, configs / "unet/config.json", path
            ),
            "vae": _converted(AutoencoderKL, convert_ldm_vae_checkpoint, state, configs / "vae/config.json", path),
            "text_encoder": _converted_text_encoder(state, configs / "text_encoder", path),
        }
        modules = with_additions(modules, options, "StableDiffusionPipeline", torch.float32)
        tokenizers = {"tokenizer": load_tokenizer(configs / "tokenizer")}
    return StableDiffusion.assembled(
        Pipeline(path, modules, tokenizers, {**read_json(scheduler), **marked}, scheduler, index={}, options=options)
    )


def _check_compvis(state: dict[str, Tensor], path: Path) -> None:
    """Raise `InputError` unless the names of the tensors are those of a whole Stable Diffusion 1.x checkpoint."""
    if not any(name.startswith("model.diffusion_model.") for name in state):
        raise InputError(f"{path} is no Stable Diffusion checkpoint: {_kind_of_other_file(state)}.")
    try:
        kind = infer_diffusers_model_type(state)
    except (IndexError, KeyError, TypeError) as error:  # what it looks at has another shape than in any model
        raise InputError(f"{path} is no Stable Diffusion checkpoint: {first_line(error)}") from error
    if kind == "v2":
        raise InputError(
            f"{path} is a Stable Diffusion 2.x checkpoint. A single file does not say whether such a model "
            "predicts epsilon or v: use its diffusers folder."
        )
    if kind != "v1":
        family = "Stable Diffusion XL" if kind.startswith("xl_") else "another family"
        raise InputError(
            f"{path} is a checkpoint of {family} ({kind}); use its diffusers folder. A single file must "
            "be Stable Diffusion 1.x:  python -m models.assets fetch sd15"
        )
    for prefix, part in (("first_stage_model.", "VAE"), ("cond_stage_model.transformer.", "text encoder")):
        if not any(name.startswith(prefix) for name in state):
            raise InputError(f"{path} holds a UNet but no {part} ({prefix}*); use the full checkpoint.")

    if any(name.startswith("edm_") for name in state):
        raise InputError(f"{path} is marked as an EDM model (edm_*); a single file must predict epsilon or v.")
    last_signal = state.get("alphas_cumprod", torch.ones(1)).flatten()[-1:]
    if ZERO_SNR_MARK in state or bool((last_signal < SMALLEST_SIGNAL).any()):
        raise InputError(
            f"{path} was trained to zero terminal SNR: its last noise level is infinite, and a solver cannot start "
            "there. Use a version that was trained without it, or the model's diffusers folder, if its scheduler does "
            "not rescale its betas."
        )


def _marks_of_metadata(state: Mapping[str, Tensor], path: Path) -> list[str]:
    """The marker tensors that say what a file's metadata says; `InputError` where it contradicts the file's own."""
    metadata = read_metadata(path)
    said = {metadata[key].lower() for key in PREDICTION_KEYS if key in metadata}
    if metadata.get("ss_v_parameterization") == "True":
        said.add("v")
    predicts_v = bool(said & V_NAMES) or V_MARK in state
    if said - V_NAMES - EPSILON_NAMES or (predicts_v and said & EPSILON_NAMES):
        marked = f" and it has the tensor {V_MARK}" if V_MARK in state else ""
        raise InputError(
            f"{path}: its metadata says that the network predicts {' and '.join(sorted(said))}{marked}; one of epsilon "
            "and v is needed. Use the model's diffusers folder."
        )
    zero_snr = metadata.get("ss_zero_terminal_snr") == "True"
    return [*([V_MARK] if predicts_v else []), *([ZERO_SNR_MARK] if zero_snr else [])]


def _kind_of_other_file(state: dict[str, Tensor]) -> str:
    if any("lora" in name for name in state):
        return "it is a LoRA, an addition to a model"
    if any(name.startswith("down_blocks.") for name in state):
        return "it is a UNet alone, in the layout of diffusers; give the folder of its whole pipeline"
    if any(name.startswith(("encoder.", "decoder.")) for name in state):
        return "it is a VAE alone"
    return f"its {len(state)} tensors are named {', '.join(sorted(state)[:SHOWN_KEYS]) or 'nothing'}"


def _converted(
    kind: type[Diffuser],
    convert: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]],
    state: dict[str, Tensor],
    config_file: Path,
    path: Path,
) -> Diffuser:
    """A module built without memory of its own, which then takes over exactly the converted weights."""
    config = read_json(config_file)
    with torch.device("meta"):
        module = kind.from_config(config)
    try:
        report = module.load_state_dict(convert(state, config), strict=False, assign=True)
    except (KeyError, IndexError, AttributeError, RuntimeError) as error:
        if is_too_little_memory(error):
            raise
        # the first three: the converter finds other layers than it expects; the last: shapes that do not fit
        raise InputError(f"{path}: the weights do not fit a {kind.__name__} of {config_file}: {error}") from error
    check_keys(kind, path, report.missing_keys, report.unexpected_keys)
    return module


def _converted_text_encoder(state: dict[str, Tensor], config_folder: Path, path: Path) -> CLIPTextModel:
    weights = convert_ldm_clip_checkpoint(state)
    weights.pop("text_model.embeddings.position_ids", None)  # the numbers 0 to 76, which older files carry along
    config = CLIPTextConfig.from_pretrained(config_folder, local_files_only=True)
    try:
        module, report = CLIPTextModel.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except UNREADABLE as error:
        if is_too_little_memory(error):
            raise
        raise InputError(f"{path}: the weights do not fit a CLIPTextModel: {first_line(error)}") from error
    check_report(CLIPTextModel, path, report)
    return module
