"""Diffusers pipeline folders: `model_index.json` and one folder a component. Nothing here ever asks a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errors import InputError
from models.additions import with_additions
from models.backbone import Backbone, Pipeline
from models.devices import check_memory
from models.families import FAMILIES
from models.loading import (
    GENERATION_CONFIG,
    SHOWN_KEYS,
    load_module,
    load_tokenizer,
    quiet_and_repeatable,
    read_json,
    weights_in,
)
from models.options import AS_IT_IS, ModelOptions

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
LEFT_OUT = (None, [None, None])  # what an index says of a component that its pipeline does without


@dataclass(frozen=True)
class Contents:
    """What a pipeline's folder must hold, by the names of the components' folders; nothing of it is loaded."""

    folder: Path
    family: type[Backbone]
    index: Mapping[str, Any]
    modules: Mapping[str, type[nn.Module]]
    tokenizers: Mapping[str, type[PreTrainedTokenizerBase]]

    def without_weights(self) -> list[str]:
        """The components that have no weights in a form that is read here."""
        return [
            part
            for part, kind in self.modules.items()
            if not any(
                (self.folder / part / f"{form}{index}").is_file()
                for form in forms(kind)
                for index in ("", ".index.json")  # of weights in several files
            )
        ]

    def older_weights(self) -> list[str]:
        """The older forms of the weights that are not there in a newer one."""
        return [f"{part}/{forms(self.modules[part])[1]}" for part in self.without_weights()]

    def files(self) -> list[str]:
        """Patterns of the files that are needed of a hub; other variants of the weights are left there.

        Of a component's weights the first form, whole or in parts; the older one is needed where there is no other.
        """
        return [
            *self.configs(),
            GENERATION_CONFIG,  # few have one: the guidance that a model is used at
            *(f"{part}/{name}" for part, kind in self.modules.items() for name in newest_weights(kind)),
            *(f"{part}/*" for part in self.tokenizers),
        ]

    def configs(self) -> list[str]:
        """The files that say what the components are."""
        return [INDEX, *(f"{part}/config.json" for part in self.modules), SCHEDULER]


def forms(kind: type[nn.Module]) -> tuple[str, str]:
    """How a component's weights are called: as they are written now, and as older libraries wrote them."""
    if issubclass(kind, PreTrainedModel):
        return "model.safetensors", "pytorch_model.bin"
    return "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"


def newest_weights(kind: type[nn.Module]) -> list[str]:
    """Patterns of a component's weights in their newest form: in one file, or in several with an index."""
    form = forms(kind)[0]
    stem, _, suffix = form.partition(".")
    return [form, f"{stem}-*-of-*.{suffix}", f"{form}.index.json"]


def contents_of(folder: Path, options: ModelOptions = AS_IT_IS) -> Contents:
    """What a pipeline's folder must hold, from its index and what is asked for.

    Raises `InputError` where the folder is no pipeline, or one of a family that is not known, or cannot do that.
    """
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} is no diffusers pipeline, {INDEX} is missing: {_what_is_in(folder)}.")
    index = read_json(folder / INDEX)
    kind = index.get("_class_name", "pipeline of no named class")
    if kind not in FAMILIES:
        raise InputError(f"{folder} holds a {kind}, which cannot be used here. Known are: {', '.join(FAMILIES)}.")
    family = import_module(FAMILIES[kind]).FAMILY
    family.check_options(options, folder)
    not_there = [part for part in family.optional if options.without_t5 or index.get(part) in LEFT_OUT]
    left_out = {*not_there, *(family.optional[part] for part in not_there)}
    modules, tokenizers = (
        {part: kind for part, kind in parts.items() if part not in left_out}
        for parts in (family.modules, family.tokenizers)
    )
    return Contents(folder, family, index, modules, tokenizers)


def check_pipeline_folder(folder: Path, options: ModelOptions = AS_IT_IS) -> Contents:
    """What a pipeline's folder holds; `InputError` where it is none that is known, or lacks components or files."""
    contents = contents_of(folder, options)
    parts = (*contents.modules, *contents.tokenizers, SCHEDULER.partition("/")[0])
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise InputError(
            f"{folder} holds a {contents.index['_class_name']} that cannot be used here: "
            f"the folders {', '.join(missing)} are missing."
        )
    lacking = [str(folder / name) for name in contents.configs() if not (folder / name).is_file()]
    lacking += [f"{folder / part / ' or '.join(forms(contents.modules[part]))}" for part in contents.without_weights()]
    if lacking:
        raise InputError(f"{folder} cannot be used, files are missing: {', '.join(lacking)}.")
    return contents


def check_pipeline(folder: Path, options: ModelOptions = AS_IT_IS) -> None:
    """`check_pipeline_folder`, and the same error where weights or tokenizers are cut off or damaged."""
    contents = check_pipeline_folder(folder, options)
    for part in contents.modules:
        weights_in(folder / part)
    for part, kind in contents.tokenizers.items():
        load_tokenizer(folder / part, kind)


def load_folder(
    folder: Path, dtype: torch.dtype = torch.float32, options: ModelOptions = AS_IT_IS
) -> tuple[type[Backbone], object]:
    """The family and the parts of a pipeline's folder; modules on the CPU, in `dtype`.

    Raises `InputError` where the folder is no such pipeline, is of another family, lacks files or weights, is too large
    for the memory, or cannot do what the options say.
    """
    contents = check_pipeline_folder(folder, options)
    weights = {part: weights_in(folder / part) for part in contents.modules}
    stored = [weight for part in weights.values() for weight in part.values()]
    # What is stored in the type that is wanted stays mapped from its file.
    converted = sum(weight.numel() * dtype.itemsize for weight in stored if weight.dtype != dtype)
    check_memory(f"Model {folder.name}", converted, torch.device("cpu"))
    with quiet_and_repeatable():
        modules = {
            part: load_module(kind, folder / part, weights[part], dtype) for part, kind in contents.modules.items()
        }
        pipeline = Pipeline(
            source=folder,
            modules=with_additions(modules, options, contents.index["_class_name"], dtype),
            tokenizers={part: load_tokenizer(folder / part, kind) for part, kind in contents.tokenizers.items()},
            scheduler=read_json(folder / SCHEDULER),
            scheduler_file=folder / SCHEDULER,
            index=contents.index,
            options=options,
        )
        return contents.family, contents.family.assembled(pipeline)


def _what_is_in(folder: Path) -> str:
    if (folder / "config.json").is_file():
        kind = read_json(folder / "config.json").get("_class_name", "component")
        return f"this is a single {kind}, give the folder of the whole pipeline (perhaps {folder.parent})"
    found = sorted(entry.name for entry in folder.iterdir())
    return f"the folder holds {', '.join(found[:SHOWN_KEYS]) or 'nothing'}"
