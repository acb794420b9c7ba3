"""segclip_center_assignment in plain torch: SegCLIP's mapping step, token by token.

The definition, and the closed form of its inverse standard deviations: it answers where no kernel
is built.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .center_assignment import center_assignment
from .patch_text_similarity import accumulation_dtype

# Elements of W_k x' at a time on a GPU; one image on the CPU, which then stays in its cache.
CHUNK = 4 << 20


def grouped_linear(tokens, weight):
    """Return the grouped 1x1 convolution over channels.

    [B, L, D] and weight [D, D / groups] give [B, L, D].
    """
    D, size = weight.shape
    grouped = tokens.unflatten(-1, (D // size, size)), weight.unflatten(0, (D // size, size))
    return torch.einsum("blgi,goi->blgo", *grouped).flatten(-2)


def segclip_center_assignment(
    queries,
    tokens,
    key_weight,
    value_weight,
    norm_weight,
    norm_bias,
    key_norm_weight,
    key_norm_bias,
    eps=1e-5,
    mask=None,
    **options,
):
    """Return (pooled, index, soft): the definition.

    Equations (1)-(3) of ``ovseg_kernels.ops.segclip_center_assignment``, then
    ``center_assignment``.
    """
    if mask is not None:
        tokens = tokens.masked_fill(~mask[..., None], 0)
    D, dtype = tokens.shape[-1:], tokens.dtype
    x = F.layer_norm(tokens, D, norm_weight.to(dtype), norm_bias.to(dtype), eps)  # (1)
    keys = F.layer_norm(
        grouped_linear(x, key_weight.to(dtype)),
        D,
        key_norm_weight.to(dtype),
        key_norm_bias.to(dtype),
        eps,
    )  # (2)
    values = grouped_linear(x, value_weight.to(dtype))  # (3)
    pooled, index, _, soft = center_assignment(queries, keys, values, mask=mask, **options)
    return pooled, index, soft


def _chunks(tokens):
    images = (
        1
        if tokens.device.type == "cpu"
        else max(1, CHUNK // max(1, tokens[0].numel() if len(tokens) else 1))
    )
    return [slice(first, first + images) for first in range(0, tokens.shape[0], images)]


def _centered(tokens, weight, acc):
    """Return y - mean y for y = W_k x', and the tokens in that layout.

    Both are [groups, rows, D / groups]; the first in ``acc``.
    """
    D, size = weight.shape
    grouped = tokens.reshape(-1, D // size, size).transpose(0, 1)
    y = torch.bmm(grouped, weight.unflatten(0, (-1, size)).transpose(1, 2)).to(acc)
    return y.sub_((y.sum(-1).sum(0) / D)[:, None]), grouped


def inverse_std(tokens, weight, eps):
    """Return r of (5), [B, L]."""
    found = tokens.new_empty(tokens.shape[:2], dtype=accumulation_dtype(tokens))
    for part in _chunks(tokens):
        y, _ = _centered(tokens[part], weight, found.dtype)
        variance = y.square_().sum(-1).sum(0) / weight.shape[0]
        # 0 times an infinite variance: NaN, as the norm has it, where its inverse would pass for 0.
        found[part] = (variance + eps).rsqrt_().add_(variance, alpha=0).view_as(found[part])
    return found


def inverse_std_backward(grad, tokens, weight, found):
    """Return d tokens and d weight: d y = -r^3 (y - mean y) / D d r for y = W_k x'."""
    D, size = weight.shape
    d_tokens = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    d_weight = torch.zeros(D // size, size, size, dtype=found.dtype, device=weight.device)
    factor = -grad * found**3 / D
    for part in _chunks(tokens):
        y, grouped = _centered(tokens[part], weight, found.dtype)
        dy = y.mul_(factor[part].reshape(-1, 1)).to(tokens.dtype)
        d_tokens[part].view(-1, D // size, size).transpose(0, 1).copy_(
            torch.bmm(dy, weight.unflatten(0, (-1, size)))
        )
        d_weight += torch.bmm(dy.transpose(1, 2), grouped)
    return d_tokens, d_weight.flatten(0, 1).to(weight.dtype)
