"""The losses of ``mgca.py`` in plain torch: the definitions, one screen each, that the objective is
held to. They store [T, B N] and more.

``tokens`` [B, N, D], ``texts`` [T, D]; ``own`` [T, B] bool, the pictures of each text."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ovseg_kernels import philox


def object_loss(
    tokens: torch.Tensor,
    texts: torch.Tensor,
    own: torch.Tensor,
    scale: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Symmetric InfoNCE over all pairs; each text pools each picture's raw pixels by a softmax of
    its cosines with them.
    """
    p, q = F.normalize(tokens, dim=-1), F.normalize(texts, dim=-1)
    weights = (torch.einsum("bnd,td->btn", p, q) / temperature).softmax(-1)
    pooled = F.normalize(torch.einsum("btn,bnd->btd", weights, tokens), dim=-1)
    return info_nce(scale * torch.einsum("btd,td->bt", pooled, q), own)


def region_loss(
    tokens: torch.Tensor, texts: torch.Tensor, own: torch.Tensor, scale: torch.Tensor, count: int
) -> torch.Tensor:
    """The same over each text's best group of each picture."""
    units = F.normalize(region_units(tokens, clusters(tokens, count), count), dim=-1)
    return info_nce(
        scale * torch.einsum("bnd,td->btn", units, F.normalize(texts, dim=-1)).amax(-1), own
    )


def info_nce(logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Symmetric, of logits [B, T] with several positives."""
    positive = own.T.to(logits.dtype)  # [B, T]
    of_image = -(positive * logits.log_softmax(1)).sum(1) / positive.sum(1).clamp(min=1)
    of_text = -(positive * logits.log_softmax(0)).sum(0) / positive.sum(0).clamp(min=1)
    some = positive.sum(1) > 0, positive.sum(0) > 0
    return (of_image[some[0]].mean() + of_text[some[1]].mean()) / 2


def clusters(tokens: torch.Tensor, count: int, rounds: int = 3) -> torch.Tensor:
    """[B, N]: spherical k-means of each picture's pixels.

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


def region_units(tokens: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """[B, count, D]: the mean of each group; of an empty one that of all pixels."""
    rows = [
        [x[own == r].mean(0) if bool((own == r).any()) else x.mean(0) for r in range(count)]
        for x, own in zip(tokens, labels, strict=True)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def hard_negatives(
    s: torch.Tensor,
    s_positive: torch.Tensor,
    mine: torch.Tensor,
    count: int,
    sampling: str,
    skip: int,
    margin: float,
    tau: float,
    rng: torch.Tensor | None,
) -> torch.Tensor:
    """[T, count] indices into [T, B N] similarities, -1 where there are fewer; ``mine``: the pixels
    of a text's own pictures.
    """
    keys = s
    if sampling == "semi":
        least = s_positive.amin(1, keepdim=True)
        keys = s.masked_fill((s >= least) | (s < least - margin), -torch.inf)
    elif sampling == "gumbel":
        keys = s / tau + philox.gumbel(rng, tuple(s.shape)).to(s.dtype)
    elif sampling == "random":
        keys = philox.uniform(rng, tuple(s.shape)).to(s.dtype)
    keys = keys.masked_fill(mine, -torch.inf)
    order = keys.argsort(dim=1, descending=True, stable=True)[:, skip : skip + count]
    return order.masked_fill(keys.gather(1, order) == -torch.inf, -1)


def dense_loss(
    pixels: torch.Tensor,
    texts: torch.Tensor,
    own: torch.Tensor,
    scale: torch.Tensor,
    positives: int,
    negatives: int,
    *,
    sampling: str = "topk",
    skip: int = 0,
    margin: float = 0.1,
    tau: float = 0.07,
    rng: torch.Tensor | None = None,
    reduction: str = "mean_of_log",
    terms: str = "both",
) -> torch.Tensor:
    """Texts against their best pixels and hard negatives, and those pixels against all texts.

    Every text has a picture.
    """
    (B, N, D), q = pixels.shape, F.normalize(texts, dim=-1)
    x = F.normalize(pixels, dim=-1).reshape(B * N, D)
    s = q @ x.T
    mine = own.repeat_interleave(N, 1)
    with torch.no_grad():
        at = s.masked_fill(~mine, -torch.inf).argsort(dim=1, descending=True, stable=True)[
            :, :positives
        ]
        there = mine.gather(1, at)  # a text may have fewer
        against = hard_negatives(
            s,
            s.gather(1, at).masked_fill(~there, torch.inf),
            mine,
            negatives,
            sampling,
            skip,
            margin,
            tau,
            rng,
        )
    z, count = scale * s.gather(1, at), there.sum(1)
    z_n = (
        (scale * s.gather(1, against.clamp(min=0)))
        .masked_fill(against < 0, -torch.inf)
        .logsumexp(1, keepdim=True)
    )
    total = s.new_zeros(())
    if terms != "pixel_to_text":
        if reduction == "mean_of_log":
            rows = ((torch.logaddexp(z, z_n) - z) * there).sum(1) / count
        else:
            z_p = z.masked_fill(~there, -torch.inf).logsumexp(1)
            rows = torch.logaddexp(z_p, z_n[:, 0]) - z_p
        total = total + rows.mean()
    if terms != "text_to_pixel":
        logits = scale * x[at] @ q.T  # [T, positives, T]
        same = own.T[at // N].to(s.dtype)
        rows = logits.logsumexp(-1) - (same * logits).sum(-1) / same.sum(-1).clamp(min=1)
        total = total + ((rows * there).sum(1) / count).mean()
    return total
