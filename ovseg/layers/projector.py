"""The projectors of GroupViT and OVSegmentor into the space where pictures and texts are compared: two layers with a BatchNorm between.

    y = W_2 relu(BN(W_1 x + b_1)) + b_2

Statistics in training are those of all rows of all ranks, with their gradient, so that many processes give what one gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ovseg_kernels.distributed import sum_over_ranks

from .precision import at_least_float32


class Projector(nn.Module):
    """[..., D] to [..., E] through ``hidden``. Parameter names are OVSegmentor's, whose layers are 1x1 convolutions."""

    def __init__(self, width: int, hidden: int, embed_dim: int):
        super().__init__()
        self.linear_hidden = nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.linear_out = nn.Linear(hidden, embed_dim)

    def forward(self, x: torch.Tensor, group: Any = None) -> torch.Tensor:
        """``group``: the ranks whose rows share statistics in training; None for this process alone."""
        linear, norm, relu = self.linear_hidden
        hidden = linear(x.flatten(0, -2)).to(norm.weight.dtype)  # statistics are not autocast's to round
        hidden = norm(hidden) if group is None or not self.training else synchronized(norm, hidden, group)
        return self.linear_out(relu(hidden)).unflatten(0, x.shape[:-1])


def synchronized(norm: nn.BatchNorm1d, x: torch.Tensor, group: Any) -> torch.Tensor:
    """``norm`` in training over the rows [n, C] of all ranks; updates its running statistics, which stay equal everywhere."""
    rows = at_least_float32(x)
    count = sum_over_ranks(rows.new_full((1,), len(rows)), group)
    mean = sum_over_ranks(rows.sum(0), group) / count
    variance = sum_over_ranks((rows - mean).square().sum(0), group) / count
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    with torch.no_grad():
        norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum or 0.1)
        norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var), norm.momentum or 0.1)
        norm.num_batches_tracked += 1
    y = (rows - mean) * (variance + norm.eps).rsqrt() * norm.weight + norm.bias
    return y.to(x.dtype)
