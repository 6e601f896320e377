"""What stands where in a scene, coarsely, and a head that reads it from what a model made of a caption or an image.

The denoising loss does not teach a text encoder in affordable time which of two objects stands left of the other: it
shows that at high noise only, and weakly, and neither encoder nor network gains from it before the other does. After
8,000 steps without the head, a caption and the same one with its relation turned round gave the same loss at every
noise level. Asked directly, the text encoder learns it in some six hundred steps; within four hundred more of its own
the network uses it. The head is thrown away after training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CELLS = 4  # in each direction


def layout_of(pictures: Tensor) -> Tensor:
    """Images or latents [N, C, H, W], H and W multiples of 4, averaged over cells: [N, C, 4, 4]."""
    return functional.avg_pool2d(pictures, pictures.shape[-1] // CELLS)


class LayoutHead(nn.Module):
    """Guesses a layout [N, C, 4, 4] from states [N, L, D], such as a caption's tokens or one embedding (L = 1)."""

    def __init__(self, width: int, channels: int, heads: int = 4, depth: int = 2) -> None:
        """`width` is D, `channels` is C; in each of `depth` layers every cell looks at the states once."""
        super().__init__()
        self.cells = nn.Parameter(0.5 * torch.randn(CELLS**2, width))
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(depth))
        self.update = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.colour = nn.Linear(width, channels)

    def forward(self, states: Tensor) -> Tensor:
        """[N, L, D] -> [N, C, 4, 4]."""
        cells = self.cells.expand(len(states), -1, -1)  # [N, 16, D]
        for norm, attention, update in zip(self.norm, self.attention, self.update, strict=True):
            # With its weights asked for, the attention is not fused: a fused one's backward pass is slow on a CPU.
            cells = cells + attention(norm(cells), states, states, need_weights=True)[0]
            cells = cells + update(cells)
        return self.colour(cells).transpose(1, 2).unflatten(2, (CELLS, CELLS))
