"""Losses as modules, with the constructors and calls of open_clip's.

Change the import, and the [B, B] logits are gone:

    from ovseg_kernels.nn import ClipLoss      # was: from open_clip import ClipLoss

Values and gradients are open_clip's in every mode, up to rounding. In the modes that gather with
gradient, the gradient of logit_scale on one rank is its share of the whole; the mean over the
ranks, which DDP takes, is open_clip's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from . import _check, _distributed
from .ops.contrastive_loss import compute, rows_only


class ClipLoss(nn.Module):
    """Symmetric InfoNCE of unit features, over the ranks of the default process group.

    Args:
        local_loss: every rank's number is the mean over its own rows and columns, not that of the
            whole batch.
        gather_with_grad: gradients flow through gathered features too. Without it, open_clip's
            gradients are those of a part of the loss; they are reproduced.
        cache_labels: accepted; there are no labels to cache.
        rank, world_size: of the default process group, as open_clip takes them.
        use_horovod: not supported.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod is True; expected False: ranks talk by torch.distributed")
        self.local_loss, self.gather_with_grad, self.cache_labels = (
            local_loss,
            gather_with_grad,
            cache_labels,
        )
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | float | None = None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the loss of unit ``image_features`` and ``text_features`` [B, D].

        A bias on all logits changes no softmax: it is ignored.
        """
        loss = self._loss(image_features, text_features, logit_scale)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(
        self, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor | float
    ) -> torch.Tensor:
        if self.world_size == 1:
            return compute(image, text, scale, None, None, None, False, "softmax", 0.0)
        group = _group(self.rank, self.world_size)
        # Only this rank's rows of the gathered features get a gradient.
        if not self.local_loss and not self.gather_with_grad:
            image, text = (_scale_gradient(x, 1 / self.world_size) for x in (image, text))
        if self.gather_with_grad or not self.local_loss:
            return compute(
                image,
                text,
                scale,
                None,
                None,
                group,
                False,
                "softmax",
                0.0,
                "rank" if self.local_loss else "batch",
            )
        _check.shape("text_features", text, tuple(image.shape), "that of image_features")
        sizes = [
            size for (size,) in _distributed.sizes_of_ranks((image.shape[0],), group, image.device)
        ]
        images, texts = (_distributed.gather_rows(x.detach(), sizes, group) for x in (image, text))
        offset = sum(sizes[: self.rank])
        return (rows_only(image, texts, scale, offset) + rows_only(text, images, scale, offset)) / 2


class SigLipLoss(nn.Module):
    """Sigmoid loss of unit features: a rank's images against the texts of all ranks.

    The sum is divided by the number of the rank's images.

    Args:
        cache_labels: accepted; there are no labels to cache.
        rank, world_size: of the default process group, as open_clip takes them.
        dist_impl: accepted for compatibility; texts are gathered, which gives what each of
            open_clip's ways gives.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__()
        if dist_impl is not None:
            _check.one_of("dist_impl", dist_impl, ("bidir", "shift", "reduce", "gather"))
        self.cache_labels, self.rank, self.world_size, self.dist_impl = (
            cache_labels,
            rank,
            world_size,
            dist_impl,
        )

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | float | None = None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the loss of unit ``image_features`` and ``text_features`` [B, D]."""
        group = None if self.world_size == 1 else _group(self.rank, self.world_size)
        bias = 0.0 if logit_bias is None else logit_bias
        loss = compute(
            image_features,
            text_features,
            logit_scale,
            None,
            None,
            group,
            False,
            "sigmoid",
            bias,
            "rank",
        )
        return {"contrastive_loss": loss} if output_dict else loss


def _group(rank: int, world_size: int) -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise RuntimeError(
            f"world_size is {world_size} and torch.distributed is not initialised; call "
            "init_process_group first"
        )
    there = (dist.get_rank(), dist.get_world_size())
    if there != (rank, world_size):
        raise ValueError(
            f"rank and world_size are {rank} and {world_size}; the process group has {there[0]} "
            f"and {there[1]}"
        )
    return dist.group.WORLD


def _scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Return ``x``, with its gradient multiplied."""
    return x + (factor - 1) * (x - x.detach())
