"""A node pack for ComfyUI: solvers tuned by RLEPD. See README.md."""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """What ComfyUI asks a pack of the V3 API for."""
    from .nodes import EPDExtension, register_folder  # which need ComfyUI

    register_folder()
    return EPDExtension()


__all__ = ["comfy_entrypoint"]
