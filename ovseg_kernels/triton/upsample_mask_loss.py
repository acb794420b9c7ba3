"""upsample_mask_loss in Triton.

Forward: programs share a map, sum over their pixels, and torch adds their parts. Backward: the
gradients of the outputs are gathered for each row of samples, [C, h, W] of a few images, and from
there for each column.

Equation numbers: ``ovseg_kernels/ops/upsample_mask_loss.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.upsample_argmax import between
from ._launch import ACC, chunk_size, halves, joined, log1p_of, on_device, program, tiles
from .upsample_argmax import _between

PIXELS, COLUMNS, WARPS = 512, 128, 4
SHARE, SPLITS = 16384, 32  # pixels of a map for one program; programs for one map at most
IGNORED = tl.constexpr(-2)
LIMIT = 64 * 2**20  # bytes between the two kernels of the backward


@triton.jit
def _pixel(map_, code, c, Y, X, inside, h, w, H, W, gamma, SQUARE: tl.constexpr, ACC: tl.constexpr):
    """Return y = 1, q, v^gamma, v, softplus(-t) and q (1 - q) of each pixel, and its place.

    The place is where it lies between rows of samples.
    """
    y0, y1, g = _between(Y, h, H, ACC)
    x0, x1, f = _between(X, w, W, ACC)
    left = (1.0 - g) * tl.load(map_ + y0 * w + x0, mask=inside, other=0.0) + g * tl.load(
        map_ + y1 * w + x0, mask=inside, other=0.0
    )
    right = (1.0 - g) * tl.load(map_ + y0 * w + x1, mask=inside, other=0.0) + g * tl.load(
        map_ + y1 * w + x1, mask=inside, other=0.0
    )
    x = (1.0 - f) * left + f * right
    positive = code == c
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    t = tl.where(positive, x, -x)
    v = tl.where(t < 0.0, large, small)
    softplus = tl.maximum(-t, 0.0) + log1p_of(e)
    softplus = tl.where(t != t, t, softplus)  # a maximum may lose NaN
    power = (
        v * v
        if SQUARE
        else tl.where(
            v > 0.0,
            tl.exp(gamma * tl.log(tl.where(v > 0.0, v, 1.0))),
            tl.where(gamma > 0.0, 0.0, 1.0),
        )
    )
    return positive, tl.where(x < 0.0, small, large), power, v, softplus, large * small, y0, y1, g


@triton.jit(do_not_specialize=["C", "h", "w", "H", "W", "maps", "splits"])
def upsample_mask_loss_fwd_kernel(
    logits,
    codes,
    parts,
    alpha,
    alpha_low,
    gamma,
    gamma_low,
    C,
    h,
    w,
    H,
    W,
    maps,
    splits,
    SQUARE: tl.constexpr,
    ACC: tl.constexpr,
    BP: tl.constexpr,
):
    """Write one program's sums over the pixels of a map, of which (2) to (4) are made."""
    place = program(splits, 1)
    split, plane = place[0].to(tl.int64), place[2]
    h, w, H, W = h.to(tl.int64), w.to(tl.int64), H.to(tl.int64), W.to(tl.int64)
    alpha, gamma = joined(alpha, alpha_low, ACC), joined(gamma, gamma_low, ACC)
    c, pixels = plane % C, H * W
    focal, q_sum, qy_sum = tl.zeros((BP,), ACC), tl.zeros((BP,), ACC), tl.zeros((BP,), ACC)
    y_sum, count = tl.zeros((BP,), ACC), tl.zeros((BP,), ACC)
    begin, end = pixels * split // splits, pixels * (split + 1) // splits
    for first in range(begin, end, BP):
        at = first + tl.arange(0, BP)
        code = tl.load(codes + plane // C * pixels + at, mask=at < end, other=IGNORED)
        counts = code != IGNORED
        positive, q, power, _, softplus, _, _, _, _ = _pixel(
            logits + plane * h * w,
            code,
            c,
            at // W,
            at % W,
            at < end,
            h,
            w,
            H,
            W,
            gamma,
            SQUARE,
            ACC,
        )
        focal += tl.where(counts, tl.where(positive, alpha, 1.0 - alpha) * power * softplus, 0.0)
        q_sum += tl.where(counts, q, 0.0)
        qy_sum += tl.where(positive, q, 0.0)
        y_sum += tl.where(positive, 1.0, 0.0)
        count += tl.where(counts, 1.0, 0.0)
    out = parts + split * 5 * maps + plane
    tl.store(out, tl.sum(focal))
    tl.store(out + maps, tl.sum(q_sum))
    tl.store(out + 2 * maps, tl.sum(qy_sum))
    tl.store(out + 3 * maps, tl.sum(y_sum))
    tl.store(out + 4 * maps, tl.sum(count))


@triton.jit(do_not_specialize=["C", "h", "w", "H", "W"])
def upsample_mask_loss_rows_kernel(
    logits,
    codes,
    weights,
    starts,
    rows,
    alpha,
    alpha_low,
    gamma,
    gamma_low,
    C,
    h,
    w,
    H,
    W,
    SQUARE: tl.constexpr,
    ACC: tl.constexpr,
    BW: tl.constexpr,
):
    """Write (5) gathered for the rows of samples: rows [maps, h, W]."""
    tile, sample, plane = program(tl.cdiv(W, BW), h)
    sample, X = sample.to(tl.int64), tile.to(tl.int64) * BW + tl.arange(0, BW)
    h, w, H, W = h.to(tl.int64), w.to(tl.int64), H.to(tl.int64), W.to(tl.int64)
    alpha, gamma = joined(alpha, alpha_low, ACC), joined(gamma, gamma_low, ACC)
    c, inside = plane % C, X < W
    to_focal, to_dice, to_dice_y = (
        tl.load(weights + 3 * plane),
        tl.load(weights + 3 * plane + 1),
        tl.load(weights + 3 * plane + 2),
    )
    total = tl.zeros((BW,), ACC)
    for Y in range(tl.load(starts + tl.maximum(sample - 1, 0)), tl.load(starts + sample + 1)):
        code = tl.load(codes + (plane // C * H + Y) * W + X, mask=inside, other=IGNORED)
        row = Y + tl.zeros((BW,), tl.int64)
        positive, _, power, v, softplus, slope, y0, y1, g = _pixel(
            logits + plane * h * w, code, c, row, X, inside, h, w, H, W, gamma, SQUARE, ACC
        )
        bend = power * (gamma * (1.0 - v) * softplus + v)
        grad = (
            to_focal * tl.where(positive, -alpha, 1.0 - alpha) * bend
            + (to_dice - tl.where(positive, to_dice_y, 0.0)) * slope
        )
        share = tl.where(y0 == sample, 1.0 - g, 0.0) + tl.where(y1 == sample, g, 0.0)
        total += tl.where(code == IGNORED, 0.0, share * grad)
    tl.store(rows + (plane * h + sample) * W + X, total, mask=inside)


@triton.jit(do_not_specialize=["lines", "w", "W", "taps"])
def upsample_mask_loss_columns_kernel(
    rows, starts, grad, lines, w, W, taps, ACC: tl.constexpr, BW: tl.constexpr
):
    """Write rows of outputs, gathered for the columns of samples."""
    tile, _, line = program(tl.cdiv(w, BW), 1)
    x = tile.to(tl.int64) * BW + tl.arange(0, BW)
    w, W = w.to(tl.int64), W.to(tl.int64)
    inside = x < w
    first = tl.load(starts + tl.maximum(x - 1, 0), mask=inside, other=0)
    last = tl.load(starts + x + 1, mask=inside, other=0)
    total = tl.zeros((BW,), ACC)
    for tap in range(0, taps):
        X = first + tap
        x0, x1, f = _between(X, w, W, ACC)
        share = tl.where(x0 == x, 1.0 - f, 0.0) + tl.where(x1 == x, f, 0.0)
        total += tl.where(
            last > X, share * tl.load(rows + line * W + X, mask=inside & (last > X), other=0.0), 0.0
        )
    tl.store(grad + line * w + x, total, mask=inside)


def forward(logits, codes, alpha, gamma):
    """Return (focal, dice, present, sums) as ``ovseg::upsample_mask_loss`` does."""
    logits, codes, (B, C, h, w), (H, W) = (
        logits.contiguous(),
        codes.contiguous(),
        logits.shape,
        codes.shape[1:],
    )
    splits = min(tiles(H * W, SHARE), SPLITS)
    parts = logits.new_zeros(splits, 5, B, C)
    if B:
        with on_device(logits):
            upsample_mask_loss_fwd_kernel[(B * C * splits,)](
                logits,
                codes,
                parts,
                *halves(alpha),
                *halves(gamma),
                C,
                h,
                w,
                H,
                W,
                B * C,
                splits,
                SQUARE=gamma == 2,
                ACC=ACC[logits.dtype],
                BP=PIXELS,
                num_warps=WARPS,
            )
    focal, *sums, pixels = parts.sum(0)
    q, qy, y = sums
    return focal / pixels.clamp_min(1), 1 - (2 * qy + 1) / (q + y + 1), y > 0, torch.stack(sums)


def _starts(samples, outputs, like):
    """Return [samples + 1]: the first output whose lower sample is at least this."""
    low = between(samples, outputs, like.dtype, like.device)[0]
    return torch.searchsorted(low, torch.arange(samples + 1, device=like.device))


def backward(grad_focal, grad_dice, logits, codes, sums, alpha, gamma):
    """Return the gradient of the logits, (5)."""
    logits, codes, (B, C, h, w), (H, W) = (
        logits.contiguous(),
        codes.contiguous(),
        logits.shape,
        codes.shape[1:],
    )
    q, qy, y = sums
    pixels, below = (codes != -2).sum((1, 2))[:, None].clamp_min(1), q + y + 1
    weights = torch.stack(
        [grad_focal / pixels, grad_dice * (2 * qy + 1) / below**2, 2 * grad_dice / below], -1
    ).contiguous()
    grad = torch.empty_like(logits)
    down, across = _starts(h, H, logits), _starts(w, W, logits)
    # At least the outputs of two neighbouring cells; the first is half as wide again.
    taps = 5 * W // (2 * w) + 4
    size = chunk_size(B, C * h * W * logits.element_size(), LIMIT)
    same = {"ACC": ACC[logits.dtype], "BW": COLUMNS, "num_warps": WARPS}
    with on_device(logits):
        for first in range(0, B, size):
            some = slice(first, first + size)
            maps = logits[some].shape[0] * C
            rows = logits.new_empty(maps, h, W)
            upsample_mask_loss_rows_kernel[(maps * h * tiles(W, COLUMNS),)](
                logits[some],
                codes[some],
                weights[some],
                down,
                rows,
                *halves(alpha),
                *halves(gamma),
                C,
                h,
                w,
                H,
                W,
                SQUARE=gamma == 2,
                **same,
            )
            upsample_mask_loss_columns_kernel[(maps * h * tiles(w, COLUMNS),)](
                rows, across, grad[some], maps * h, w, W, taps, **same
            )
    return grad
