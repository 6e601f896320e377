"""Frozen diffusion models, each behind one `Denoiser`."""
