"""folded_center_assignment in plain torch: the definition, on projected tokens."""

from __future__ import annotations

from torch.nn import functional as F

from .center_assignment import center_assignment


def folded_center_assignment(
    queries, tokens, key_weight, value_weight, key_bias=None, value_bias=None, mask=None, **options
):
    """Return (pooled, index, soft): the definition.

    Keys and values by torch's own Linear, then the definition of ``center_assignment``.
    """
    if mask is not None:
        tokens = tokens.masked_fill(~mask[..., None], 0)
    weights = (key_weight, key_bias, value_weight, value_bias)
    w_k, b_k, w_v, b_v = (None if x is None else x.to(tokens.dtype) for x in weights)
    keys, values = F.linear(tokens, w_k, b_k), F.linear(tokens, w_v, b_v)
    pooled, index, _, soft = center_assignment(queries, keys, values, mask=mask, **options)
    return pooled, index, soft
