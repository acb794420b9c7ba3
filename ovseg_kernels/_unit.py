"""Unit vectors by torch, for what is no kernel's work."""

from __future__ import annotations

import torch

from . import _checking
from .reference import unit as reference


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / max(|x|, EPS) over the last dimension, as torch.nn.functional.normalize.

    Squares leave the range of float32 at lengths of 1.8e19, where torch's own makes zeros. On the CPU, where it can be seen, the
    vector is found in another way; elsewhere it is NaN, which can be seen in the result.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if any(bool(part.isinf().any()) for part in _checking.looked_at(norm)):
        return reference.unit(x)
    return x / (norm + 0 * norm.detach()).clamp_min(reference.EPS)
