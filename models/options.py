"""What a person may ask for when a model is loaded, beside its name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelOptions:
    """How a model is to be loaded; plain values, and everything an image depends on beside the model's own files.

    height, width: of the images, in pixels; None is the model's own.
    """

    height: int | None = None
    width: int | None = None


AS_IT_IS = ModelOptions()
