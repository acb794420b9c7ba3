"""Implementations that the operators on label maps and masks are compared with (``baselines``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ovseg_kernels as ok

if TYPE_CHECKING:
    from .registry import Case

FUSED = "ovseg"
Functions = dict[str, Callable[..., torch.Tensor]]


def upsampling(case: Case) -> Functions:
    """Return ``upsample_argmax`` and what plain torch has for it."""
    size, label_type = (
        (case.shape["H"], case.shape["H"]),
        getattr(torch, case.options.get("label_type", "int64")),
    )

    def eager(logits):
        return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)

    def in_chunks(logits, step=10):
        """Return the labels by a few classes at a time with a running maximum."""
        best, winner = None, None
        for first in range(0, logits.shape[1], step):
            maps = F.interpolate(
                logits[:, first : first + step], size, mode="bilinear", align_corners=False
            )
            value, index = maps.max(1)
            index = index + first
            if best is not None:
                better = value > best
                value, index = torch.where(better, value, best), torch.where(better, index, winner)
            best, winner = value, index
        return winner

    return {
        FUSED: lambda logits: ok.upsample_argmax(logits, size, label_type=label_type),
        "eager": eager,
        "eager, 10 classes at a time": in_chunks,
        "torch.compile": torch.compile(eager),
    }


def window_labels(case: Case) -> Functions:
    """Return ``window_argmax`` and the published procedures."""
    side = case.shape["side"]
    options = dict(case.options)
    crop, canvas, size = (side, side), (side, round(side * 4 / 3)), (side * 15 // 16, side * 5 // 4)
    threshold = options.get("threshold")

    def eager(logits, origins, tables=None):
        """Return the labels by the published procedure.

        Maps at full size, summed window by window, divided by their number, resized.
        """
        maps = F.interpolate(logits, crop, mode="bilinear", align_corners=False)
        if tables is not None:
            maps = torch.stack(
                [
                    table[groups].permute(2, 0, 1)
                    for table, groups in zip(tables, maps.argmax(1), strict=True)
                ]
            )
        if options.get("activation") == "sigmoid":
            maps = maps.sigmoid()
        total, count = maps.new_zeros(maps.shape[1], *canvas), maps.new_zeros(canvas)
        for window, x in zip(maps, (0, canvas[1] - side), strict=True):  # the origins
            total[:, :, x : x + side] += window
            count[:, x : x + side] += 1
        scores = F.interpolate((total / count)[None], size, mode="bilinear", align_corners=False)[
            0
        ].softmax(0)
        best, labels = scores.max(0)
        return labels if threshold is None else labels.masked_fill(best < threshold, -1)

    return {
        FUSED: lambda logits, origins, tables=None: ok.window_argmax(
            logits, origins, crop, canvas, size, tables=tables, **options
        ),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }


def mask_loss(_: Case) -> Functions:
    """Return ``upsample_mask_loss`` as ZegCLIP adds it up, and what plain torch has for it."""

    def ours(logits, labels):
        focal, dice, present = ok.upsample_mask_loss(logits, labels)
        return (100 * focal.sum() + (dice * present).sum()) / present.sum().clamp(min=1)

    def parts(logits, labels, classes):
        """Return focal loss, dice of present classes and their number, of some classes."""
        x = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False).flatten(2)
        y = (labels[:, None] == classes[:, None, None]).to(x.dtype).flatten(2)
        q = x.sigmoid()
        right = q * y + (1 - q) * (1 - y)
        entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        focal = ((0.25 * y + 0.75 * (1 - y)) * (1 - right) ** 2 * entropy).mean(-1)
        dice = 1 - (2 * (q * y).sum(-1) + 1) / (q.sum(-1) + y.sum(-1) + 1)
        present = y.amax(-1)
        return torch.stack([focal.sum(), (dice * present).sum(), present.sum()])

    def loss(focal, dice, masks):
        return (100 * focal + dice) / masks.clamp(min=1)

    def eager(logits, labels):
        return loss(*parts(logits, labels, torch.arange(logits.shape[1], device=logits.device)))

    def in_chunks(logits, labels, step=8):
        classes = torch.arange(logits.shape[1], device=logits.device)
        return loss(
            *sum(
                checkpoint(parts, some, labels, which, use_reentrant=False)
                for some, which in zip(logits.split(step, 1), classes.split(step), strict=True)
            )
        )

    return {
        FUSED: ours,
        "eager": eager,
        "eager, 8 classes at a time, checkpointed": in_chunks,
        "torch.compile": torch.compile(eager),
    }
