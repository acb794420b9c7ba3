"""patch_text_similarity in plain torch: the definition, and its closed form.

The closed form answers where no kernel is built.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .unit import EPS, length, unit

POOLS = ("vector", "score", "max", "mean")
WEIGHTS = ("softmax", "sigmoid")


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """Return float64 for float64, float32 for everything below."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def patch_text_similarity(
    patches, texts, patch_mask=None, scale=1.0, bias=0.0, pool="vector", weight="softmax"
):
    """Return the similarities [B, T]: the definition.

    Equations (1)-(4) of ``ovseg_kernels.ops.patch_text_similarity``. Stores [B, T, N].
    """
    u, q = patches.to(accumulation_dtype(patches)), unit(texts.to(accumulation_dtype(texts)))
    keep = torch.ones_like(u[..., 0], dtype=torch.bool) if patch_mask is None else patch_mask
    u = u.masked_fill(~keep[..., None], 0)
    s = torch.einsum("bnd,td->btn", unit(u), q)  # (1)
    keep, some = keep[:, None, :], keep.any(-1)[:, None]
    if pool == "max":
        return s.masked_fill(~keep, float("-inf")).amax(-1).masked_fill(~some, 0)
    x = (
        torch.zeros_like(s)
        if pool == "mean"
        else scale * s
        if weight == "softmax"
        else F.logsigmoid(scale * s + bias)
    )
    x = x.masked_fill(~keep, float("-inf")).masked_fill(~some[..., None], 0)
    a = x.softmax(-1).masked_fill(~keep, 0)  # (2)
    if pool != "vector":
        return (a * s).sum(-1).masked_fill(~some, 0)  # (3)
    v = torch.einsum("btn,bnd->btd", a, u)
    return torch.einsum("btd,td->bt", unit(v), q).masked_fill(~some, 0)  # (4)


def _prepare(patches, texts, mask, scale, bias, weight):
    acc = accumulation_dtype(patches)
    u, t = patches.to(acc), texts.to(acc)
    keep = torch.ones_like(u[..., 0], dtype=torch.bool) if mask is None else mask
    u = u.masked_fill(~keep[..., None], 0)
    r, rq = length(u).clamp_min(EPS), length(t).clamp_min(EPS)
    q = t / rq[:, None]
    s = (u @ q.T).transpose(1, 2) / r[:, None]
    x = scale * s if weight == 0 else F.logsigmoid(scale * s + bias)
    return u, r, q, rq, s, x.masked_fill(~keep[:, None], float("-inf")), keep


def forward(patches, texts, mask, scale, bias, pool, weight, tf32=False):
    """Return (similarity, lse, norm) as the kernels give them, one image at a time.

    ``pool`` 0 vector, 1 score, 2 max.
    """
    outputs: tuple[list, list, list] = ([], [], [])
    for b in range(patches.shape[0]):
        image = slice(b, b + 1)
        u, _, q, _, s, x, keep = _prepare(
            patches[image], texts, None if mask is None else mask[image], scale, bias, weight
        )
        lse = x.logsumexp(-1)
        a = (x - lse[..., None]).exp().masked_fill(~keep[:, None], 0)
        if pool == 2:
            outputs[0].append(
                s.masked_fill(~keep[:, None], float("-inf"))
                .amax(-1)
                .masked_fill(~keep.any(-1)[:, None], 0)
            )
            continue
        outputs[1].append(lse)
        none = ~keep.any(-1)[:, None]
        if pool == 1:
            outputs[0].append((a * s).sum(-1).masked_fill(none, 0))
            continue
        v = a @ u
        norm = length(v)
        outputs[0].append(((v * q).sum(-1) / norm.clamp_min(EPS)).masked_fill(none, 0))
        outputs[2].append(norm)
    empty = patches.new_empty(0, texts.shape[0], dtype=accumulation_dtype(patches))
    return tuple(torch.cat(part) if part else empty.clone() for part in outputs)


def backward(
    grad,
    patches,
    texts,
    mask,
    scale,
    bias,
    similarity,
    lse,
    norm,
    pool,
    weight,
    tf32,
    need_patches,
    need_texts,
):
    """Return (d patches, d texts, d scale, d bias) by equations (5)-(9), one image at a time."""
    acc = accumulation_dtype(patches)
    d_patches = torch.zeros_like(
        patches if need_patches else patches[:0], memory_format=torch.contiguous_format
    )
    d_q = torch.zeros_like(texts, dtype=acc, memory_format=torch.contiguous_format)
    d_scale, d_bias = grad.new_zeros(()), grad.new_zeros(())
    for b in range(patches.shape[0]):
        image = slice(b, b + 1)
        parts = _prepare(
            patches[image], texts, None if mask is None else mask[image], scale, bias, weight
        )
        u, r, q, _, s, x, keep = (
            part[0] if part.ndim > 2 or i in (1, 6) else part for i, part in enumerate(parts)
        )
        g, phi = grad[b][:, None], similarity[b][:, None]
        if pool == 2:
            total = g * F.one_hot(s.masked_fill(~keep, float("-inf")).argmax(-1), s.shape[-1]).to(
                acc
            )
            # Where no patch is kept, the first is not the largest.
            total = total.masked_fill(~keep, 0)
            m, along, value = total / r, (total * s).sum(0), 0
        else:
            a = (x - lse[b][:, None]).exp().masked_fill(~keep, 0)
            slope = 1.0 if weight == 0 else torch.sigmoid(-(scale * s + bias))
            if pool == 1:
                c = g * a * slope * (s - phi)
                m, along, value = (
                    (g * a + scale * c) / r,
                    ((g * a + scale * c) * s).sum(0),
                    0,
                )  # (5)
            else:
                v, rho = a @ u, norm[b][:, None].clamp_min(EPS)
                y = (q - torch.where(norm[b][:, None] < EPS, 0, phi / rho) * v) / rho
                c = g * a * slope * (y @ u.T)  # (6)
                m, along, value = scale * c / r, (scale * c * s).sum(0), (g * a).T @ y  # (7), (9)
                d_q += g * v / rho
            d_scale += (c * s).sum()
            d_bias += c.sum() if weight == 1 else 0
        d_q += m @ u
        if need_patches:
            clamped = length(u) < EPS
            d_patches[b] = (
                m.T @ q + value - u * (along / r / r).masked_fill(clamped, 0)[:, None]
            ).to(patches.dtype)
    rq = length(texts.to(acc))[:, None]
    q = texts.to(acc) / rq.clamp_min(EPS)
    d_texts = (d_q - q * (d_q * q).sum(-1, keepdim=True).masked_fill(rq < EPS, 0)) / rq.clamp_min(
        EPS
    )
    return (
        d_patches,
        d_texts.to(texts.dtype) if need_texts else texts.new_empty(0, texts.shape[1]),
        d_scale,
        d_bias,
    )
