"""dense_contrastive_loss in plain torch: the definition, and its parts.

The parts answer where no kernel is built.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .. import philox
from .patch_text_similarity import accumulation_dtype
from .unit import length
from .unit import unit as unit_of

SAMPLINGS = ("topk", "semi", "gumbel", "random")


def own(pixels, texts, image_ids, text_ids):
    """Return [T, B] bool: the images of every text."""
    if image_ids is not None:
        return text_ids[:, None] == image_ids
    return torch.eye(texts.shape[0], pixels.shape[0], dtype=torch.bool, device=pixels.device)


def best(keys, count, skip=0):
    """Return the indices of the ``count`` largest keys of every row after the first ``skip``.

    Ties go by index; -1 stands where a key is -infinity.
    """
    keys = torch.where(keys.isnan(), torch.inf, keys)
    order = keys.argsort(dim=1, descending=True, stable=True)[:, skip : skip + count]
    found = torch.where(keys.gather(1, order) == -torch.inf, -1, order)
    return F.pad(found, (0, count - found.shape[1]), value=-1)


def select(
    pixels, texts, image_ids, text_ids, rng, k_pos, k_neg, skip, sampling, temperature, margin
):
    """Return (positive [T, k_pos], negative [T, k_neg]) flat pixel indices by (2) and (3)."""
    B, N, _ = pixels.shape
    T = texts.shape[0]
    s = texts @ unit_of(pixels.to(texts.dtype)).flatten(0, 1).T  # (1), [T, B N]
    mine = own(pixels, texts, image_ids, text_ids).repeat_interleave(N, dim=1)
    positive = best(s.masked_fill(~mine, -torch.inf), k_pos)  # (2)
    keys = s
    if sampling == 1:
        chosen = torch.where(
            positive >= 0, s.gather(1, positive.clamp(min=0)) if B * N else 0.0, torch.inf
        )
        lowest = torch.where(chosen.isnan(), torch.inf, chosen).amin(1, keepdim=True)
        keys = s.masked_fill(~((s < lowest) & (s >= lowest - margin)), -torch.inf)
    elif sampling == 2:
        keys = s / temperature + philox.gumbel(rng, (T, B * N)).to(s.dtype)
    elif sampling == 3:
        keys = philox.uniform(rng, (T, B * N)).to(s.dtype)
    return positive, best(keys.masked_fill(mine, -torch.inf), k_neg, skip)  # (3)


def _chosen(pixels, texts, index):
    flat = pixels.reshape(-1, pixels.shape[2]).to(texts.dtype)
    return flat[index.clamp(min=0)] if len(flat) else texts.new_zeros(*index.shape, pixels.shape[2])


def gather(pixels, texts, index, rows):
    """Return (similarity [T, K], unit [T, rows, D]) of selected pixels.

    Zero where there is none.
    """
    chosen = _chosen(pixels, texts, index)
    unit = unit_of(chosen).masked_fill((index < 0)[..., None], 0)
    return torch.einsum("tkd,td->tk", unit, texts), unit[:, :rows].clone(
        memory_format=torch.contiguous_format
    )


def gather_backward(
    grad_similarity, grad_unit, pixels, texts, index, order, rows, need_pixels, need_texts
):
    """Return (d pixels, d texts) by equations (8) and (9)."""
    D, acc = pixels.shape[2], texts.dtype
    d_pixels, d_texts = (
        torch.zeros(pixels.shape, dtype=acc, device=pixels.device),
        torch.zeros_like(texts),
    )
    there = index >= 0
    chosen = _chosen(pixels, texts, index)
    norm = length(chosen)[..., None]
    unit = chosen / norm.clamp(min=1e-12)
    v = torch.zeros_like(unit)
    if grad_similarity is not None:
        g = grad_similarity.masked_fill(~there, 0)
        v = g[..., None] * texts[:, None]
        d_texts = torch.einsum("tk,tkd->td", g, unit.masked_fill(~there[..., None], 0))  # (9)
    if grad_unit is not None:
        v[:, :rows] = v[:, :rows] + grad_unit
    radial = torch.where(norm > 1e-12, (v * unit).sum(-1, keepdim=True) * unit, 0)
    v = ((v - radial) / norm.clamp(min=1e-12)).masked_fill(~there[..., None], 0)  # (8)
    if d_pixels.numel():
        d_pixels.view(-1, D).index_put_((index.clamp(min=0),), v, accumulate=True)
    d_pixels = d_pixels.to(pixels.dtype)
    return d_pixels if need_pixels else d_pixels[:0], d_texts if need_texts else d_texts[:0]


def dense_contrastive_loss(
    pixels, texts, temperature, image_ids, text_ids, positive, negative, reduction, terms
):
    """Return the loss for given selections: the definition.

    Equations (4)-(7) of ``ovseg_kernels.ops.dense_contrastive_loss``.
    """
    acc, D = accumulation_dtype(pixels), pixels.shape[2]
    q = unit_of(texts.to(acc))
    u = unit_of(pixels.to(acc)).reshape(-1, D)
    mine = own(pixels, texts, image_ids, text_ids)
    losses = []
    for j in range(texts.shape[0]):
        chosen, others = positive[j][positive[j] >= 0], negative[j][negative[j] >= 0]
        if len(chosen) == 0:
            continue
        z, z_n = u[chosen] @ q[j] / temperature, u[others] @ q[j] / temperature
        total = u.new_zeros(())
        if terms != "pixel_to_text":
            if reduction == "mean_of_log":  # (4)
                total = (
                    total
                    + (torch.cat([z[:, None], z_n.expand(len(z), -1)], 1).logsumexp(1) - z).mean()
                )
            else:  # (5)
                total = total + torch.cat([z, z_n]).logsumexp(0) - z.logsumexp(0)
        if terms != "text_to_pixel":  # (6)
            logits = u[chosen] @ q.T / temperature
            same = mine.T[chosen // pixels.shape[1]].to(acc)
            total = total + (logits.logsumexp(1) - (same * logits).sum(1) / same.sum(1)).mean()
        losses.append(total)
    return torch.stack(losses).mean() if losses else (pixels.sum() + texts.sum()).to(acc) * 0  # (7)
