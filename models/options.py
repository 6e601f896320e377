"""What a person may ask for when a model is loaded, beside its name."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import InputError
from models.prompts import text_fault


@dataclass(frozen=True)
class ModelOptions:
    """How a model is to be loaded, in plain values; None is as it comes.

    lora: weights to add, FILE or FILE:SCALE, several with commas between them. vae: the folder of another VAE, or of a
    pipeline whose VAE it is. height, width: of the images, in pixels. negative_prompt: what guidance leads away from.
    without_t5: leave the text encoder T5 out, where the model can do without it.
    text_on_cpu: run the text encoders on the CPU, out of the device's memory; an image changes by rounding alone.
    """

    lora: str | None = None
    vae: str | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    without_t5: bool = False
    text_on_cpu: bool = False

    def __post_init__(self) -> None:
        """Refuse a text that is no prompt, and weights to add that are not named as they must be."""
        if self.negative_prompt is not None and (fault := text_fault(self.negative_prompt)):
            raise InputError(f"The negative prompt {self.negative_prompt!r:.60} is none: {fault}.")
        self.loras()

    def loras(self) -> list[tuple[Path, float]]:
        """The files of weights to add, and how much of each."""
        return [_parsed_lora(part) for part in (self.lora or "").split(",") if self.lora is not None]

    def changes(self) -> dict[str, Any]:
        """What is asked for of all that changes an image."""
        return {name: value for name in CHANGING if (value := getattr(self, name)) not in (None, False)}

    def files(self) -> list[Path]:
        """The files and folders that are read beside the model's own."""
        return [*(file for file, _ in self.loras()), *([Path(self.vae)] if self.vae else [])]

    def __str__(self) -> str:
        """As a person asks for it: `height=512 lora=style.safetensors:0.8`."""
        return " ".join(f"{name}={value}" for name, value in sorted(self.changes().items())) or "as it comes"

    @classmethod
    def from_changes(cls, told: Any, source: str) -> ModelOptions:
        """The inverse of `changes`, from a file; `source` names it, and the key, in messages.

        Raises InputError where it is something else.
        """
        hints = typing.get_type_hints(cls)
        kinds = {name: typing.get_args(hint) or (hint,) for name, hint in hints.items()}
        if not isinstance(told, Mapping) or any(type(told[key]) not in kinds.get(key, ()) for key in told):
            raise InputError(f"{source} is {told!r:.200}: these are no options of a model")
        return cls(**told)


AS_IT_IS = ModelOptions()
CHANGING = tuple(field.name for field in dataclasses.fields(ModelOptions) if field.name != "text_on_cpu")
"""The options that change an image."""


def _parsed_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE`; what stands after the last colon is a scale where it is a number."""
    name, colon, tail = text.strip().rpartition(":")
    try:
        scale = float(tail) if colon else math.nan
    except ValueError:
        scale = math.nan
    name, scale = (text.strip(), 1.0) if math.isnan(scale) else (name, scale)
    if not name.endswith(".safetensors") or not math.isfinite(scale):
        raise InputError(f"LoRA {text!r}: name a .safetensors file, with a colon and a finite scale if it is not 1")
    return Path(name), scale
