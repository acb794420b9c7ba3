"""Exchange between ranks: sizes, gathered features with their gradient, merged statistics."""

from __future__ import annotations

import torch
import torch.distributed as dist


def sizes_of_ranks(
    sizes: tuple[int, ...], group: dist.ProcessGroup, device: torch.device
) -> list[tuple[int, ...]]:
    """Return what every rank passed, in the order of the ranks.

    The host must know it, for shapes follow from it. Where the group has a backend for the CPU
    (torch's default, "cpu:gloo,cuda:nccl", has), it travels beside the GPU, whose queue is left
    alone; with nccl alone the host waits for all the work of the GPU.
    """
    beside = "cpu:" in dist.get_backend_config(group)
    mine = torch.tensor(sizes, device="cpu" if beside else device)
    found = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    return [tuple(int(n) for n in x) for x in found]


def gather_rows(x: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Return the rows of all ranks, in the order of the ranks; ``sizes`` may be uneven.

    Gradients are summed over the ranks and come back.
    """
    return _Gather.apply(x, sizes, group) if x.is_floating_point() else _gather(x, sizes, group)


def _gather(x, sizes, group):
    padded = x.new_zeros(max(sizes), *x.shape[1:])  # collectives want one size
    padded[: x.shape[0]] = x
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, group):
        ctx.sizes, ctx.group = sizes, group
        return _gather(x, sizes, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rank = dist.get_rank(ctx.group)
        first = sum(ctx.sizes[:rank])
        # 16-bit gradients are rounded once more, and not once for every rank.
        dtype = torch.float32 if grad.dtype.itemsize == 2 else grad.dtype
        total = grad.to(dtype, copy=True).contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[first : first + ctx.sizes[rank]].to(grad.dtype), None, None


def sum_over_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the sum on every rank; gradients are summed over the ranks too."""
    return _Sum.apply(x, group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def merge_columns(columns: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Merge statistics [3, T] over all ranks: log-sum-exp by maximum and sum, the rest by sum."""
    top = columns[0].clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    finite = torch.where(top.isfinite(), top, 0)
    merged = torch.stack([(columns[0] - finite).exp(), columns[1], columns[2]])
    dist.all_reduce(merged, group=group)
    return torch.stack([merged[0].log() + finite, merged[1], merged[2]])


def weights(part: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the weights of the rows in the loss.

    1 / (2 number of rows that have a positive, over all ranks) for those, 0 for the others. A sum
    of weights that is NaN counts as one, so that it reaches the loss.
    """
    some = (~(part[2] <= 0)).to(
        part.dtype
    )  # a NaN among the weights of positives is seen in the loss
    count = some.sum()
    if group is not None:
        dist.all_reduce(count, group=group)
    return some / (2 * count.clamp(min=1))


def terms(part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the sum of weight * (log-sum-exp - mean positive logit).

    Rows without a positive have weight 0 and may have no finite one. Weights of positives may sum
    to less than 1.
    """
    total = torch.where(part[2] > 0, part[2], 1)
    return (weight * torch.where(weight > 0, part[0] - part[1] / total, 0)).sum()


def of_the_whole_batch(
    loss: torch.Tensor, row_part: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Return the loss of the whole batch, with world_size times this rank's share of its gradient.

    ``row_part`` is the rows' share of ``loss``.
    """
    whole = row_part.clone()
    dist.all_reduce(whole, group=group)
    share = dist.get_world_size(group) * loss
    return share + (loss + whole - row_part - share).detach()
