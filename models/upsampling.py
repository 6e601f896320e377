"""Upsampling whose compiled gradient is right."""

from __future__ import annotations

from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


def double_by_copies(network: nn.Module) -> None:
    """Have a network's upsampling layers copy rows and columns themselves, in place of asking torch's `interpolate`.

    The numbers are the same. But what torch 2.13 compiles of `interpolate` for a CPU loses the gradient in half
    precision: to all of a U-Net that lies below the last upsampling it is 0.
    """
    for layer in network.modules():
        if isinstance(layer, Upsample2D) and layer.interpolate and layer.norm is None and not layer.use_conv_transpose:
            layer.interpolate = False
            layer.register_forward_pre_hook(_doubled)


def _doubled(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Of the layer's arguments, the features [N, C, H, W] and perhaps the size to come to, twice the features: each
    pixel four times, but for a last row and column that are beyond an odd size.
    """
    features, *wanted = given
    count, channels, height, width = features.shape
    spread = features[:, :, :, None, :, None].expand(count, channels, height, 2, width, 2)
    doubled = spread.reshape(count, channels, 2 * height, 2 * width)
    rows, columns = wanted[0] if wanted and wanted[0] is not None else (2 * height, 2 * width)
    return (doubled[:, :, :rows, :columns],)
