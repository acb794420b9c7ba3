"""OVSegmentor's cross-image mask consistency, without a map at full size. Xu et al., arXiv:2301.09121.

Prediction M_1 and target M_2 [B, G, h, w] are maps of groups on one picture. With U the bilinear upsampling (align_corners True) to H x W:

    p_g = (U M_1g - min) / (max - min)          t_g = [sigmoid(U M_2g) >= ratio max sigmoid(U M_2g)]              (1)
    permutation of M_2's groups: least sum of |U M_1g / |U M_1g| - U M_2k / |U M_2k||, by Hungarian matching      (2)
    d_b = 1 - (2 sum_gp p t + 1) / (sum_gp p + sum_gp t + 1)                                                      (3)

No map [B, G, H, W] is needed: U is linear, so sums of U M_1 are products of M_1 with small tables,

    sum_p U M = <M, U^T 1>      sum_p (U M) t = <M, U^T t>      <U M, U M'> = <M, (U^T U) M'>                     (4)

an extreme of a bilinear map lies at an outermost sample of a cell, 2 (h - 1) of the H rows, and U^T t is made a few rows at a time. What is
kept for backward has the size of M.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment

from ..errors import InputError

_ROWS = 4  # of the upsampled target at a time


def mask_consistency(prediction: torch.Tensor, target: torch.Tensor, size: tuple[int, int],
                     ratio: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    """((3), one number a picture [B]; (2) [B, G] int64, the target's group for each of the prediction's).

    Args:
        prediction: M_1 [B, G, h, w]; gets a gradient.
        target: M_2, of the same shape.
        size: (H, W), at least h and w.
        ratio: of (1), 0 .. 1.
    """
    if prediction.shape != target.shape or prediction.dim() != 4:
        raise InputError(f"prediction and target have shapes {list(prediction.shape)} and {list(target.shape)}; expected one [B, G, h, w]")
    if size[0] < prediction.shape[2] or size[1] < prediction.shape[3]:
        raise InputError(f"size is {tuple(size)} and the maps are {tuple(prediction.shape[2:])}; expected at least as much")
    # Sums over 50 000 pixels, differences of large numbers: double precision costs nothing at the size of these maps.
    kind = {"dtype": torch.float64, "device": prediction.device}
    rows, columns = (upsampling(n, N, **kind) for n, N in zip(prediction.shape[2:], size, strict=True))
    with torch.no_grad():
        match = matching(prediction, target, rows, columns)
        marked, count = marked_samples(target, rows, columns, ratio)
        marked, count = marked.gather(1, match[..., None, None].expand_as(marked)), count.gather(1, match)
    m = prediction.double()
    low, high = extremes(m, rows, columns)
    span = (high - low).clamp(min=1e-12)  # a constant map predicts nothing
    total = (m * (rows.sum(0)[:, None] * columns.sum(0))).sum((2, 3))
    p = (total - size[0] * size[1] * low) / span
    both = ((m * marked).sum((2, 3)) - count * low) / span
    dice = 1 - (2 * both.sum(1) + 1) / (p.sum(1) + count.sum(1) + 1)
    return dice.to(torch.promote_types(prediction.dtype, torch.float32)), match


def upsampling(samples: int, outputs: int, **kind) -> torch.Tensor:
    """[outputs, samples]: one axis of U."""
    at = torch.arange(outputs, **kind) * ((samples - 1) / max(1, outputs - 1))
    return (1 - (at[:, None] - torch.arange(samples, **kind)).abs()).clamp(min=0)


def outermost(table: torch.Tensor) -> torch.Tensor:
    """The rows of an axis of U that are first or last in their cell."""
    outputs, samples = table.shape
    # In integers: a row's cell is floor(row (samples - 1) / (outputs - 1)).
    cell = [min(row * (samples - 1) // max(1, outputs - 1), max(0, samples - 2)) for row in range(outputs)]
    kept = [row for row in range(outputs) if row in (0, outputs - 1) or cell[row] != cell[row - 1] or cell[row] != cell[row + 1]]
    return table[kept]


def extremes(maps: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest pixel [B, G] of upsampled maps, with their gradient."""
    samples = (outermost(rows) @ maps @ outermost(columns).T).flatten(2)
    return samples.min(-1).values, samples.max(-1).values


def marked_samples(maps: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(U^T t [B, G, h, w], sum of t [B, G]) of (1)."""
    m = maps.to(torch.promote_types(maps.dtype, torch.float32))
    top = extremes(m.double(), rows, columns)[1]
    limit = (ratio * top.sigmoid()).logit().to(m.dtype)[..., None, None]  # sigmoid is monotone: its argument is compared
    across, down = columns.to(m.dtype), rows.to(m.dtype)
    marked = torch.zeros_like(maps, dtype=torch.float64)
    for start in range(0, len(down), _ROWS):
        part = down[start : start + _ROWS]
        t = (part @ m @ across.T >= limit).to(m.dtype)
        marked += (part.T @ (t @ across)).double()
    return marked, marked.sum((2, 3))  # each row of U sums to one


def matching(prediction: torch.Tensor, target: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(2): [B, G], computed on the CPU for all pictures at once."""
    gram = (rows.T @ rows), (columns.T @ columns)
    a, b = prediction.double(), target.double()
    ga, gb = (gram[0] @ x @ gram[1] for x in (a, b))
    norms = [(x * gx).sum((2, 3)).clamp(min=1e-24).sqrt() for x, gx in ((a, ga), (b, gb))]
    cosine = torch.einsum("bghw,bkhw->bgk", a, gb) / (norms[0][:, :, None] * norms[1][:, None])
    cost = (2 - 2 * cosine).clamp(min=0).sqrt().cpu().numpy()
    found = [torch.from_numpy(linear_sum_assignment(one)[1]) for one in cost]
    return torch.stack(found).to(prediction.device) if found else torch.zeros(0, a.shape[1], dtype=torch.int64, device=a.device)
