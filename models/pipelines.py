"""Diffusers pipeline folders: `model_index.json` and one folder a component. Nothing here ever asks a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

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
    HALF,
    META,
    SHOWN_KEYS,
    SUFFIXES,
    load_module,
    load_tokenizer,
    quiet_and_repeatable,
    read_json,
    weights_in,
)
from models.options import AS_IT_IS, ModelOptions

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
FORMS = 3  # of weights, see `forms`
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
LEFT_OUT = (None, [None, None])  # what an index says of a component that its pipeline does without


@dataclass(frozen=True)
class Contents:
    """What a pipeline's folder must hold, by the names of the components' folders; nothing of it is loaded."""

    folder: Path
    family: type[Backbone]
    index: Mapping[str, Any]
    modules: Mapping[str, type[nn.Module]]
    tokenizers: Mapping[str, type[PreTrainedTokenizerBase]]

    @property
    def network(self) -> str:
        """The component that denoises; every family names it first."""
        return next(iter(self.modules))

    @property
    def is_flat(self) -> bool:
        """Whether all lies in the pipeline's own folder, as the first DDPMs (google/ddpm-*) were published."""
        (first, *others) = self.modules
        return not (others or (self.folder / first).is_dir()) and (self.folder / "config.json").is_file()

    def below(self, part: str) -> str:
        """What stands before the names of a component's files."""
        return "" if self.is_flat else f"{part}/"

    def without_weights(self, forms_read: int | None = None) -> list[str]:
        """The components that have no weights in a form that is read here, or in the first few of the `forms`."""
        return [
            part
            for part, kind in self.modules.items()
            if not any(
                (self.folder / f"{self.below(part)}{name}").is_file()
                for form in forms(kind)[:forms_read]
                for name in (str(form), form.index)
            )
        ]

    def files(self) -> list[str]:
        """Patterns of the files that are wanted of a hub, of the weights those in the best form."""
        wanted = [
            *self.configs(),
            GENERATION_CONFIG,  # few have one: the guidance that a model is used at
            *self.weights(0),
            *(f"{part}/*" for part in self.tokenizers),
        ]
        # Whether it is flat is not known before.
        return wanted if len(self.modules) > 1 else [*wanted, *(name.rpartition("/")[2] for name in wanted)]

    def weights(self, form: int) -> list[str]:
        """Patterns of one of the `forms` of the weights, for the components that have none of a better form."""
        better = self.without_weights(form)
        return [f"{self.below(part)}{name}" for part in better for name in forms(self.modules[part])[form].patterns]

    def configs(self) -> list[str]:
        """The files that say what the components are."""
        return [INDEX, *(f"{self.below(part)}config.json" for part in self.modules), self.scheduler]

    @property
    def scheduler(self) -> str:
        """The file that says the noise schedule."""
        return SCHEDULER.rpartition("/")[2] if self.is_flat else SCHEDULER


class Form(NamedTuple):
    """How the files of a component's weights are called."""

    stem: str
    suffix: str
    variant: str = ""

    def __str__(self) -> str:
        """All in one file: `model.fp16.safetensors`, where `.fp16` is the variant."""
        return f"{self.stem}{self.variant}{self.suffix}"

    @property
    def index(self) -> str:
        """What says where each is, where there are several files."""
        return f"{self.stem}{self.suffix}.index{self.variant}.json"

    @property
    def patterns(self) -> tuple[str, str, str]:
        """One file, or several with an index."""
        return str(self), f"{self.stem}{self.variant}-*-of-*{self.suffix}", self.index


def forms(kind: type[nn.Module]) -> tuple[Form, Form, Form]:
    """The forms of a component's weights, the best first: as they are written now, half as wide, and of old."""
    newest, oldest = SUFFIXES
    now, of_old = ("model", "pytorch_model") if issubclass(kind, PreTrainedModel) else (DIFFUSERS_WEIGHTS,) * 2
    return Form(now, newest), Form(now, newest, f".{HALF}"), Form(of_old, oldest)


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
    missing = [part for part in parts if not (folder / contents.below(part)).is_dir()]
    if missing:
        raise InputError(
            f"{folder} holds a {contents.index['_class_name']} that cannot be used here: "
            f"the folders {', '.join(missing)} are missing."
        )
    lacking = [str(folder / name) for name in contents.configs() if not (folder / name).is_file()]
    lacking += [
        f"{folder / contents.below(part) / ' or '.join(map(str, forms(contents.modules[part])))}"
        for part in contents.without_weights()
    ]
    if lacking:
        raise InputError(f"{folder} cannot be used, files are missing: {', '.join(lacking)}.")
    return contents


def load_folder(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    options: ModelOptions = AS_IT_IS,
    device: torch.device | None = None,
) -> tuple[type[Backbone], object]:
    """The family and the parts of a pipeline's folder; modules on the CPU, in `dtype`, or on `META`, without numbers.

    Raises `InputError` where the folder is no such pipeline, is of another family, lacks files or weights, is too large
    for the memory, or cannot do what the options say.
    """
    contents = check_pipeline_folder(folder, options)
    weights = {part: weights_in(folder / contents.below(part)) for part in contents.modules}
    if device != META:
        stored = [weight for part in weights.values() for weight in part.values()]
        # What is stored in the type that is wanted stays mapped from its file.
        converted = sum(weight.numel() * dtype.itemsize for weight in stored if weight.dtype != dtype)
        check_memory(f"Model {folder.name}", converted, torch.device("cpu"))
    with quiet_and_repeatable():
        modules = {
            part: load_module(kind, folder / contents.below(part), weights[part], dtype, device)
            for part, kind in contents.modules.items()
        }
        pipeline = Pipeline(
            source=folder,
            modules=with_additions(modules, options, contents.index["_class_name"], dtype, device),
            tokenizers={part: load_tokenizer(folder / part, kind) for part, kind in contents.tokenizers.items()},
            scheduler=read_json(folder / contents.scheduler),
            scheduler_file=folder / contents.scheduler,
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
