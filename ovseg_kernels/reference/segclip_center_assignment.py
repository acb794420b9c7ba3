"""segclip_center_assignment in plain torch: SegCLIP's mapping step, token by token.

The definition.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .center_assignment import center_assignment


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
