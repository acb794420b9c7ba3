"""Scaled dot-product attention behind one name, with the backend as an argument.

``sdpa`` is torch's own; ``xformers`` is optional (``pip install 'ovseg-kernels[xformers]'``) and used when asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..errors import first_line

BACKENDS = ("sdpa", "xformers")


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None = None,
              scale: float | None = None, causal: bool = False, dropout: float = 0.0, backend: str = "sdpa") -> torch.Tensor:
    """softmax(q k^T scale + mask) v.

    Args:
        q, k, v: [B, heads, L, D].
        mask: broadcastable to [B, heads, L_q, L_k]; bool (True = keep) or added to the scores.
        scale: multiplies the scores; 1 / sqrt(D) if None.
        causal: nothing looks behind itself; in place of ``mask``.
        dropout: share of the weights that is dropped.
        backend: ``sdpa`` or ``xformers``.
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)
    if backend != "xformers":
        raise ValueError(f"backend is {backend!r}; expected one of {list(BACKENDS)}")
    try:
        from xformers.ops import memory_efficient_attention

        if causal:
            from xformers.ops import LowerTriangularMask
    except ImportError as error:
        raise ImportError(
            f"attention backend 'xformers' was asked for and does not import ({first_line(error)}); "
            "pip install --no-deps xformers, or use backend='sdpa'"
        ) from error
    bias: Any = LowerTriangularMask() if causal else None
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        bias = mask.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # xformers wants [B, L, heads, D]
    return memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scale).transpose(1, 2)
