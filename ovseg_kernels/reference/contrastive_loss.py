"""contrastive_loss in plain torch: the definition, and its parts for where no kernel is built."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from . import similarity_contrastive_loss as on_matrix
from .unit import EPS, length, unit

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
    positives=None,
    positive_weights=None,
):
    """Return the loss: the definition.

    Equations (1)-(4) of ``ovseg_kernels.ops.contrastive_loss``.
    """
    if normalize:
        image, text = unit(image), unit(text)
    if kind == "softmax" and positives is None:
        return on_matrix.similarity_contrastive_loss(
            image @ text.T, logit_scale, image_ids, text_ids
        )  # (1)-(3)
    z = logit_scale * image @ text.T + logit_bias
    if positives is None:
        p = on_matrix.positives(z, image_ids, text_ids).to(z.dtype)
    else:
        p = dense(positives[:, 0], positives[:, 1], positive_weights, z)

    def one_side(z, p):
        total = p.sum(-1)
        some = has_positives(total)
        hits = torch.where(p != 0, p * z, 0).sum(-1)
        lse = torch.where(some[:, None], z, 0).logsumexp(-1)
        terms = torch.where(some, lse - hits / or_one(total), 0)
        return terms.sum() / some.sum().clamp(min=1)

    if kind == "softmax":
        return (one_side(z, p) + one_side(z.T, p.T)) / 2  # (3)
    return sigmoid_terms(z, p).sum() / max(1, z.shape[0])  # (4)


def dense(rows, columns, weights, like):
    """Return p [B, T] of ``like``'s shape: the sum of the weights of each listed pair.

    Pairs that lie outside are left out; without weights each counts 1.
    """
    if weights is None:
        weights = like.new_ones(rows.shape)
    B, T = like.shape
    inside = (rows >= 0) & (rows < B) & (columns >= 0) & (columns < T)
    place = torch.where(inside, rows * T + columns, B * T)
    weights = weights.detach().to(like.dtype)
    return like.new_zeros(B * T + 1).index_add(0, place, weights)[:-1].view(B, T)


def has_positives(total):
    """Return whether a sum of weights is one: a NaN is, so that it reaches the loss."""
    return ~(total <= 0)


def or_one(total):
    """Return what a row is divided by: 1 in place of no weight at all."""
    return torch.where(total > 0, total, 1)


def sigmoid_terms(z, p):
    """Return softplus(z) - p z of (4), with p = 1 as softplus(-z), which cancels nothing."""
    whole = p >= 1
    return F.softplus(torch.where(whole, -z, z)) - torch.where(~whole & (p != 0), p * z, 0)


def _blocks(image, text, logit_scale, logit_bias, image_ids, text_ids, pair_weights, offset):
    """Yield (rows, similarity, logits, p) of a block of images after the other."""
    B = image.shape[0]
    if pair_weights is not None:  # a list, as ``ops`` sorts it
        starts = image_ids[: B + 1]
        columns = image_ids[B + 1 :]
        places = torch.arange(len(columns), device=image.device)
        own = torch.searchsorted(starts[1:].contiguous(), places, right=True)
    for first in range(0, B, _ROWS):
        rows = slice(first, first + _ROWS)
        s = image[rows] @ text.T
        if pair_weights is not None:
            p = dense(own - first, columns, pair_weights[0], s)
        else:
            own_ids = None if image_ids is None else image_ids[rows]
            p = on_matrix.positives(s, own_ids, text_ids, offset=offset + first).to(s.dtype)
        yield rows, s, logit_scale * s + logit_bias, p


def _features(image, text, like, normalize):
    """Return both in the dtype of ``like``, as unit vectors where ``normalize`` says so."""
    image, text = image.to(like.dtype), text.to(like.dtype)
    return (unit(image), unit(text)) if normalize else (image, text)


def _through_unit(x, d_unit):
    """Return the gradient of ``x`` from that of its unit vector."""
    wide = x.to(d_unit.dtype)
    size = length(wide)[:, None]
    u = unit(wide)
    along = torch.where(size > EPS, (d_unit * u).sum(1, keepdim=True), 0)
    return ((d_unit - along * u) / size.clamp_min(EPS)).to(x.dtype)


def stats(
    image,
    text,
    logit_scale,
    logit_bias,
    image_ids,
    text_ids,
    pair_weights,
    offset,
    sigmoid,
    tf32,
    normalize,
):
    """Return the statistics of the rows [3, B] and of the columns [3, T].

    They are log-sum-exp (sigmoid: loss, and zero), sum of p z, sum of p.
    """
    B, T = image.shape[0], text.shape[0]
    image, text = _features(image, text, logit_scale, normalize)
    rows, columns = image.new_zeros(3, B), image.new_zeros(3, T)
    columns[0] = 0 if sigmoid else -torch.inf
    if T == 0 and not sigmoid:
        rows[0] = -torch.inf
    rows[2] = float(sigmoid)
    for part, _, z, p in _blocks(
        image, text, logit_scale, logit_bias, image_ids, text_ids, pair_weights, offset
    ):
        if sigmoid:
            rows[0, part] = sigmoid_terms(z, p).sum(1)
            continue
        hit = torch.where(p != 0, p * z, 0)
        rows[:, part] = torch.stack([z.logsumexp(1), hit.sum(1), p.sum(1)])
        columns[0] = torch.logaddexp(columns[0], z.logsumexp(0))
        columns[1] += hit.sum(0)
        columns[2] += p.sum(0)
    return rows, columns


def backward(
    grad,
    image,
    text,
    logit_scale,
    logit_bias,
    image_ids,
    text_ids,
    pair_weights,
    rows,
    columns,
    row_weight,
    column_weight,
    offset,
    sigmoid,
    tf32,
    normalize,
    need_image,
    need_text,
):
    """Return (d image, d text, d logit_scale, d logit_bias) by equations (5) and (6)."""
    given = image, text
    image, text = _features(image, text, logit_scale, normalize)
    d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)
    d_scale, d_bias = image.new_zeros(()), image.new_zeros(())
    for part, s, z, p in _blocks(
        image, text, logit_scale, logit_bias, image_ids, text_ids, pair_weights, offset
    ):
        weight = row_weight[part, None]
        if sigmoid:
            dz = grad * weight * (z.sigmoid() - p.clamp(max=1))  # (6)
        else:  # (5)
            shares = weight / or_one(rows[2, part, None]) + column_weight / or_one(columns[2])
            soft = weight * (z - rows[0, part, None]).exp() + column_weight * (z - columns[0]).exp()
            dz = grad * (soft - torch.where(p != 0, p * shares, 0))
        d_scale, d_bias = d_scale + (dz * s).sum(), d_bias + dz.sum()
        d_image[part] = logit_scale * dz @ text
        d_text += logit_scale * dz.T @ image[part]
    if normalize:
        d_image, d_text = _through_unit(given[0], d_image), _through_unit(given[1], d_text)
    return (
        d_image.to(given[0].dtype) if need_image else given[0].new_zeros(0, image.shape[1]),
        d_text.to(given[1].dtype) if need_text else given[1].new_zeros(0, text.shape[1]),
        d_scale,
        d_bias,
    )
