"""PAMR: class maps adapted to the edges of their picture. Araslanov and Roth, arXiv:2005.08104, section 3.2.

    k(i, j) = -mean over channels of |I_i - I_j| / (1e-8 + 0.1 sigma_i)          j around i at each dilation     (1)
    alpha_i = softmax over j of k(i, j)                                                                        (2)
    m_i <- sum_j alpha_ij m_j, ten times                                                                       (3)

sigma_i is the standard deviation of the picture, channel by channel, over the 3 x 3 pixels around i at every dilation. Borders are
replicated. Nothing is trained; maps need not be probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

DILATIONS = (1, 2, 4, 8, 12, 24)
_SQUARE = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
_RING = [offset for offset in _SQUARE if offset != (0, 0)]


def pamr(image: torch.Tensor, maps: torch.Tensor, *, iterations: int = 10, dilations: Sequence[int] = DILATIONS) -> torch.Tensor:
    """Refined maps [C, H, W].

    Memory: 8 affinities for each dilation and pixel, and a few maps; classes go one by one.

    Args:
        image: [3, H, W].
        maps: [C, H, W] of the same size.
        iterations: of (3).
        dilations: distances of the eight neighbours.
    """
    if image.dim() != 3 or maps.dim() != 3 or image.shape[1:] != maps.shape[1:]:
        raise ValueError(f"image has shape {list(image.shape)} and maps {list(maps.shape)}; expected [3, H, W] and [C, H, W]")
    reach = max(dilations)

    def around(x: torch.Tensor, offsets: Sequence[tuple[int, int]] = _RING):
        """The neighbours of every pixel of ``x`` [..., H, W], one after the other."""
        height, width = x.shape[-2:]
        padded = F.pad(x[None], (reach,) * 4, mode="replicate")[0]
        for dilation in dilations:
            for y, x_ in offsets:
                top, left = reach + y * dilation, reach + x_ * dilation
                yield padded[..., top : top + height, left : left + width]

    count = len(dilations) * len(_SQUARE)
    mean = sum(around(image, _SQUARE)) / count
    sigma = (sum((near - mean) ** 2 for near in around(image, _SQUARE)) / (count - 1)).sqrt()
    scores = torch.stack([-((image - near).abs() / (1e-8 + 0.1 * sigma)).mean(0) for near in around(image)])
    weights = scores.softmax(0)
    refined = torch.empty_like(maps)
    for c in range(len(maps)):
        one = maps[c : c + 1]
        for _ in range(iterations):
            total = torch.zeros_like(one)
            for weight, near in zip(weights, around(one), strict=True):
                total.addcmul_(weight[None], near)
            one = total
        refined[c] = one[0]
    return refined
