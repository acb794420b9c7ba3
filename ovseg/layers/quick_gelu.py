"""QuickGELU followed by a projection, keeping only its input for backward.

    y = W g(h) + b,   g(h) = h sigmoid(1.702 h)                                                               (1)
    dh = (W^T dy) g'(h),   g'(h) = s + 1.702 h s (1 - s),   s = sigmoid(1.702 h);   dW = dy g(h)^T            (2)

Plain torch keeps h, the sigmoid and g(h), three tensors of four times the width for every block of a CLIP: most of what its training
keeps. Here g(h) is computed again.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def quick_gelu(h: torch.Tensor) -> torch.Tensor:
    return h * torch.sigmoid(1.702 * h)


class _QuickGeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias):
        ctx.save_for_backward(h, weight)
        ctx.has_bias = bias is not None
        return F.linear(quick_gelu(h), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, weight = ctx.saved_tensors
        dh = d_weight = d_bias = None
        s = torch.sigmoid(1.702 * h)
        if ctx.needs_input_grad[1]:
            d_weight = grad.flatten(0, -2).T @ (h * s).flatten(0, -2)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            d_bias = grad.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            slope = (1 - s).mul_(h).mul_(1.702).add_(1).mul_(s)
            dh = (grad @ weight).mul_(slope)
        return dh, d_weight, d_bias


def quick_gelu_linear(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Equation (1): h [..., H], weight [D, H], bias [D] to [..., D]. A second derivative raises."""
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, weight, bias = h.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _QuickGeluLinear.apply(h, weight, bias)
