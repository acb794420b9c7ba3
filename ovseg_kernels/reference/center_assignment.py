"""center_assignment in plain torch: the definition, and its closed form.

The closed form answers where no kernel is built.
"""

from __future__ import annotations

import torch

from .. import philox
from .patch_text_similarity import accumulation_dtype

NORMALIZERS = ("mean", "mean_plus_one", "sum")


def gumbel(queries, keys, noise, rng):
    """Return noise [B, G, L] in the accumulation dtype, or None.

    It is explicit noise, or Philox over the elements of [B, L, G].
    """
    if noise is not None:
        return noise.to(accumulation_dtype(queries))
    if rng is None:
        return None
    B, G, L = queries.shape[0], queries.shape[1], keys.shape[1]
    return philox.gumbel(rng, (B, L, G)).transpose(1, 2).to(accumulation_dtype(queries))


def _scores(queries, keys, center_bias, key_scale, mask, scale):
    """Return z and q . k, [B, G, L], keep [B, 1, L] and the keys.

    What a masked token holds reaches nothing.
    """
    acc = accumulation_dtype(queries)
    keep = torch.ones_like(keys[..., 0], dtype=torch.bool) if mask is None else mask
    k = keys.to(acc).masked_fill(~keep[..., None], 0)
    raw = queries.to(acc) @ k.transpose(1, 2)
    z = (
        scale * raw if key_scale is None else scale * key_scale.masked_fill(~keep, 0)[:, None] * raw
    )  # (1)
    return z if center_bias is None else z + center_bias[..., None], raw, keep[:, None], k


def _nan_or_zero(x):
    """Return NaN where ``x`` is not finite, and 0 elsewhere."""
    return x - x


def divisor(count, normalizer):
    """Return n_g of (4)."""
    # Not clamp: at one token its gradient is 0 in newer releases of torch and 1 in older ones. Here
    # it is 1.
    return {
        "mean": torch.where(count < 1, 1, count),
        "mean_plus_one": count + 1,
        "sum": torch.ones_like(count),
    }[normalizer]


def center_assignment(
    queries,
    keys,
    values,
    scale=1.0,
    tau=1.0,
    noise=None,
    hard=True,
    normalizer="mean_plus_one",
    mask=None,
    center_bias=None,
    key_scale=None,
):
    """Return (pooled, index, c, soft): the definition.

    Equations (1)-(5) of ``ovseg_kernels.ops.center_assignment``.
    """
    z, _, keep, _ = _scores(queries, keys, center_bias, key_scale, mask, scale)
    v = values.to(z.dtype).masked_fill(~keep.transpose(1, 2), 0)
    y = (z if noise is None else z + noise) / tau
    s = y.softmax(1).masked_fill(~keep, 0)  # (2)
    index = y.argmax(1)
    a = s
    if hard:  # (3)
        one_hot = torch.zeros_like(s).scatter_(1, index[:, None], 1.0).masked_fill(~keep, 0)
        a = one_hot + (s - s.detach())  # in this order exactly 0 or 1
    count = a.sum(-1, keepdim=True)
    pooled = a @ v / divisor(count, normalizer)  # (4), (5)
    return (
        pooled,
        index.masked_fill(~keep[:, 0], -1),
        count[..., 0],
        z.softmax(1).masked_fill(~keep, 0),
    )


def forward(
    queries,
    keys,
    values,
    center_bias,
    key_scale,
    mask,
    noise,
    rng,
    scale,
    tau,
    hard,
    normalizer,
    want_soft,
):
    """Return (pooled, index, count, soft) as the kernels give them.

    ``normalizer`` 0 mean, 1 mean_plus_one, 2 sum.
    """
    z, _, keep, _ = _scores(queries, keys, center_bias, key_scale, mask, scale)
    v = values.to(z.dtype).masked_fill(~keep.transpose(1, 2), 0)
    g = gumbel(queries, keys, noise, rng)
    y = (z if g is None else z + g) / tau
    index = y.argmax(1)
    one_hot = torch.zeros_like(z).scatter_(1, index[:, None], 1.0)
    # NaN stays NaN, as straight through.
    a = one_hot + _nan_or_zero(y.amax(1, keepdim=True)) if hard else y.softmax(1)
    a = a.masked_fill(~keep, 0)
    count = a.sum(-1)
    n = (torch.where(count < 1, 1, count), count + 1, torch.ones_like(count))[normalizer]
    soft = z.softmax(1).masked_fill(~keep, 0) if want_soft else z.new_empty(0, *z.shape[1:])
    return (a @ v) / n[..., None], index.masked_fill(~keep[:, 0], -1), count, soft


def backward(
    grad,
    grad_count,
    grad_soft,
    queries,
    keys,
    values,
    center_bias,
    key_scale,
    mask,
    noise,
    rng,
    pooled,
    index,
    count,
    scale,
    tau,
    hard,
    normalizer,
    need_queries,
    need_keys,
    need_values,
    shared,
):
    """Return (d queries, d keys, d values, d center_bias, d key_scale) by equations (6)-(10)."""
    z, raw, keep, k = _scores(queries, keys, center_bias, key_scale, mask, scale)
    v = values.to(z.dtype).masked_fill(~keep.transpose(1, 2), 0)
    g = gumbel(queries, keys, noise, rng)
    s = ((z if g is None else z + g) / tau).softmax(1).masked_fill(~keep, 0)
    n = (torch.where(count < 1, 1, count), count + 1, torch.ones_like(count))[normalizer][..., None]
    rho = (pooled * grad).sum(-1, keepdim=True)
    if normalizer == 0:
        rho = torch.where(count[..., None] < 1, 0, rho)
    ds = (grad @ v.transpose(1, 2) - (0 if normalizer == 2 else rho)) / n  # (6)
    if grad_count is not None:
        ds = ds + grad_count[..., None]
    dz = s * (ds - (s * ds).sum(1, keepdim=True)) / tau  # (7)
    if grad_soft is not None:
        soft = z.softmax(1).masked_fill(~keep, 0)
        dz = dz + soft * (grad_soft - (soft * grad_soft).sum(1, keepdim=True))
    a = (
        torch.zeros_like(s).scatter_(1, index.clamp(min=0)[:, None], 1.0).masked_fill(~keep, 0)
        + _nan_or_zero(s)
        if hard
        else s
    )
    d_bias = dz.new_empty(0, dz.shape[1]) if center_bias is None else dz.sum(-1)  # (10)
    d_scale = dz.new_empty(0, dz.shape[2]) if key_scale is None else scale * (dz * raw).sum(1)
    dz = scale * (dz if key_scale is None else dz * key_scale.masked_fill(~keep[:, 0], 0)[:, None])
    dq, dk, dv = (
        dz @ k,
        dz.transpose(1, 2) @ queries.to(z.dtype),
        (a / n).transpose(1, 2) @ grad,
    )  # (8), (9)
    if shared:
        dk = dk + dv

    def give(x, like, needed):
        return x.to(like.dtype).contiguous() if needed else like.new_empty(0, *like.shape[1:])

    return (
        give(dq, queries, need_queries),
        give(dk, keys, need_keys),
        give(dv, values, need_values),
        d_bias,
        d_scale,
    )
