"""DiT (arXiv 2212.09748): a transformer that draws one of its classes; a prompt is a class's name, or its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models import AutoencoderKL, DiTTransformer2DModel
from torch import Tensor

from errors import InputError
from models.backbone import Pipeline, code_files
from models.denoiser import Guidance, GuidanceKind, Text
from models.latent_diffusion import LatentDiffusion, Parts, require_fit
from models.loading import require_size
from models.processes import VariancePreserving


@dataclass(frozen=True)
class ClassParts(Parts):
    """See `Parts`. classes: see `classes_of`."""

    classes: Mapping[str, int] = field(default_factory=dict)


class DiT(LatentDiffusion):
    """A class-conditional DiT, of one size."""

    backend = "dit"
    usual_guidance = Guidance(GuidanceKind.CLASSIFIER_FREE, 4.0)
    modules: ClassVar = {"transformer": DiTTransformer2DModel, "vae": AutoencoderKL}
    known_options = frozenset({"vae", "negative_prompt"})
    code = (*LatentDiffusion.code, *code_files("families.dit"))

    @classmethod
    def assembled(cls, pipeline: Pipeline) -> ClassParts:
        """See `Backbone.assembled`."""
        transformer, vae = pipeline.modules["transformer"], pipeline.modules["vae"]
        config = transformer.config
        require_fit(pipeline, "latent channels", config.in_channels, vae.config.latent_channels)
        return ClassParts(
            pipeline=pipeline,
            text_encoders=(),
            process=VariancePreserving.from_scheduler_config(pipeline.scheduler, str(pipeline.scheduler_file)),
            latent_shape=(config.in_channels, *require_size(transformer, pipeline.source)),
            guidance=cls.guidance_of(pipeline.source),
            classes=classes_of(pipeline.index, config.num_embeds_ada_norm, pipeline.source),
        )

    def __init__(self, name: str, parts: ClassParts, *, device: torch.device, dtype: torch.dtype) -> None:
        """Raises `InputError` where the device has too little memory, and where the negative prompt is no class."""
        super().__init__(name, parts, device=device, dtype=dtype)
        self._classes = parts.classes
        self._read([self._negative_prompt])

    def _prompt_faults(self, prompt: str) -> list[str]:
        unknown = [] if prompt in self._classes else ["it is none of the model's classes, by name or by number"]
        return super()._prompt_faults(prompt) or unknown

    def _read(self, prompts: Sequence[str]) -> Text:
        self.validate_prompts([prompt for prompt in prompts if prompt not in self._classes])
        return {"class_labels": torch.tensor([self._classes[prompt] for prompt in prompts])}

    def _predict(self, z: Tensor, times: Tensor, text: Text, scales: Tensor | None) -> Tensor:
        # Where the network predicts a variance too, it comes second.
        return super()._predict(z, times, text, scales)[:, : z.shape[1]]


def classes_of(index: Mapping[str, Any], count: int, source: Path) -> dict[str, int]:
    """The numbers of a model's `count` classes by digits and by the names that its index has for them.

    The empty prompt has the number after the last, which guidance leads away from. Raises `InputError` for an index
    that says something else.
    """
    try:
        named = {
            name.strip(): int(number)
            for number, names in (index.get("id2label") or {}).items()
            for name in names.split(",")
        }
    except (AttributeError, ValueError):
        named = {"": -1}
    if not all(name and 0 <= number < count for name, number in named.items()):
        raise InputError(f"{source}: id2label in model_index.json must hold names by numbers from 0 to {count - 1}.")
    return {"": count, **{str(number): number for number in range(count)}, **named}


FAMILY = DiT
