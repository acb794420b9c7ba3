"""Semantic units: the pixels of a picture in groups, by their features alone.

Deterministic, nothing random, nothing read from a GPU.

``cluster``: a fixed number of groups, spherical k-means. Seeds: the pixel most like the mean, then
    each time the one least like the seeds
so far; ties go to the smaller index.

``merge``: as many groups as the picture has. All pixels begin as units; units that touch (4
    neighbours) have the average link

    link(a, b) = mean over x in a, y in b of cos(x, y) = m_a . m_b        m the means of unit vectors                (1)

and in each round every two units that are each other's best link, theta at least, become one; ties
go to the smaller index. No matrix [N, N] exists: (1) is a product of means.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .tensors import at_least_float32


@torch.no_grad()
def cluster(x: torch.Tensor, count: int, rounds: int = 3) -> torch.Tensor:
    """[B, N] int64 in 0 .. count - 1, the group of each of the pixels ``x`` [B, N, D]; groups may
    be empty.
    """
    x = at_least_float32(x)
    inverse = 1 / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    centers = F.normalize((inverse.transpose(1, 2) @ x), dim=-1)  # [B, 1, D]
    at = (x @ centers.transpose(1, 2) * inverse).argmax(1, keepdim=True)
    found, nearest = [], torch.full_like(inverse, -torch.inf)
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
    x: torch.Tensor,
    grid: tuple[int, int],
    theta: float | None = None,
    *,
    quantile: float = 0.5,
    rounds: int = 64,
) -> torch.Tensor:
    """[B, N] int64, the unit of each of the pixels ``x`` [B, N, D], row-major over ``grid``: the
    index of its first pixel.

    Args:
        theta: least link, a cosine; None: the ``quantile`` of the links of neighbouring pixels, for
            each picture by itself.
        rounds: at most; on a CPU it ends when nothing is left to do.
    """
    B, N, _ = x.shape
    sums, count = F.normalize(at_least_float32(x), dim=-1), x.new_ones(B, N, dtype=torch.float32)
    index = torch.arange(N, device=x.device).view(grid)
    edges = [
        torch.stack(pair).flatten(1)
        for pair in ((index[:, :-1], index[:, 1:]), (index[:-1], index[1:]))
    ]
    a, b = torch.cat(edges, 1)
    labels = index.flatten().expand(B, -1)
    if not len(a):
        return labels.clone()
    limit: torch.Tensor | None = None
    for _ in range(rounds):
        low, high = (
            torch.minimum(labels[:, a], labels[:, b]),
            torch.maximum(labels[:, a], labels[:, b]),
        )
        means = sums / count.clamp(min=1)[..., None].to(sums.dtype)
        link = (_rows(means, low) * _rows(means, high)).sum(-1)
        if limit is None:
            place = min(len(a) - 1, max(0, round(quantile * (len(a) - 1))))
            limit = (
                link.sort(1).values[:, place, None]
                if theta is None
                else torch.full_like(link[:, :1], theta)
            )
        link = link.masked_fill((low == high) | (link < limit), -torch.inf)
        best = (
            torch.full_like(sums[..., 0], -torch.inf)
            .scatter_reduce(1, low, link, "amax")
            .scatter_reduce(1, high, link, "amax")
        )
        partner = torch.full_like(labels, N)
        for own, other in ((low, high), (high, low)):
            wanted = torch.where((link == best.gather(1, own)) & (link > -torch.inf), other, N)
            partner = partner.scatter_reduce(1, own, wanted, "amin")
        here = index.flatten().expand(B, -1)
        mutual = (partner < here) & (partner.gather(1, partner.clamp(max=N - 1)) == here)
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(mutual.any()):
            break
        to = torch.where(mutual, partner, here)
        sums = torch.zeros_like(sums).scatter_add(1, to[..., None].expand_as(sums), sums)
        count = torch.zeros_like(count).scatter_add(1, to, count)
        labels = to.gather(1, labels)
    return labels.clone()


def mean_weights(labels: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, N, count] of the group of each pixel [B, N]: columns that sum to 1, over a group's
    pixels, or over all where it is empty.
    """
    weights = F.one_hot(labels, count).to(dtype)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
    return weights / weights.sum(1, keepdim=True)


@torch.no_grad()
def unit_tokens(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, N, D], for each pixel the mean of the unit vectors of its unit; ``labels`` [B, N] in 0 ..

    N - 1.
    """
    unit = F.normalize(at_least_float32(x), dim=-1)
    sums = torch.zeros_like(unit).scatter_add(1, labels[..., None].expand_as(unit), unit)
    count = torch.zeros_like(unit[..., 0]).scatter_add(1, labels, torch.ones_like(unit[..., 0]))
    return _rows(sums / count.clamp(min=1)[..., None], labels)


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[B, K, D] of [B, N, D] by [B, K]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
