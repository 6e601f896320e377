"""From the folder of a pipeline's component to the module or the tokenizer in it. Nothing here ever asks a network."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from errors import InputError, first_line, is_too_little_memory
from models.checkpoints import read_weights
from models.skeletons import require_counts, skeleton

GENERATION_CONFIG = "generation_config.json"  # as transformers calls it: how a model is meant to be used
SHOWN_KEYS = 5
LARGEST_SIDE = 2**14  # of what a network works on
META = torch.device("meta")  # holds shapes and no numbers
SUFFIXES = (".safetensors", ".bin")  # of weights, as they are written now, and as older libraries wrote them
HALF = "fp16"  # the variant of weights that some folders have alone
SPARE_NUMBERS = 10_000_000  # a module may have so many more weights than its files, and is then told which are missing

Module = TypeVar("Module", bound=nn.Module)
Tokenizer = TypeVar("Tokenizer", bound=PreTrainedTokenizerBase)


def guidance_scale_in(folder: Path) -> float | None:
    """What generation_config.json in a pipeline's folder calls `guidance_scale`; None where it says nothing.

    Raises `InputError` where it is no finite number of at least 0.
    """
    file = folder / GENERATION_CONFIG
    scale = read_json(file).get("guidance_scale") if file.is_file() else None
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale <= sys.float_info.max:
        raise InputError(f"{file}: guidance_scale must be a finite number of at least 0, not {json.dumps(scale):.40}.")
    return float(scale)


def load_tokenizer(folder: Path, kind: type[Tokenizer] = CLIPTokenizer) -> Tokenizer:
    """The tokenizer of a folder with tokenizer.json, or, one of CLIP, with vocab.json and merges.txt.

    Raises `InputError` where they are not there, or no tokenizer.
    """
    if not (folder / "tokenizer.json").is_file():
        # transformers would go on with a vocabulary of three tokens
        others = ("vocab.json", "merges.txt") if kind is CLIPTokenizer else ()
        missing = [name for name in others if not (folder / name).is_file()]
        if missing or not others:
            listed = f"{' and '.join(missing)} missing (and no tokenizer.json)" if others else "tokenizer.json missing"
            raise InputError(f"{folder} holds no tokenizer: {listed}.")
    try:
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for malformed files
        name = kind.__name__.removesuffix("Tokenizer")
        raise InputError(f"{folder} holds no readable {name} tokenizer: {first_line(error)}") from error
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


def load_module(
    kind: type[Module],
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Module:
    """The component in a folder, on the CPU, in `dtype`, with exactly its own weights.

    weights: what `weights_in` found there, where that was asked before. With `META` as its device it is seen to be
    whole, and no weight is read. Raises `InputError`, which lists what is missing or too much.
    """
    weights = weights_in(folder) if weights is None else weights
    options: dict[str, Any] = {"dtype" if issubclass(kind, PreTrainedModel) else "torch_dtype": dtype}
    if device == META:
        options["device_map"] = META.type
    try:
        _require_no_more(skeleton(lambda: described(kind, folder), weights), weights)
        module, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            variant=variant_in(folder),
            # Left to itself diffusers looks for the newer form first, and prints an error where it is not there.
            use_safetensors=not any(file.suffix == SUFFIXES[1] for file in weight_files(folder)),
            **options,
        )
    except InputError:
        raise
    except Exception as error:  # what a configuration makes the libraries trip over can be anything
        if is_too_little_memory(error):
            raise
        raise InputError(f"{folder} holds no readable {kind.__name__}: {first_line(error)}") from error
    check_report(kind, folder, report)
    return module


def variant_in(folder: Path) -> str | None:
    """The variant in which a component's weights are read: `fp16` where there are no others, else None."""
    found = {_variant(file) for suffix in SUFFIXES for file in folder.glob(f"*{suffix}")}
    return HALF if HALF in found and None not in found else None


def _variant(file: Path) -> str | None:
    """`fp16` of model.fp16.safetensors and of model.fp16-00001-of-00002.safetensors; None of the plain ones."""
    return file.stem.partition(".")[2].partition("-")[0] or None


def weight_files(folder: Path) -> list[Path]:
    """The files of a component's weights that are read, all of one form."""
    variant = variant_in(folder)
    forms = ([file for file in sorted(folder.glob(f"*{suffix}")) if _variant(file) == variant] for suffix in SUFFIXES)
    return next((found for found in forms if found), [])


def weights_in(folder: Path) -> dict[str, Tensor]:
    """All tensors in a component's folder, mapped, each file held against its checksum, where it has one."""
    return {name: tensor for file in weight_files(folder) for name, tensor in read_weights(file).items()}


def described(kind: type[Module], folder: Path) -> Module:
    """What the configuration in a folder describes, with new weights."""
    settings = read_json(folder / "config.json")
    require_counts(settings)
    if issubclass(kind, PreTrainedModel):
        return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    return kind.from_config(settings)


def _require_no_more(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a module, that would be filled with random numbers, is far larger than its weights."""
    asked, given = (sum(map(Tensor.numel, tensors)) for tensors in (module.parameters(), weights.values()))
    if asked > 2 * given + SPARE_NUMBERS:
        raise ValueError(f"its configuration describes {asked:,} weights, and its files hold {given:,}")


def require_size(network: ModelMixin, source: str | Path) -> tuple[int, int]:
    """Height and width that a network works at; `InputError` where its configuration does not say them."""
    size = network.config.sample_size
    sides = [size, size] if type(size) is int else size
    usable = isinstance(sides, list | tuple) and len(sides) == 2
    if not usable or not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides):
        raise InputError(
            f"{source}: in the network's config.json sample_size is {size!r}; it must be one or two numbers from 1 to "
            f"{LARGEST_SIDE}"
        )
    return sides[0], sides[1]


def check_report(kind: type, source: Path, report: Mapping[str, Collection[Any]]) -> None:
    """Check what `from_pretrained` says of the weights; left alone, it fills what is missing with random numbers."""
    misshapen = [name for name, *_ in report["mismatched_keys"]]
    check_keys(kind, source, report["missing_keys"], report["unexpected_keys"], misshapen)


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: Path, *, assign: bool = False) -> None:
    """`load_state_dict`. Raises `InputError`, with names, where the weights of `source` are not those of the module."""
    check_fit(type(module), source, module.state_dict(), weights)
    module.load_state_dict(weights, assign=assign)


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


def check_fit(kind: type, source: Path, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise `InputError` as `check_keys` does, where tensors are not by name and shape those that are expected."""
    shared = expected.keys() & given.keys()
    misshapen = [name for name in shared if expected[name].shape != given[name].shape]
    check_keys(kind, source, expected.keys() - shared, given.keys() - shared, misshapen)


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
