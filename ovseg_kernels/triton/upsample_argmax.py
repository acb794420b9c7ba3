"""upsample_argmax in Triton: every class at every pixel, in registers.

A GPU has the flops; what it saves is the maps. Equation numbers:
``ovseg_kernels/ops/upsample_argmax.py``. The pruning (4) is left to the CPU and to CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.upsample_argmax import LABEL_TYPES
from ._launch import ACC, on_device, program, tiles

PIXELS, WARPS = 256, 4  # of a row


@triton.jit
def _between(at, samples, outputs, ACC: tl.constexpr):
    """Return lower and upper sample, and weight of the upper, (1)."""
    scale = samples.to(ACC) / outputs.to(ACC)
    source = tl.maximum((at.to(ACC) + 0.5) * scale - 0.5, 0.0)
    twice = (2 * at.to(tl.int64) + 1) * samples - outputs  # source, times 2 outputs
    # Rounding must not give a sample a weight that has none: it may be infinite.
    source = tl.where(
        (twice >= 0) & (twice % (2 * outputs) == 0), (twice // (2 * outputs)).to(ACC), source
    )
    low = tl.minimum(source.to(tl.int64), samples - 1)
    return low, tl.minimum(low + 1, samples - 1), source - low.to(ACC)


@triton.jit
def _weighted(weight, x):
    """Return weight times x; a sample of weight zero does not count, be it infinite."""
    return tl.where(weight == 0.0, 0.0, weight * tl.where(weight == 0.0, 0.0, x))


@triton.jit
def _store_label(
    labels,
    value,
    at,
    winner,
    best,
    inside,
    class_labels,
    threshold,
    background,
    labelled,
    limited,
    valued,
):
    """Write what follows from the winning class and its value.

    Options are looked at when it runs: each would be a compilation.
    """
    if labelled:
        winner = tl.load(class_labels + winner, mask=inside, other=0).to(tl.int64)
    if limited:
        winner = tl.where(best < tl.load(threshold), background, winner).to(tl.int64)
    tl.store(labels + at, winner.to(labels.dtype.element_ty), mask=inside)
    if valued:
        tl.store(value + at, best, mask=inside)


@triton.jit(
    do_not_specialize=[
        "C",
        "h",
        "w",
        "H",
        "W",
        "background",
        "biased",
        "labelled",
        "limited",
        "valued",
    ]
)
def upsample_argmax_fwd_kernel(
    logits,
    bias,
    class_labels,
    threshold,
    labels,
    value,
    C,
    h,
    w,
    H,
    W,
    background,
    biased,
    labelled,
    limited,
    valued,
    ACC: tl.constexpr,
    BW: tl.constexpr,
):
    """Write labels and values of a tile of pixels, (1) to (3)."""
    tile, Y, b = program(tl.cdiv(W, BW), H)
    X = tile * BW + tl.arange(0, BW)
    h, w, H, W = h.to(tl.int64), w.to(tl.int64), H.to(tl.int64), W.to(tl.int64)
    y0, y1, g = _between(Y + tl.zeros((BW,), tl.int32), h, H, ACC)
    x0, x1, f = _between(X, w, W, ACC)
    inside = X < W
    best, winner = tl.full((BW,), float("-inf"), ACC), tl.zeros((BW,), tl.int64)
    for c in range(0, C):
        plane = logits + (b * C + c) * h * w
        left = _weighted(1.0 - g, tl.load(plane + y0 * w + x0, mask=inside, other=0.0))
        left += _weighted(g, tl.load(plane + y1 * w + x0, mask=inside, other=0.0))
        right = _weighted(1.0 - g, tl.load(plane + y0 * w + x1, mask=inside, other=0.0))
        right += _weighted(g, tl.load(plane + y1 * w + x1, mask=inside, other=0.0))
        z = _weighted(1.0 - f, left) + _weighted(f, right)
        if biased:
            z += tl.load(bias + c)
        better = z > best
        winner = tl.where(better, c, winner)
        best = tl.where(better, z, best)
    at = (b * H + Y) * W + X
    _store_label(
        labels,
        value,
        at,
        winner,
        best,
        inside,
        class_labels,
        threshold,
        background,
        labelled,
        limited,
        valued,
    )


def forward(
    logits, bias, class_labels, height, width, threshold, background, label_type, want_value
):
    """Return (labels, value) as ``ovseg::upsample_argmax`` does."""
    logits, (B, C, h, w) = logits.contiguous(), logits.shape
    labels = torch.empty(B, height, width, dtype=LABEL_TYPES[label_type], device=logits.device)
    value = logits.new_empty(B if want_value else 0, height, width)
    limit = logits if threshold is None else logits.new_full((1,), threshold)
    if B:
        with on_device(logits):
            upsample_argmax_fwd_kernel[(tiles(width, PIXELS) * height * B,)](
                logits,
                logits if bias is None else bias.contiguous(),
                labels if class_labels is None else class_labels.contiguous(),
                limit,
                labels,
                value,
                C,
                h,
                w,
                height,
                width,
                background,
                int(bias is not None),
                int(class_labels is not None),
                int(threshold is not None),
                int(want_value),
                ACC=ACC[logits.dtype],
                BW=PIXELS,
                num_warps=WARPS,
            )
    return labels, value
