"""upsample_mask_loss in plain torch.

``upsample_mask_loss`` is the definition; the closed forms below it answer without kernels.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

NEGATIVE, IGNORED = -1, -2  # codes of pixels that are no class's, and of those that do not count


def _maps(logits, codes, alpha, gamma):
    """Return (x, p, y, focal of each pixel, weight of each pixel).

    All are [B, C, H, W] or broadcast to it.
    """
    x = F.interpolate(logits, codes.shape[1:], mode="bilinear", align_corners=False)
    counts = (codes != IGNORED)[:, None].to(x.dtype)
    y = (codes[:, None] == torch.arange(logits.shape[1], device=codes.device)[:, None, None]).to(
        x.dtype
    )
    p = x.sigmoid()
    wrong = torch.where(y == 1, 1 - p, p)
    entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return x, p, y, (alpha * y + (1 - alpha) * (1 - y)) * wrong**gamma * entropy, counts


def upsample_mask_loss(logits, codes, alpha, gamma):
    """Return (focal, dice, present, sums [4, B, C] of p, p y, y and 1), equations (2) to (4)."""
    _, p, y, focal, counts = _maps(logits, codes, alpha, gamma)
    sums = torch.stack([(counts * x).sum((2, 3)) for x in (p, p * y, y, torch.ones_like(y))])
    total_p, total_py, total_y, pixels = sums
    return (
        (counts * focal).sum((2, 3)) / pixels.clamp_min(1),
        1 - (2 * total_py + 1) / (total_p + total_y + 1),
        total_y > 0,
        sums,
    )


def backward(grad_focal, grad_dice, logits, codes, sums, alpha, gamma):
    """Return the gradient of the logits, (5): through the transposed upsampling."""
    height, width = codes.shape[1:]
    x, p, y, _, counts = _maps(logits, codes, alpha, gamma)
    sign, weight = 2 * y - 1, alpha * y + (1 - alpha) * (1 - y)
    wrong = (-sign * x).sigmoid()  # 1 - p_t, without cancellation
    slope = -sign * weight * wrong**gamma * (gamma * (1 - wrong) * F.softplus(-sign * x) + wrong)
    total_p, total_py, total_y, pixels = sums
    bottom = (total_p + total_y + 1)[..., None, None]
    top = (2 * total_py + 1)[..., None, None]
    dice = (top / bottom - 2 * y) / bottom * p * (1 - p)
    grad = counts * (
        (grad_focal / pixels.clamp_min(1))[..., None, None] * slope
        + grad_dice[..., None, None] * dice
    )
    return torch.ops.aten.upsample_bilinear2d_backward(
        grad, [height, width], list(logits.shape), False
    )
