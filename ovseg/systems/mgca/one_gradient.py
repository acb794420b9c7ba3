"""Several losses of the same pixels, and one gradient of their size.

Each loss that takes pixels gives a gradient as large as they are, and autograd adds them up two at
a time. Losses that see pixels through a few sums or rows need none: their share is written into the
gradient of the loss that has one. Values and gradients are those of the plain operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class OneGradient:
    """Pixels [B, N, D] that several losses share.

    ``pixels`` is for one that takes them whole, ``weighted`` and ``rows`` for others. All of one
    backward pass go into one tensor. Passes one after the other, with the graph kept, are
    independent. Under a compiler these are the plain operations.
    """

    def __init__(self, pixels: Tensor):
        self.shares: list[Callable[[Tensor], Any]] = []
        self.plain = torch.compiler.is_compiling()
        self.pixels: Tensor = pixels if self.plain else _Whole.apply(pixels, self)

    def weighted(self, weights: Tensor) -> Tensor:
        """Return sums over the pixels, [B, R, D], with ``weights`` [B, N, R]."""
        if self.plain:
            return weights.transpose(1, 2) @ self.pixels
        return _Weighted.apply(self.pixels, weights, self)

    def rows(self, index: Tensor) -> Tensor:
        """Return some of the pixels, [T, K, D]; zeros where the index is -1.

        Args:
            index: [T, K], image N + pixel.
        """
        if self.plain:
            return _taken(self.pixels, index)
        return _Rows.apply(self.pixels, index, self)


def _taken(pixels: Tensor, index: Tensor) -> Tensor:
    rows = pixels.flatten(0, 1)[index.clamp(min=0)]
    return rows.masked_fill_((index < 0)[..., None], 0)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, owner: OneGradient) -> Tensor:
        ctx.owner = owner
        ctx.like = (pixels.shape, pixels.dtype, pixels.device)
        ctx.set_materialize_grads(False)
        return pixels.view_as(pixels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        shares = ctx.owner.shares
        ctx.owner.shares = []
        if not shares:
            return grad, None
        shape, dtype, device = ctx.like
        if grad is None:
            total = torch.zeros(shape, dtype=dtype, device=device)
        else:
            # What arrives is an operator's own new tensor, or a sum of such: nobody else reads it.
            total = grad.contiguous()
        for add in shares:
            add(total)
        return total, None


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weights: Tensor, owner: OneGradient) -> Tensor:
        ctx.owner = owner
        ctx.save_for_backward(weights)
        return weights.transpose(1, 2) @ pixels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (weights,) = ctx.saved_tensors
        ctx.owner.shares.append(lambda total: total.baddbmm_(weights, grad))
        return None, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, index: Tensor, owner: OneGradient) -> Tensor:
        ctx.owner = owner
        ctx.save_for_backward(index)
        return _taken(pixels, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (index,) = ctx.saved_tensors
        mine = grad.masked_fill((index < 0)[..., None], 0).flatten(0, 1)
        place = index.clamp(min=0).flatten()
        # In one order on a GPU too.
        ctx.owner.shares.append(
            lambda total: total.flatten(0, 1).index_put_((place,), mine, accumulate=True)
        )
        return None, None, None
