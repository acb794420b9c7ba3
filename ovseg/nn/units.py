"""Semantic units: the pixels of a picture in groups, by their features alone.

Deterministic, nothing random, nothing read from a GPU. ``cluster`` makes a fixed number of groups
by spherical k-means. Its seeds are the pixel most like the mean, then each time the one least like
the seeds so far. ``merge`` makes as many groups as the picture has: all pixels begin as units, and
units that touch (4 neighbours) have the average link

    link(a, b) = mean over x in a, y in b of cos(x, y) = m_a . m_b    m means of unit vectors    (1)

In each round every two units that are each other's best link, theta at least, become one. Ties go
to the smaller index. No matrix [N, N] exists: (1) is a product of means.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .features import Grid
from .tensors import at_least_float32


@torch.no_grad()
def cluster(x: Tensor, count: int, rounds: int = 3) -> Tensor:
    """Return the group of each of the pixels ``x`` [B, N, D], [B, N] int64 in 0 .. count - 1.

    Groups may be empty.
    """
    x = at_least_float32(x)
    inverse = 1 / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    centers = F.normalize((inverse.transpose(1, 2) @ x), dim=-1)  # [B, 1, D]
    at = (x @ centers.transpose(1, 2) * inverse).argmax(1, keepdim=True)
    found = []
    nearest = torch.full_like(inverse, -torch.inf)
    for _ in range(min(count, x.shape[1])):
        seed = F.normalize(x.gather(1, at.expand(-1, -1, x.shape[2])), dim=-1)
        found.append(seed)
        nearest = torch.maximum(nearest, x @ seed.transpose(1, 2) * inverse)
        at = nearest.argmin(1, keepdim=True)
    centers = torch.cat(found, 1)
    for _ in range(rounds):
        labels = (x @ centers.transpose(1, 2)).argmax(-1)
        weights = F.one_hot(labels, centers.shape[1]).to(x.dtype) * inverse
        sums = weights.transpose(1, 2) @ x
        centers = torch.where(
            sums.square().sum(-1, keepdim=True) > 0, F.normalize(sums, dim=-1), centers
        )
    return (x @ centers.transpose(1, 2)).argmax(-1)


@torch.no_grad()
def merge(
    x: Tensor, grid: Grid, theta: float | None = None, *, quantile: float = 0.5, rounds: int = 64
) -> Tensor:
    """Return the unit of each pixel, [B, N] int64: the index of the unit's first pixel.

    Args:
        x: pixels [B, N, D], row-major over ``grid``.
        grid: (h, w).
        theta: least link, a cosine; None: the ``quantile`` of the links of neighbouring pixels, for
            each picture by itself.
        quantile: 0 to 1, where ``theta`` is None.
        rounds: at most; on a CPU it ends when nothing is left to do.
    """
    B, N, _ = x.shape
    sums = F.normalize(at_least_float32(x), dim=-1)
    count = x.new_ones(B, N, dtype=torch.float32)
    index = torch.arange(N, device=x.device).view(grid)
    here = index.flatten().expand(B, -1)
    across = torch.stack((index[:, :-1], index[:, 1:])).flatten(1)
    down = torch.stack((index[:-1], index[1:])).flatten(1)
    a, b = torch.cat((across, down), 1)
    labels = here
    if not len(a):
        return labels.clone()
    limit: Tensor | None = None
    for _ in range(rounds):
        low = torch.minimum(labels[:, a], labels[:, b])
        high = torch.maximum(labels[:, a], labels[:, b])
        means = sums / count.clamp(min=1)[..., None].to(sums.dtype)
        link = (_rows(means, low) * _rows(means, high)).sum(-1)
        if limit is None and theta is None:
            place = min(len(a) - 1, max(0, round(quantile * (len(a) - 1))))
            limit = link.sort(1).values[:, place, None]
        elif limit is None:
            limit = torch.full_like(link[:, :1], theta)
        link = link.masked_fill((low == high) | (link < limit), -torch.inf)
        partner = _best(low, high, link, N)
        mutual = (partner < here) & (partner.gather(1, partner.clamp(max=N - 1)) == here)
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(mutual.any()):
            break
        to = torch.where(mutual, partner, here)
        sums = torch.zeros_like(sums).scatter_add(1, to[..., None].expand_as(sums), sums)
        count = torch.zeros_like(count).scatter_add(1, to, count)
        labels = to.gather(1, labels)
    return labels.clone()


def _best(low: Tensor, high: Tensor, link: Tensor, N: int) -> Tensor:
    """Return the unit that each of N units has its best link with, [B, N]; N where it has none.

    ``low`` and ``high`` [B, K] are the units of each link, -inf where it does not count.
    """
    best = link.new_full((len(link), N), -torch.inf)
    best = best.scatter_reduce(1, low, link, "amax").scatter_reduce(1, high, link, "amax")
    partner = torch.full_like(best, N, dtype=low.dtype)
    for own, other in ((low, high), (high, low)):
        wanted = torch.where((link == best.gather(1, own)) & (link > -torch.inf), other, N)
        partner = partner.scatter_reduce(1, own, wanted, "amin")
    return partner


def mean_weights(labels: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return weights [B, N, count] that take means over the groups of pixels.

    Each column sums to 1, over a group's pixels, or over all where it is empty.

    Args:
        labels: [B, N], the group of each pixel.
        count: how many groups there are.
        dtype: of the weights.
    """
    weights = F.one_hot(labels, count).to(dtype)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
    return weights / weights.sum(1, keepdim=True)


@torch.no_grad()
def unit_tokens(x: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of the unit vectors of each pixel's unit, [B, N, D].

    Args:
        x: pixels [B, N, D].
        labels: [B, N] in 0 .. N - 1, the unit of each.
    """
    unit = F.normalize(at_least_float32(x), dim=-1)
    sums = torch.zeros_like(unit).scatter_add(1, labels[..., None].expand_as(unit), unit)
    count = torch.zeros_like(unit[..., 0]).scatter_add(1, labels, torch.ones_like(unit[..., 0]))
    return _rows(sums / count.clamp(min=1)[..., None], labels)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows [B, K, D] of [B, N, D] that ``index`` [B, K] names."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
