"""contrastive_loss in plain torch: the definition, and its parts for where no kernel is built."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from . import similarity_contrastive_loss as on_matrix
from .unit import unit

_ROWS = 1024  # of a block of logits


def contrastive_loss(
    image,
    text,
    logit_scale,
    logit_bias=0.0,
    image_ids=None,
    text_ids=None,
    normalize=True,
    kind="softmax",
):
    """Return the loss: the definition.

    Equations (1)-(4) of ``ovseg_kernels.ops.contrastive_loss``.
    """
    if normalize:
        image, text = unit(image), unit(text)
    if kind == "softmax":
        return on_matrix.similarity_contrastive_loss(
            image @ text.T, logit_scale, image_ids, text_ids
        )  # (1)-(3)
    z = logit_scale * image @ text.T + logit_bias
    sign = 2 * on_matrix.positives(z, image_ids, text_ids).to(z.dtype) - 1
    return -F.logsigmoid(sign * z).sum() / max(1, z.shape[0])  # (4)


def _blocks(image, text, logit_scale, logit_bias, image_ids, text_ids, offset):
    """Yield (rows, similarity, logits, positives) of a block of images after the other."""
    for first in range(0, image.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        s = image[rows] @ text.T
        own_ids = None if image_ids is None else image_ids[rows]
        yield (
            rows,
            s,
            logit_scale * s + logit_bias,
            on_matrix.positives(s, own_ids, text_ids, offset=offset + first),
        )


def stats(image, text, logit_scale, logit_bias, image_ids, text_ids, offset, sigmoid, tf32):
    """Return the statistics of the rows [3, B] and of the columns [3, T].

    They are log-sum-exp (sigmoid: loss, and zero), sum of positive logits, number of positives.
    """
    B, T = image.shape[0], text.shape[0]
    rows, columns = image.new_zeros(3, B), image.new_zeros(3, T)
    columns[0] = 0 if sigmoid else -torch.inf
    if T == 0 and not sigmoid:
        rows[0] = -torch.inf
    rows[2] = float(sigmoid)
    for part, _, z, positive in _blocks(
        image, text, logit_scale, logit_bias, image_ids, text_ids, offset
    ):
        if sigmoid:
            rows[0, part] = F.softplus(torch.where(positive, -z, z)).sum(1)
            continue
        hit = torch.where(positive, z, 0)
        rows[:, part] = torch.stack([z.logsumexp(1), hit.sum(1), positive.sum(1).to(z.dtype)])
        columns[0] = torch.logaddexp(columns[0], z.logsumexp(0))
        columns[1] += hit.sum(0)
        columns[2] += positive.sum(0)
    return rows, columns


def backward(
    grad,
    image,
    text,
    logit_scale,
    logit_bias,
    image_ids,
    text_ids,
    rows,
    columns,
    row_weight,
    column_weight,
    offset,
    sigmoid,
    tf32,
    need_image,
    need_text,
):
    """Return (d image, d text, d logit_scale, d logit_bias) by equations (5) and (6)."""
    d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)
    d_scale, d_bias = image.new_zeros(()), image.new_zeros(())
    for part, s, z, positive in _blocks(
        image, text, logit_scale, logit_bias, image_ids, text_ids, offset
    ):
        weight = row_weight[part, None]
        if sigmoid:
            dz = grad * weight * (z.sigmoid() - positive.to(z.dtype))  # (6)
        else:  # (5)
            shares = weight / rows[2, part, None].clamp(min=1) + column_weight / columns[2].clamp(
                min=1
            )
            soft = weight * (z - rows[0, part, None]).exp() + column_weight * (z - columns[0]).exp()
            dz = grad * (soft - torch.where(positive, shares, 0))
        d_scale, d_bias = d_scale + (dz * s).sum(), d_bias + dz.sum()
        d_image[part] = logit_scale * dz @ text
        d_text += logit_scale * dz.T @ image[part]
    return (
        d_image if need_image else d_image[:0],
        d_text if need_text else d_text[:0],
        d_scale,
        d_bias,
    )
