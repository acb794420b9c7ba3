"""Several losses of the same pixels, and one gradient of their size.

Each loss that takes pixels gives a gradient as large as they are, and autograd adds them up two at
a time. Losses that see pixels through a few sums or rows need none: their share is written into the
gradient of the loss that has one. Values and gradients are those of the plain operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class OneGradient:
    """Pixels [B, N, D] that several losses share: ``pixels`` for one that takes them whole,
    ``weighted`` and ``rows`` for others.

    All of one backward pass go into one tensor. Passes one after the other, with the graph kept,
    are independent. Under a compiler these are the plain operations.
    """

    def __init__(self, pixels: torch.Tensor):
        self.shares: list[Callable[[torch.Tensor], Any]] = []
        self.plain = torch.compiler.is_compiling()
        self.pixels: torch.Tensor = pixels if self.plain else _Whole.apply(pixels, self)

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        """[B, R, D], sums over the pixels with ``weights`` [B, N, R]."""
        if self.plain:
            return weights.transpose(1, 2) @ self.pixels
        return _Weighted.apply(self.pixels, weights, self)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """[T, K, D], the pixels of flat ``index`` [T, K], image N + pixel; zeros where it is -1."""
        if self.plain:
            return self.pixels.flatten(0, 1)[index.clamp(min=0)].masked_fill(
                (index < 0)[..., None], 0
            )
        return _Rows.apply(self.pixels, index, self)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: torch.Tensor, owner: OneGradient) -> torch.Tensor:
        ctx.owner, ctx.like = owner, (pixels.shape, pixels.dtype, pixels.device)
        ctx.set_materialize_grads(False)
        return pixels.view_as(pixels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        shares, ctx.owner.shares = ctx.owner.shares, []
        if not shares:
            return grad, None
        shape, dtype, device = ctx.like
        # What arrives is an operator's own new tensor, or a sum of such: nobody else reads it.
        total = (
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad.contiguous()
        )
        for add in shares:
            add(total)
        return total, None


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pixels: torch.Tensor, weights: torch.Tensor, owner: OneGradient
    ) -> torch.Tensor:
        ctx.owner = owner
        ctx.save_for_backward(weights)
        return weights.transpose(1, 2) @ pixels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None]:
        (weights,) = ctx.saved_tensors
        ctx.owner.shares.append(lambda total: total.baddbmm_(weights, grad))
        return None, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pixels: torch.Tensor, index: torch.Tensor, owner: OneGradient
    ) -> torch.Tensor:
        ctx.owner = owner
        ctx.save_for_backward(index)
        return pixels.flatten(0, 1)[index.clamp(min=0)].masked_fill_((index < 0)[..., None], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None]:
        (index,) = ctx.saved_tensors
        mine, place = (
            grad.masked_fill((index < 0)[..., None], 0).flatten(0, 1),
            index.clamp(min=0).flatten(),
        )
        ctx.owner.shares.append(
            lambda total: total.flatten(0, 1).index_put_((place,), mine, accumulate=True)
        )  # in one order on a GPU too
        return None, None, None
