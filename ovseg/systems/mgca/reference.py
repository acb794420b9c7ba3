"""The losses of MGCA's objective in plain torch: the definitions that it is held to.

They are a screen each and store [T, B N] and more. ``tokens`` are [B, N, D], ``texts`` [T, D];
``own`` [T, B] bool says which pictures are each text's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ovseg_kernels import philox

from .objective import MGCATraining


def object_loss(
    tokens: Tensor, texts: Tensor, own: Tensor, scale: Tensor, temperature: float
) -> Tensor:
    """Return symmetric InfoNCE over all pairs.

    Each text pools each picture's raw pixels by a softmax of its cosines with them.
    """
    p = F.normalize(tokens, dim=-1)
    q = F.normalize(texts, dim=-1)
    weights = (torch.einsum("bnd,td->btn", p, q) / temperature).softmax(-1)
    pooled = F.normalize(torch.einsum("btn,bnd->btd", weights, tokens), dim=-1)
    return info_nce(scale * torch.einsum("btd,td->bt", pooled, q), own)


def region_loss(tokens: Tensor, texts: Tensor, own: Tensor, scale: Tensor, count: int) -> Tensor:
    """Return symmetric InfoNCE over each text's best of ``count`` groups of each picture."""
    units = F.normalize(region_units(tokens, clusters(tokens, count), count), dim=-1)
    cosines = torch.einsum("bnd,td->btn", units, F.normalize(texts, dim=-1))
    return info_nce(scale * cosines.amax(-1), own)


def info_nce(logits: Tensor, own: Tensor) -> Tensor:
    """Return symmetric InfoNCE of logits [B, T] with several positives."""
    positive = own.T.to(logits.dtype)  # [B, T]
    of_image = -(positive * logits.log_softmax(1)).sum(1) / positive.sum(1).clamp(min=1)
    of_text = -(positive * logits.log_softmax(0)).sum(0) / positive.sum(0).clamp(min=1)
    of_image = of_image[positive.sum(1) > 0]
    of_text = of_text[positive.sum(0) > 0]
    return (of_image.mean() + of_text.mean()) / 2


def clusters(tokens: Tensor, count: int, rounds: int = 3) -> Tensor:
    """Return the group of each pixel, [B, N], by spherical k-means of each picture's pixels.

    The first seed is the pixel most like the mean, each other the one least like the seeds before
    it.
    """
    found = []
    for x in F.normalize(tokens.detach(), dim=-1):
        seeds = [int((x @ F.normalize(x.sum(0), dim=0)).argmax())]
        while len(seeds) < min(count, len(x)):
            seeds.append(int((x @ x[seeds].T).amax(1).argmin()))
        centers = x[seeds].clone()
        for _ in range(rounds):
            labels = (x @ centers.T).argmax(1)
            for r in labels.unique():
                centers[r] = F.normalize(x[labels == r].sum(0), dim=0)
        found.append((x @ centers.T).argmax(1))
    return torch.stack(found)


def region_units(tokens: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the mean of each group, [B, count, D]; of an empty one that of all pixels."""
    rows = [
        [x[own == r].mean(0) if bool((own == r).any()) else x.mean(0) for r in range(count)]
        for x, own in zip(tokens, labels, strict=True)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def hard_negatives(
    s: Tensor, s_positive: Tensor, mine: Tensor, o: MGCATraining, rng: Tensor | None
) -> Tensor:
    """Return indices [T, negatives] into [T, B N] similarities, -1 where there are fewer.

    Args:
        s: [T, B N] cosines.
        s_positive: [T, positives] of them, those of the positives.
        mine: [T, B N] bool, the pixels of a text's own pictures.
        o: says how many, and how they are sampled.
        rng: [seed, offset] of the noise.
    """
    keys = s
    if o.sampling == "semi":
        least = s_positive.amin(1, keepdim=True)
        keys = s.masked_fill((s >= least) | (s < least - o.margin), -torch.inf)
    elif o.sampling == "gumbel":
        keys = s / o.sampling_temperature + philox.gumbel(rng, tuple(s.shape)).to(s.dtype)
    elif o.sampling == "random":
        keys = philox.uniform(rng, tuple(s.shape)).to(s.dtype)
    keys = keys.masked_fill(mine, -torch.inf)
    order = keys.argsort(dim=1, descending=True, stable=True)[:, o.skip : o.skip + o.negatives]
    return order.masked_fill(keys.gather(1, order) == -torch.inf, -1)


def dense_loss(
    pixels: Tensor,
    texts: Tensor,
    own: Tensor,
    scale: Tensor,
    o: MGCATraining,
    rng: Tensor | None = None,
) -> Tensor:
    """Return texts against their best pixels and hard negatives, and those against all texts.

    Every text has a picture.
    """
    B, N, D = pixels.shape
    q = F.normalize(texts, dim=-1)
    x = F.normalize(pixels, dim=-1).reshape(B * N, D)
    s = q @ x.T
    mine = own.repeat_interleave(N, 1)
    with torch.no_grad():
        found = s.masked_fill(~mine, -torch.inf).argsort(dim=1, descending=True, stable=True)
        at = found[:, : o.positives]
        there = mine.gather(1, at)  # a text may have fewer
        s_positive = s.gather(1, at).masked_fill(~there, torch.inf)
        against = hard_negatives(s, s_positive, mine, o, rng)
    z = scale * s.gather(1, at)
    count = there.sum(1)
    z_n = (scale * s.gather(1, against.clamp(min=0))).masked_fill(against < 0, -torch.inf)
    z_n = z_n.logsumexp(1, keepdim=True)
    total = s.new_zeros(())
    if o.terms != "pixel_to_text":
        if o.reduction == "mean_of_log":
            rows = ((torch.logaddexp(z, z_n) - z) * there).sum(1) / count
        else:
            z_p = z.masked_fill(~there, -torch.inf).logsumexp(1)
            rows = torch.logaddexp(z_p, z_n[:, 0]) - z_p
        total = total + rows.mean()
    if o.terms != "text_to_pixel":
        logits = scale * x[at] @ q.T  # [T, positives, T]
        same = own.T[at // N].to(s.dtype)
        rows = logits.logsumexp(-1) - (same * logits).sum(-1) / same.sum(-1).clamp(min=1)
        total = total + ((rows * there).sum(1) / count).mean()
    return total
