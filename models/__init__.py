"""Frozen diffusion models, each behind one `Denoiser`."""

import sys

if sys.argv[0] == "-m":  # so called while `python -m models...` looks for its module; what follows takes long
    from interrupts import end_at_once_on_signals

    end_at_once_on_signals()

from models.denoiser import Denoiser
from models.registry import load_denoiser

__all__ = ["Denoiser", "load_denoiser"]
