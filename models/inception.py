"""InceptionV3's image features, which FID and KID are taken in, with the network that clean-fid uses.

The network is a TorchScript file, a translation of TensorFlow's of 2015 (Heusel et al., arXiv 1706.08500); nothing of
torchvision is needed. What a distance comes to hangs on how images are resized (Parmar et al., arXiv 2104.11222), so
there are two ways, and every table names its own:

    clean    antialiased bicubic to 299 x 299 before the network, as clean-fid does
    legacy   by the network itself, as TensorFlow's bilinear one without antialiasing: the published numbers of EDM, of
             EPD and of most of the field; clean-fid's `legacy_tensorflow`
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from errors import InputError, first_line
from models import asset_table
from models.asset_table import fault_of
from models.devices import check_memory

Resize = Literal["clean", "legacy"]
RESIZES: tuple[Resize, ...] = ("clean", "legacy")
SIDE = 299  # pixels of the network's input
FETCH = "python -m models.assets fetch inception"


class Inception:
    """The network, ready to be asked; frozen, in float32."""

    def __init__(self, device: torch.device | str, resize: Resize = "clean") -> None:
        """Load it, which runs the file's code: only the file whose SHA-256 is the published one is loaded.

        Raises:
            InputError: it is missing or another file, or there is too little memory.
        """
        self.resize: Resize = resize
        self.name = f"inception_{resize}"
        self.fingerprint = f"{asset_table.INCEPTION.digest} {resize}"
        self.device = torch.device(device)
        path = inception_file()
        check_memory(str(path), path.stat().st_size, self.device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the format is what the network is published in
                self._network = torch.jit.load(path, map_location=self.device).eval()
        except RuntimeError as error:
            raise InputError(f"{path} is no TorchScript that this torch can load: {first_line(error)}") from error

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Features [N, D] float32 of images uint8 [N, 3, H, W], D = 2,048 for InceptionV3; on the network's device."""
        if pixels.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, as files hold them, not {pixels.dtype}")
        images = pixels.to(self.device, torch.float32, non_blocking=True)
        if self.resize == "legacy":
            return self._network(images, return_features=True).flatten(1)
        return self._network.layers(resized(images).sub(128).div(128)).flatten(1)


def resized(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [0, 255] at 299 x 299 as clean-fid has them: Pillow's bicubic, unrounded, then clipped."""
    if images.shape[-2:] != (SIDE, SIDE):
        images = functional.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True)
    return images.clamp(0, 255)


def inception_file() -> Path:
    """Where the network lies. Raises InputError where it is missing or is another file."""
    asset = asset_table.INCEPTION
    path = asset_table.ROOT / asset.path
    if not path.is_file():
        raise InputError(f"{path}: InceptionV3 is not there ({asset.size:,} bytes). Fetch it:  {FETCH}")
    if fault := fault_of(asset, path, asset.digest):
        raise InputError(f"{path} is not {asset.name}: {fault}. Move it away and fetch it:  {FETCH}")
    return path
