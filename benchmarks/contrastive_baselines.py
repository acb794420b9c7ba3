"""Implementations that ``contrastive_loss`` is compared with (``baselines``).

They take unit features. Where features have 16 bits, products are in that dtype, and exponentials
and sums in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ovseg_kernels as ok
from ovseg_kernels._backends import interpreted

from .label_baselines import FUSED, Functions

if TYPE_CHECKING:
    from .registry import Case

TILE = 4096  # of rows and columns: a tile of logits has 64 MiB of float32


class CannotRun(RuntimeError):
    """A baseline that does not run here, with the reason."""


def contrastive(case: Case) -> Functions:
    """Return ``contrastive_loss`` of unit features and others, as CLIP or SigLIP trains."""
    if "P" in case.shape:
        return _listed_positives()
    return _sigmoid() if case.options.get("kind") == "sigmoid" else _softmax()


def _softmax() -> Functions:
    """Return the loss of CLIP and what plain torch has for it."""

    def eager(image, text, logit_scale):
        z = (logit_scale * image @ text.T).float()
        target = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)) / 2

    def half(image, text, logit_scale, target):
        return F.cross_entropy((logit_scale * image @ text.T).float(), target, reduction="sum")

    def in_blocks(image, text, logit_scale, step=512):
        """Return the loss by blocks of rows of each side, checkpointed.

        The usual way to save the matrix.
        """
        target = torch.arange(len(image), device=image.device)
        total = 0.0
        for own, other in ((image, text), (text, image)):
            for rows, places in zip(own.split(step), target.split(step), strict=True):
                total = total + checkpoint(
                    half, rows, other, logit_scale, places, use_reentrant=False
                )
        return total / (2 * len(image))

    def open_clip(image, text, logit_scale):
        from open_clip.loss import ClipLoss

        return ClipLoss()(image, text, logit_scale)

    return {
        FUSED: lambda image, text, logit_scale: ok.contrastive_loss(
            image, text, logit_scale, normalize=False
        ),
        "eager": eager,
        "open_clip ClipLoss": open_clip,
        "eager, blocks of 512 rows": in_blocks,
        "eager, closed form in row blocks": lambda image, text, logit_scale: _SoftmaxRows.apply(
            image, text, logit_scale
        ),
        "Inf-CLIP's form": inf_clip,
        "torch.compile": torch.compile(eager),
    }


def _sigmoid() -> Functions:
    """Return the loss of SigLIP, and what plain torch and a public package have for it."""

    def eager(image, text, logit_scale, logit_bias):
        z = (logit_scale * image @ text.T + logit_bias).float()
        labels = 2 * torch.eye(len(z), device=z.device) - 1
        return -F.logsigmoid(labels * z).sum() / len(z)

    def open_clip(image, text, logit_scale, logit_bias):
        from open_clip.loss import SigLipLoss

        return SigLipLoss()(image, text, logit_scale, logit_bias)

    return {
        FUSED: lambda image, text, logit_scale, logit_bias: ok.contrastive_loss(
            image, text, logit_scale, logit_bias=logit_bias, kind="sigmoid", normalize=False
        ),
        "eager": eager,
        "open_clip SigLipLoss": open_clip,
        "eager, closed form in row blocks": lambda image, text, logit_scale, logit_bias: (
            _SigmoidRows.apply(image, text, logit_scale, logit_bias)
        ),
        "siglip-kernel": siglip_kernel,
        "torch.compile": torch.compile(eager),
    }


def _listed_positives() -> Functions:
    """Return ``contrastive_loss`` of a list of positives, and soft targets of the whole matrix."""

    def eager(image, text, logit_scale, positives):
        z = (logit_scale * image @ text.T).float()
        ones = torch.ones_like(positives[:, 0], dtype=z.dtype)
        p = torch.zeros_like(z).index_put(positives.unbind(1), ones, accumulate=True)

        def half(z, p):
            total = p.sum(1)
            rows = (p / total.clamp(min=1)[:, None] * (z.logsumexp(1, keepdim=True) - z)).sum(1)
            return rows.sum() / (total > 0).sum()

        return (half(z, p) + half(z.T, p.T)) / 2

    return {
        FUSED: lambda image, text, logit_scale, positives: ok.contrastive_loss(
            image, text, logit_scale, positives=positives, normalize=False
        ),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }


def siglip_kernel(image, text, logit_scale, logit_bias):
    """Return the loss by siglip-kernel (PyPI, Apache-2.0), which reads the GPU where imported.

    It takes the logarithm of the scale, which 16 bits would round by a percent: float32 here.
    """
    if not (image.is_cuda or interpreted()):
        raise CannotRun("siglip-kernel needs a GPU")
    try:
        from siglip_kernel import fused_siglip_loss
    except ImportError as error:
        raise CannotRun(f"{error}: pip install 'ovseg-kernels[bench]'") from error
    except RuntimeError as error:
        raise CannotRun(f"siglip-kernel does not import: {error}".splitlines()[0]) from error
    return fused_siglip_loss(image, text, logit_scale.float().log(), logit_bias.float())


def inf_clip(image, text, logit_scale, tile=TILE):
    """Return the loss in the form of Inf-CLIP: each direction by square tiles, computed again.

    Cheng et al., Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive
    Loss, 2024, section 3, on one GPU. Written from the text; its kernels have smaller tiles.
    """
    rows = _Tiles.apply(image, text, logit_scale, tile)
    columns = _Tiles.apply(text, image, logit_scale, tile)
    return (rows + columns) / 2


class _Tiles(torch.autograd.Function):
    """mean_i (lse_j z_ij - z_ii): tiles of a row one after the other, l_i kept for the backward."""

    @staticmethod
    def forward(ctx, own, other, scale, tile):
        lse = []
        for rows in own.split(tile):
            found = rows.new_full(
                (len(rows),), -torch.inf, dtype=torch.promote_types(rows.dtype, torch.float32)
            )
            for columns in other.split(tile):
                found = torch.logaddexp(found, _logits(rows, columns, scale)[1].logsumexp(1))
            lse.append(found)
        lse = torch.cat(lse)
        ctx.save_for_backward(own, other, scale, lse)
        ctx.tile = tile
        return (lse - _upcast(scale) * (_upcast(own) * _upcast(other)).sum(1)).mean()

    @staticmethod
    def backward(ctx, grad):
        own, other, scale, lse = ctx.saved_tensors
        d_own = torch.zeros_like(own, dtype=lse.dtype)
        d_other = torch.zeros_like(other, dtype=lse.dtype)
        d_scale = torch.zeros_like(scale, dtype=lse.dtype)
        for i in range(0, len(own), ctx.tile):
            for j in range(0, len(other), ctx.tile):
                rows = own[i : i + ctx.tile]
                columns = other[j : j + ctx.tile]
                s, z = _logits(rows, columns, scale)
                dz = z.sub_(lse[i : i + ctx.tile, None]).exp_()
                if i == j:
                    dz.diagonal().sub_(1)
                d_scale += (dz * s).sum()
                dz = dz.to(own.dtype)
                d_own[i : i + ctx.tile] += dz @ columns
                d_other[j : j + ctx.tile] += dz.T @ rows
        share = grad / len(own)
        by_scale = share * scale
        return (
            (by_scale * d_own).to(own.dtype),
            (by_scale * d_other).to(other.dtype),
            (share * d_scale).to(scale.dtype),
            None,
        )


def _upcast(x: torch.Tensor) -> torch.Tensor:
    """Return 16-bit values in float32, and others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(rows, columns, scale):
    """Return (similarities, logits), multiplied in the dtype of the features."""
    s = _upcast(rows @ columns.T)
    return s, _upcast(scale) * s


def _rows_a_block(image: torch.Tensor) -> int:
    """Return rows whose logits a cache holds, or that are enough work for a GPU."""
    return 4096 if image.is_cuda else 256


class _SoftmaxRows(torch.autograd.Function):
    """Our way in plain torch: one pass over blocks of rows for statistics, one for the gradient."""

    @staticmethod
    def forward(ctx, image, text, scale):
        step = _rows_a_block(image)
        rows = []
        columns = torch.full_like(_upcast(text[:, 0]), -torch.inf)
        hits = 0.0
        for first in range(0, len(image), step):
            _, z = _logits(image[first : first + step], text, scale)
            rows.append(z.logsumexp(1))
            columns = torch.logaddexp(columns, z.logsumexp(0))
            hits = hits + z.diagonal(first).sum()
        rows = torch.cat(rows)
        ctx.save_for_backward(image, text, scale, rows, columns)
        return ((rows.sum() + columns.sum()) / 2 - hits) / len(image)

    @staticmethod
    def backward(ctx, grad):
        image, text, scale, rows, columns = ctx.saved_tensors
        step = _rows_a_block(image)
        d_image = torch.empty_like(image)
        d_text = torch.zeros_like(text)
        d_scale = 0.0
        for first in range(0, len(image), step):
            part = slice(first, first + step)
            s, z = _logits(image[part], text, scale)
            dz = (z - rows[part, None]).exp_().add_((z - columns).exp_()).div_(2 * len(image))
            dz.diagonal(first).sub_(1 / len(image))
            d_scale = d_scale + (dz * s).sum()
            dz = dz.to(image.dtype)
            d_image[part] = scale * (dz @ text)
            d_text.addmm_(dz.T, image[part] * scale)
        return grad * d_image, grad * d_text, (grad * d_scale).to(scale.dtype)


class _SigmoidRows(torch.autograd.Function):
    """Three products in all: the gradient is taken with the loss, block by block of rows."""

    @staticmethod
    def forward(ctx, image, text, scale, bias):
        step = _rows_a_block(image)
        d_image, d_text = torch.empty_like(image), torch.zeros_like(text)
        loss, d_scale, d_bias = (torch.zeros_like(_upcast(scale)) for _ in range(3))
        for first in range(0, len(image), step):
            part = slice(first, first + step)
            s, z = _logits(image[part], text, scale)
            z += bias
            loss += F.softplus(z).sum() - z.diagonal(first).sum()
            dz = z.sigmoid_()
            dz.diagonal(first).sub_(1)
            d_scale += (dz * s).sum()
            d_bias += dz.sum()
            dz = dz.to(image.dtype)
            d_image[part] = scale * (dz @ text)
            d_text.addmm_(dz.T, image[part] * scale)
        ctx.save_for_backward(d_image, d_text, d_scale.to(scale.dtype), d_bias.to(bias.dtype))
        ctx.pairs = len(image)
        return loss / len(image)

    @staticmethod
    def backward(ctx, grad):
        share = grad / ctx.pairs
        return tuple((share * found).to(found.dtype) for found in ctx.saved_tensors)
