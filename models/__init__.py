"""Frozen diffusion models, each behind one `Denoiser`."""

from interrupts import end_at_once_where_started

end_at_once_where_started()  # what follows takes long

from models.denoiser import Denoiser  # noqa: E402 - later on purpose
from models.registry import load_denoiser  # noqa: E402

__all__ = ["Denoiser", "load_denoiser"]
