"""From files on disk to the parts of a Stable Diffusion 1.x or 2.x pipeline. Nothing here ever asks a network."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    infer_diffusers_model_type,
)
from diffusers.models import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel

from errors import InputError, first_line, is_too_little_memory
from models.asset_table import PIPELINE_CONFIGS, PIPELINE_WEIGHTS
from models.checkpoints import read_metadata, read_state_dict, read_weights
from models.denoiser import USUAL_GUIDANCE_SCALE
from models.latent_diffusion import Components
from models.noise_levels import NoiseLevels
from models.skeletons import skeleton

GENERATION_CONFIG = "generation_config.json"  # as transformers calls it: how a model is meant to be used
FOLDERS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)
SHOWN_KEYS = 5
LARGEST_SIDE = 2**14  # of what a network works on
SPARE_NUMBERS = 10_000_000  # a module may have so many more weights than its files, and is then told which are missing

# What a single file carries where its network predicts v, and where its noise schedule ends in pure noise: empty
# tensors of these names, or entries of a safetensors' metadata (Stability AI's modelspec, sd-scripts).
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
V_NAMES, EPSILON_NAMES = frozenset({"v", "v_pred", "v_prediction", "velocity"}), frozenset({"eps", "epsilon"})
SMALLEST_SIGNAL = 1e-6  # squared signal level of the last step; Stable Diffusion's is 0.0047

# Parts that change what the UNet is asked for: refiners, upscalers, distilled and class-conditional models.
FOREIGN_UNET_PARTS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")

Diffuser = TypeVar("Diffuser", UNet2DConditionModel, AutoencoderKL)
Model = TypeVar("Model", UNet2DConditionModel, UNet2DModel, AutoencoderKL, CLIPTextModel)


def load_folder(folder: Path) -> Components:
    """The parts of a diffusers pipeline folder (`model_index.json` and one folder a component).

    Raises `InputError` where the folder is no such pipeline, is of another family, or lacks files or weights.
    """
    check_pipeline_folder(folder)
    with quiet_and_repeatable():
        components = _fitting(
            folder,
            load_module(UNet2DConditionModel, folder / "unet"),
            load_module(AutoencoderKL, folder / "vae"),
            load_module(CLIPTextModel, folder / "text_encoder"),
            load_tokenizer(folder / "tokenizer"),
            folder / "scheduler" / "scheduler_config.json",
        )
    return replace(components, guidance_scale=guidance_scale_of(folder))


def guidance_scale_of(folder: Path) -> float:
    """What generation_config.json in a pipeline folder calls `guidance_scale`; where it says nothing, the usual scale.

    Raises `InputError` where it is no finite number of at least 0.
    """
    file = folder / GENERATION_CONFIG
    scale = read_json(file).get("guidance_scale") if file.exists() else None
    if scale is None:
        return USUAL_GUIDANCE_SCALE
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale <= sys.float_info.max:
        raise InputError(f"{file}: guidance_scale must be a finite number of at least 0, not {json.dumps(scale):.40}.")
    return float(scale)


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


def assemble_compvis(state: dict[str, Tensor], path: Path, configs: Path) -> Components:
    """The parts of a pipeline from what `read_compvis` read from `path`.

    `configs` is a diffusers folder with the component configurations and the tokenizer, without weights. Raises
    `InputError` where the file does not hold exactly the weights that the configurations ask for.
    """
    with quiet_and_repeatable():
        return _fitting(
            path,
            _converted(UNet2DConditionModel, convert_ldm_unet_checkpoint, state, configs / "unet/config.json", path),
            _converted(AutoencoderKL, convert_ldm_vae_checkpoint, state, configs / "vae/config.json", path),
            _converted_text_encoder(state, configs / "text_encoder", path),
            load_tokenizer(configs / "tokenizer"),
            configs / "scheduler" / "scheduler_config.json",
            marked="v_prediction" if V_MARK in state else None,
        )


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder with tokenizer.json, or vocab.json and merges.txt; `InputError` without them."""
    if not (folder / "tokenizer.json").is_file():
        # transformers would go on with a vocabulary of three tokens
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{folder} holds no tokenizer: {' and '.join(missing)} missing (and no tokenizer.json).")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for malformed files
        raise InputError(f"{folder} holds no readable CLIP tokenizer: {first_line(error)}") from error
    if type(tokenizer.model_max_length) is not int:
        raise InputError(f"{folder}: model_max_length is {tokenizer.model_max_length!r}; it must be a whole number")
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `InputError` where it is missing or is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no readable JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def check_pipeline_folder(folder: Path) -> None:
    """Raise `InputError` where the folder is no diffusers pipeline of this family, or lacks components or files."""
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is no diffusers pipeline, model_index.json is missing: {_what_is_in(folder)}.")
    index = read_json(folder / "model_index.json")
    others = sorted(name for name, part in index.items() if name.endswith("_2") and part != [None, None])
    missing = [name for name in FOLDERS if not (folder / name).is_dir()]
    kind = index.get("_class_name", "pipeline of no named class")
    if others or missing:
        reason = f"it has {' and '.join(others)}" if others else f"the folders {', '.join(missing)} are missing"
        raise InputError(
            f"{folder} holds a {kind} that cannot be used here: {reason}. "
            "Models of the Stable Diffusion 1.x and 2.x family can be used (StableDiffusionPipeline)."
        )
    lacking = [str(folder / name) for name in PIPELINE_CONFIGS if not (folder / name).is_file()]
    lacking += [f"{folder / part / ' or '.join(PIPELINE_WEIGHTS[part])}" for part in parts_without_weights(folder)]
    if lacking:
        raise InputError(f"{folder} cannot be used, files are missing: {', '.join(lacking)}.")


def parts_without_weights(folder: Path) -> list[str]:
    """The components of a pipeline's folder that have no weights in a form that is read here."""
    return [
        part
        for part, forms in PIPELINE_WEIGHTS.items()
        if not any((folder / part / f"{form}{of}").is_file() for form in forms for of in ("", ".index.json"))
    ]


def check_pipeline(folder: Path) -> None:
    """`check_pipeline_folder`, and the same error where weights or tokenizer are cut off or damaged."""
    check_pipeline_folder(folder)
    for part in PIPELINE_WEIGHTS:
        _weights(folder / part)
    load_tokenizer(folder / "tokenizer")


def _what_is_in(folder: Path) -> str:
    if (folder / "config.json").is_file():
        kind = read_json(folder / "config.json").get("_class_name", "component")
        return f"this is a single {kind}, give the folder of the whole pipeline (perhaps {folder.parent})"
    found = sorted(entry.name for entry in folder.iterdir())
    return f"the folder holds {', '.join(found[:SHOWN_KEYS]) or 'nothing'}"


def load_module(kind: type[Model], folder: Path) -> Model:
    """The component in a folder, with exactly its own weights; `InputError` lists what is missing or too much."""
    weights = _weights(folder)
    try:
        _require_no_more(skeleton(lambda: _described(kind, folder), weights), weights)
        module, report = kind.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except InputError:
        raise
    except Exception as error:  # what a configuration makes the libraries trip over can be anything
        if is_too_little_memory(error):
            raise
        raise InputError(f"{folder} holds no readable {kind.__name__}: {first_line(error)}") from error
    _check_report(kind, folder, report)
    return module


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors in a component's folder, mapped, each file held against its checksum, where it has one."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {name: tensor for file in files for name, tensor in read_weights(file).items()}


def _described(kind: type[Model], folder: Path) -> Model:
    if issubclass(kind, PreTrainedModel):
        return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    return kind.from_config(read_json(folder / "config.json"))


def _require_no_more(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a module, that would be filled with random numbers, is far larger than its weights."""
    asked, given = (sum(map(Tensor.numel, tensors)) for tensors in (module.parameters(), weights.values()))
    if asked > 2 * given + SPARE_NUMBERS:
        raise ValueError(f"its configuration describes {asked:,} weights, and its files hold {given:,}")


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
            f"{path} is a checkpoint of {family} ({kind}); a single file must be Stable Diffusion 1.x:  "
            "python -m models.assets fetch sd15"
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
    _check_report(CLIPTextModel, path, report)
    return module


def _fitting(
    source: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: Path,
    marked: str | None = None,
) -> Components:
    """The parts together; `InputError` where they do not fit each other or this program.

    `marked`: what the weights themselves say of their prediction; otherwise the scheduler says it.
    """
    foreign = [part for part in FOREIGN_UNET_PARTS if unet.config[part] is not None]
    if foreign:
        raise InputError(
            f"{source}: the UNet has {', '.join(foreign)}: it is no plain Stable Diffusion 1.x or 2.x model."
        )
    require_size(unet, source)
    if unet.config.in_channels != vae.config.latent_channels:
        raise InputError(
            f"{source}: the UNet takes {unet.config.in_channels} channels where the VAE has "
            f"{vae.config.latent_channels}: an inpainting or editing model cannot be used here."
        )
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise InputError(
            f"{source}: the UNet reads text of width {unet.config.cross_attention_dim}, "
            f"the text encoder writes width {text_encoder.config.hidden_size}."
        )
    config = read_json(scheduler)
    prediction_type = marked or config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(f"{scheduler}: prediction_type {prediction_type!r}; known are epsilon and v_prediction.")
    levels = NoiseLevels.from_scheduler_config(config, str(scheduler))
    return Components(unet, vae, text_encoder, tokenizer, levels, prediction_type)


def require_size(network: UNet2DConditionModel | UNet2DModel, source: str | Path) -> None:
    """Raise `InputError` where a network's configuration does not say what size, or height and width, it works at."""
    size = network.config.sample_size
    sides = [size, size] if type(size) is int else size
    usable = isinstance(sides, list | tuple) and len(sides) == 2
    if not usable or not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides):
        raise InputError(
            f"{source}: the network's sample_size is {size!r}; it must be one or two numbers from 1 to {LARGEST_SIDE}"
        )


def _check_report(kind: type, source: Path, report: Mapping[str, Collection[Any]]) -> None:
    """Check what `from_pretrained` says of the weights; left alone, it fills what is missing with random numbers."""
    misshapen = [name for name, *_ in report["mismatched_keys"]]
    check_keys(kind, source, report["missing_keys"], report["unexpected_keys"], misshapen)


def check_keys(
    kind: type,
    source: Path,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Collection[str] = (),
) -> None:
    """Raise `InputError`, with names, where the weights of `source` are not exactly those of a module of `kind`."""
    faults = [
        f"{len(keys)} {word} ({', '.join(sorted(keys)[:SHOWN_KEYS])}{', ...' if len(keys) > SHOWN_KEYS else ''})"
        for keys, word in ((missing, "missing"), (unexpected, "not belonging to it"), (misshapen, "of another shape"))
        if keys
    ]
    if faults:
        raise InputError(f"{source}: the weights are not those of this {kind.__name__}: {'; '.join(faults)}.")


@contextmanager
def quiet_and_repeatable() -> Iterator[None]:
    """The libraries without their progress bars and reports, and torch's global random state left as it was."""
    loggings = [diffusers.utils.logging, transformers.utils.logging]
    before = [(logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in loggings]
    for logging in loggings:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for logging, (verbosity, bars) in zip(loggings, before, strict=True):
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
