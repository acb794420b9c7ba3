"""similarity_contrastive_loss in plain torch: the definition, and its parts.

The parts answer where no kernel is built.
"""

from __future__ import annotations

import torch


def positives(similarity, image_ids=None, text_ids=None, pair_mask=None, offset=0):
    """Return [B, T] bool: pairs with equal ids, or the diagonal shifted by ``offset``.

    Left-out pairs are never positive.
    """
    if image_ids is None:
        rows = torch.arange(similarity.shape[0], device=similarity.device) + offset
        equal = rows[:, None] == torch.arange(similarity.shape[1], device=similarity.device)
    else:
        equal = image_ids[:, None] == text_ids[None, :]
    return equal if pair_mask is None else equal & pair_mask


def similarity_contrastive_loss(
    similarity, logit_scale, image_ids=None, text_ids=None, pair_mask=None
):
    """Return the loss: the definition.

    Equations (1)-(3) of ``ovseg_kernels.ops.similarity_contrastive_loss``.
    """
    z = logit_scale * similarity  # (1)
    if pair_mask is not None:
        z = z.masked_fill(~pair_mask, float("-inf"))
    positive = positives(similarity, image_ids, text_ids, pair_mask)

    def one_side(z, positive):  # (2)
        count = positive.sum(-1)
        some = count > 0
        lse = torch.where(some[:, None], z, 0).logsumexp(-1)
        terms = lse - torch.where(positive, z, 0).sum(-1) / count.clamp(min=1)
        return torch.where(some, terms, 0).sum() / some.sum().clamp(min=1)

    return (one_side(z, positive) + one_side(z.T, positive.T)) / 2  # (3)


def stats(similarity, logit_scale, image_ids, text_ids, pair_mask, offset):
    """Return the statistics of the rows [3, B] and of the columns [3, T].

    They are log-sum-exp, sum of positive logits, number of positives.
    """
    z = logit_scale * similarity
    kept = z if pair_mask is None else z.masked_fill(~pair_mask, float("-inf"))
    positive = positives(similarity, image_ids, text_ids, pair_mask, offset)
    hit = torch.where(positive, z, 0)

    def side(dim):
        return torch.stack([kept.logsumexp(dim), hit.sum(dim), positive.sum(dim).to(z.dtype)])

    return side(1), side(0)


def backward(
    grad,
    similarity,
    logit_scale,
    image_ids,
    text_ids,
    pair_mask,
    rows,
    columns,
    row_weight,
    column_weight,
    offset,
):
    """Return (d similarity, d logit_scale) by equation (4)."""
    z = logit_scale * similarity
    positive = positives(similarity, image_ids, text_ids, pair_mask, offset).to(z.dtype)

    def side(z, positive, part, weight):
        soft = torch.where(weight[:, None] != 0, (z - part[0][:, None]).exp(), 0)
        return weight[:, None] * (soft - positive / part[2].clamp(min=1)[:, None])

    dz = grad * (
        side(z, positive, rows, row_weight) + side(z.T, positive.T, columns, column_weight).T
    )
    if pair_mask is not None:
        dz, similarity = dz.masked_fill(~pair_mask, 0), similarity.masked_fill(~pair_mask, 0)
    return logit_scale * dz, (dz * similarity).sum()
