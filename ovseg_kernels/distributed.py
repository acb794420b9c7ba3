"""Rows of all ranks, with their gradient.

For models that compare their own pictures with everybody's texts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from . import _distributed


def gather_rows(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return ``x`` [n, ...] of every rank of ``group``, in the order of the ranks; n may differ.

    Gradients are summed over the ranks and come back to the rank that holds the row: with a loss
    whose gradient every rank computes for its own part, and DDP's mean over ranks, parameters get
    the gradient of one process times what the loss puts before it. The losses of this package put
    world_size there.

    Args:
        x: floats with a gradient, or integers and booleans without.
        group: the process group.

    Example:
        >>> texts = gather_rows(texts, dist.group.WORLD)  # [T of all ranks, D]
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; expected a tensor [n, ...]")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}; expected a torch.distributed process group"
        )
    sizes = [size for (size,) in _distributed.sizes_of_ranks((x.shape[0],), group, x.device)]
    return _distributed.gather_rows(x, sizes, group)


def sum_over_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the sum of ``x`` over the ranks of ``group``, on every one of them.

    Its gradient is summed over the ranks as well: every rank uses the sum for its own part of a
    loss, as in ``gather_rows``.
    """
    return _distributed.sum_over_ranks(x, group)
