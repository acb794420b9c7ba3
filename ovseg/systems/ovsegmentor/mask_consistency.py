"""OVSegmentor's cross-image mask consistency, without a map at full size.

Xu et al., arXiv:2301.09121. Prediction M_1 and target M_2 [B, G, h, w] are maps of groups on one
picture. With U the bilinear upsampling (align_corners True) to H x W:

    p_g = (U M_1g - min) / (max - min)                                                           (1)
    t_g = [sigmoid(U M_2g) >= ratio max sigmoid(U M_2g)]                                         (2)
    permutation of M_2's groups: least sum of |U M_1g / |U M_1g| - U M_2k / |U M_2k||            (3)
    d_b = 1 - (2 sum_gp p t + 1) / (sum_gp p + sum_gp t + 1)                                     (4)

(3) is by Hungarian matching. No map [B, G, H, W] is needed: U is linear, so sums of U M_1 are
products of M_1 with small tables,

    sum_p U M = <M, U^T 1>      sum_p (U M) t = <M, U^T t>      <U M, U M'> = <M, (U^T U) M'>    (5)

an extreme of a bilinear map lies at an outermost sample of a cell, 2 (h - 1) of the H rows, and U^T
t is made a few rows at a time. What is kept for backward has the size of M.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...errors import InputError

_ROWS = 4  # of the upsampled target at a time
_PARTS = 8  # of the pictures, one after another


class _Axis(NamedTuple):
    """One axis of U.

    Attributes:
        table: [outputs, samples].
        outermost: those of its rows that are first or last in their cell, [rows, samples].
    """

    table: Tensor
    outermost: Tensor

    @classmethod
    def of(cls, samples: int, outputs: int, device: torch.device) -> _Axis:
        steps = max(1, outputs - 1)
        cells = max(1, samples - 1)
        at = torch.arange(outputs, dtype=torch.float64, device=device) * (samples - 1) / steps
        table = (1 - (at[:, None] - torch.arange(samples, device=device)).abs()).clamp(min=0)
        cell = [min(row * cells // steps, cells - 1) for row in range(outputs)]  # in integers
        kept = [
            row
            for row in range(outputs)
            if row in (0, outputs - 1) or cell[row] != cell[row - 1] or cell[row] != cell[row + 1]
        ]
        return cls(table, table[kept])


class _Target(NamedTuple):
    """Tables of some pictures that the loss needs beside the prediction itself.

    Attributes:
        match: [B, G] of (3).
        marked: [B, G, h, w], U^T t of the matched target.
        count: [B, G], the sum of t.
        row, column: of U, of the prediction's least and largest pixel, [2, B, G, h] and
            [2, B, G, w].
    """

    match: Tensor
    marked: Tensor
    count: Tensor
    row: Tensor
    column: Tensor


def mask_consistency(
    prediction: Tensor, target: Tensor, size: tuple[int, int], ratio: float = 0.6
) -> tuple[Tensor, Tensor]:
    """Return (4), one number a picture [B], and (3), the target's group for each, [B, G] int64.

    Args:
        prediction: M_1 [B, G, h, w]; gets a gradient.
        target: M_2, of the same shape.
        size: (H, W), at least h and w.
        ratio: of (2), 0 .. 1.
    """
    if prediction.shape != target.shape or prediction.dim() != 4 or not len(prediction):
        raise InputError(
            f"prediction and target have shapes {list(prediction.shape)} and "
            f"{list(target.shape)}; expected one [B, G, h, w]"
        )
    if size[0] < prediction.shape[2] or size[1] < prediction.shape[3]:
        raise InputError(
            f"size is {tuple(size)} and the maps are {tuple(prediction.shape[2:])}; expected at "
            "least as much"
        )
    rows, columns = (
        _Axis.of(n, N, prediction.device) for n, N in zip(prediction.shape[2:], size, strict=True)
    )
    with torch.no_grad():
        pictures = max(1, len(prediction) // _PARTS)
        pairs = zip(prediction.split(pictures), target.split(pictures), strict=True)
        parts = [_prepare(a, b, rows, columns, ratio) for a, b in pairs]
        found = list(zip(*parts, strict=True))
        match, marked, count = (torch.cat(part) for part in found[:3])
        row, column = (torch.cat(part, 1) for part in found[3:])
        del parts, found
    m = prediction.double()  # differences of large sums
    low, high = torch.einsum("xbgh,bghw,xbgw->xbg", row, m, column)
    span = (high - low).clamp(min=1e-12)  # a constant map predicts nothing
    total = torch.einsum("bghw,h,w->bg", m, rows.table.sum(0), columns.table.sum(0))
    p = (total - size[0] * size[1] * low) / span
    both = (torch.einsum("bghw,bghw->bg", m, marked) - count * low) / span
    dice = 1 - (2 * both.sum(1) + 1) / (p.sum(1) + count.sum(1) + 1)
    return dice.to(torch.promote_types(prediction.dtype, torch.float32)), match


def _prepare(
    prediction: Tensor, target: Tensor, rows: _Axis, columns: _Axis, ratio: float
) -> _Target:
    a = prediction.double()
    b = target.double()
    match = _matching(a, b, rows.table, columns.table)
    b = b.gather(1, match[..., None, None].expand_as(b))
    top = (rows.outermost @ b @ columns.outermost.T).amax((2, 3))
    # Sigmoid is monotone: its argument is compared.
    limit = (ratio * top.sigmoid()).logit()[..., None, None]
    marked = torch.zeros_like(b)
    across = columns.table.float()
    for part in rows.table.float().split(_ROWS):
        t = (part @ b.float() @ across.T >= limit.float()).float()
        marked += part.T @ (t @ across)
    corners = (rows.outermost @ a @ columns.outermost.T).flatten(2)
    at = torch.stack([corners.argmin(-1), corners.argmax(-1)])
    width = len(columns.outermost)
    # Each row of U sums to one, so the sum of U^T t is that of t.
    return _Target(
        match,
        marked,
        marked.sum((2, 3)),
        rows.outermost[at // width],
        columns.outermost[at % width],
    )


def _matching(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return (3), [B, G], solved on the CPU."""
    across = columns.T @ columns
    ga, gb = ((rows.T @ rows) @ x @ across for x in (a, b))
    norms = [(x * gx).sum((2, 3)).clamp(min=1e-24).sqrt() for x, gx in ((a, ga), (b, gb))]
    cosine = torch.einsum("bghw,bkhw->bgk", a, gb) / (norms[0][:, :, None] * norms[1][:, None])
    cost = (2 - 2 * cosine).clamp(min=0).sqrt().cpu().numpy()
    matches = [torch.from_numpy(linear_sum_assignment(one)[1]) for one in cost]
    return torch.stack(matches).to(a.device)
