"""A light decoder over a frozen CLIP's patches: a finer grid, and gated convolutions beside what is there."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class GatedLayer(nn.Module):
    """``x + leave(a sigmoid(b))``, (a, b) = 3 x 3 convolution of ``enter(norm(x))``. ``leave`` begins at zero: the layer is then nothing.

    Shapes: [B, N, E] to the same; ``hidden`` channels inside.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm, self.enter = nn.LayerNorm(width), nn.Linear(width, hidden)
        self.mix = nn.Conv2d(hidden, 2 * hidden, 3, padding=1)
        self.leave = nn.Linear(hidden, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        maps = self.enter(self.norm(x)).transpose(1, 2).unflatten(2, grid)
        return x + self.leave(F.glu(self.mix(maps), 1).flatten(2).transpose(1, 2))


class LightDecoder(nn.Module):
    """Tokens [B, h w, E] to [B, f h f w, E], f = 2 ** doublings, bilinear, then ``layers`` gated ones."""

    def __init__(self, width: int, hidden: int, layers: int, doublings: int):
        super().__init__()
        self.factor = 2**doublings
        self.layers = nn.ModuleList(GatedLayer(width, hidden) for _ in range(layers))

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, tuple[int, int]]:
        if self.factor > 1:
            size = grid[0] * self.factor, grid[1] * self.factor
            maps = F.interpolate(tokens.transpose(1, 2).unflatten(2, grid), size, mode="bilinear", align_corners=False)
            tokens, grid = maps.flatten(2).transpose(1, 2).contiguous(), size
        for layer in self.layers:
            tokens = layer(tokens, grid)
        return tokens, grid
