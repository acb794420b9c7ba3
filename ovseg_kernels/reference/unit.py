"""Lengths and unit vectors in plain torch, of vectors of any length.

torch's own would square what has no square in the dtype.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

EPS = 1e-12  # of norms, as in torch.nn.functional.normalize


def _scaled(x):
    """Return x divided by a factor, and the factor.

    The factor is 1, or the largest element of a row whose squares would leave the range of float32.
    """
    top = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones(*x.shape[:-1], 1)
    top = torch.where(top > 1e15, top, 1)
    return x / top, top


def length(x):
    """Return the lengths [...] of x [..., D]."""
    x, top = _scaled(x)
    return x.norm(dim=-1) * top[..., 0]


def unit(x):
    """Return x / max(|x|, EPS)."""
    return F.normalize(_scaled(x)[0], dim=-1, eps=EPS)
