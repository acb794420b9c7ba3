"""Position embeddings for another grid than the one they were trained on."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def resize_positions(positions: torch.Tensor, trained: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """[1 + h w, D] for the ``trained`` (h, w), class token first, to [1 + H W, D] for ``grid``, bicubic, antialiased."""
    if trained == grid:
        return positions
    cls, dense = positions[:1], positions[1:]
    dense = dense.float().view(1, *trained, -1).permute(0, 3, 1, 2)
    dense = F.interpolate(dense, grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([cls, dense.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(positions.dtype)])
