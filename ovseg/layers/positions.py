"""Position embeddings for another grid than the one they were trained on."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def resize_positions(positions: torch.Tensor, trained: tuple[int, int], grid: tuple[int, int], *, antialias: bool = True) -> torch.Tensor:
    """[1 + h w, D] for the ``trained`` (h, w), class token first, to [1 + H W, D] for ``grid``, bicubic.

    ``antialias`` is open_clip's way; without it torch's bicubic has another kernel, also where it enlarges (SegCLIP's way).
    """
    if trained == grid:
        return positions
    cls, dense = positions[:1], positions[1:]
    dense = dense.float().view(1, *trained, -1).permute(0, 3, 1, 2)
    dense = F.interpolate(dense, grid, mode="bicubic", antialias=antialias, align_corners=False)
    return torch.cat([cls, dense.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(positions.dtype)])
