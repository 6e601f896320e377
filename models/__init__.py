"""Frozen diffusion models, each behind one `Denoiser`."""

from models.denoiser import Denoiser
from models.registry import load_denoiser

__all__ = ["Denoiser", "load_denoiser"]
