"""Local mixing, the front of the tiny models: without it a model of their size learns to retrieve captions and not where things are."""

from __future__ import annotations

import torch
from torch import nn

LOCAL_PATCH = 4  # pixels from one token of the stem to the next


class LocalBlock(nn.Module):
    """Depth-wise 3x3 convolution and an MLP over channels, [B, D, h, w]. Three of them see 30 pixels, an object and little else."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width, padding_mode="replicate")
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(self.mix(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def local_stem(width: int) -> nn.Sequential:
    """Pictures to a map of a token every ``LOCAL_PATCH`` pixels. Replicated borders: zeros would be a texture of their own along the edge
    of every picture."""
    return nn.Sequential(
        nn.Conv2d(3, width // 2, 3, 2, 1, padding_mode="replicate"),
        nn.GELU(),
        nn.Conv2d(width // 2, width, 3, 2, 1, padding_mode="replicate"),
    )
