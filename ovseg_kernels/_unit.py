"""Unit vectors by torch, for what is no kernel's work."""

from __future__ import annotations

import torch

from . import _checking
from .reference import unit as reference


def unit(x: torch.Tensor) -> torch.Tensor:
    """Return x / max(|x|, EPS) over the last dimension, as torch.nn.functional.normalize.

    Squares leave the range of float32 at lengths of 1.8e19, where torch's own makes zeros. On the
    CPU, where it can be seen, the vector is found in another way; elsewhere it is NaN, which can be
    seen in the result.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if not _checking.looks_at_values(norm):
        norm = norm + 0 * norm.detach()
    elif norm.numel() and any(
        float(part.amax()) == torch.inf for part in _checking.looked_at(norm)
    ):
        return reference.unit(x)
    return x / norm.clamp_min(reference.EPS)
