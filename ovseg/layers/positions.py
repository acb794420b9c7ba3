"""Position embeddings for another grid than the one they were trained on."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def resize_positions(positions: torch.Tensor, trained: tuple[int, int], grid: tuple[int, int], *, antialias: bool = True,
                     prefix: int = 1, mode: str = "bicubic") -> torch.Tensor:
    """[prefix + h w, D] for the ``trained`` (h, w), class token and registers first, to [prefix + H W, D] for ``grid``.

    ``antialias`` is open_clip's way; without it torch's bicubic has another kernel, also where it enlarges (SegCLIP's way). ``mode``
    bilinear without it is DenseCLIP's, and so ZegCLIP's.
    """
    if trained == grid:
        return positions
    first, dense = positions[:prefix], positions[prefix:]
    dense = dense.float().view(1, *trained, -1).permute(0, 3, 1, 2)
    dense = F.interpolate(dense, grid, mode=mode, antialias=antialias, align_corners=False)
    return torch.cat([first, dense.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(positions.dtype)])


def rotate(x: torch.Tensor, rope: torch.Tensor, *, prefix: int, half: bool) -> torch.Tensor:
    """Queries or keys [B, heads, prefix + N, d], turned by their patch's place; the prefix has none.

    ``rope`` [N, 2 d]: sines, then cosines, as timm makes them. Dimensions turn in pairs (2i, 2i + 1), or (i, i + d / 2) if ``half``.
    """
    first, x = x[:, :, :prefix], x[:, :, prefix:]
    sin, cos = rope.chunk(2, -1)
    if half:
        a, b = x.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    x = x * cos + turned * sin
    return torch.cat([first.to(x.dtype), x], 2)
