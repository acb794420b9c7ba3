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


def weights(similarity, image_ids, text_ids, pair_mask, given, offset=0):
    """Return p [B, T], bool or in the dtype of ``similarity``: ``given``, or :func:`positives`.

    That of a left-out pair is zero.
    """
    if given is None:
        return positives(similarity, image_ids, text_ids, pair_mask, offset)
    return given if pair_mask is None else given.masked_fill(~pair_mask, 0)


def attraction(p, z):
    """Return p z; 0 where p is, even if z is infinite or NaN."""
    return torch.where(p != 0, p * z, 0)


def similarity_contrastive_loss(
    similarity, logit_scale, image_ids=None, text_ids=None, pair_mask=None, given=None
):
    """Return the loss: the definition.

    Equations (1)-(3) of ``ovseg_kernels.ops.similarity_contrastive_loss``.
    """
    z = logit_scale * similarity  # (1)
    if pair_mask is not None:
        z = z.masked_fill(~pair_mask, float("-inf"))
    p = weights(similarity, image_ids, text_ids, pair_mask, given)

    def one_side(z, p):  # (2)
        total = p.sum(-1)
        some = total != 0
        lse = torch.where(some[:, None], z, 0).logsumexp(-1)
        terms = lse - attraction(p, z).sum(-1) / torch.where(some, total, 1)
        return torch.where(some, terms, 0).sum() / some.sum().clamp(min=1)

    return (one_side(z, p) + one_side(z.T, p.T)) / 2  # (3)


def stats(similarity, logit_scale, image_ids, text_ids, pair_mask, given, offset):
    """Return the statistics of the rows [3, B] and of the columns [3, T].

    They are log-sum-exp, weighted sum of positive logits, sum of their weights.
    """
    z = logit_scale * similarity
    kept = z if pair_mask is None else z.masked_fill(~pair_mask, float("-inf"))
    p = weights(similarity, image_ids, text_ids, pair_mask, given, offset)
    hit = attraction(p, z)

    def side(dim):
        return torch.stack([kept.logsumexp(dim), hit.sum(dim), p.sum(dim).to(z.dtype)])

    return side(1), side(0)


def backward(
    grad,
    similarity,
    logit_scale,
    image_ids,
    text_ids,
    pair_mask,
    given,
    rows,
    columns,
    row_weight,
    column_weight,
    offset,
):
    """Return (d similarity, d logit_scale) by equation (4)."""
    z = logit_scale * similarity
    p = weights(similarity, image_ids, text_ids, pair_mask, given, offset).to(z.dtype)

    def side(z, p, part, weight):
        total = torch.where(part[2] != 0, part[2], 1)
        soft = torch.where(weight[:, None] != 0, (z - part[0][:, None]).exp(), 0)
        return weight[:, None] * (soft - p / total[:, None])

    dz = grad * (side(z, p, rows, row_weight) + side(z.T, p.T, columns, column_weight).T)
    if pair_mask is not None:
        dz, similarity = dz.masked_fill(~pair_mask, 0), similarity.masked_fill(~pair_mask, 0)
    return logit_scale * dz, (dz * similarity).sum()
