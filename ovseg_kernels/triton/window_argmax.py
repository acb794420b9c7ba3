"""window_argmax in Triton: every class at every output, in registers.

With softmax a first kernel keeps, for each pixel of the stage, the largest value and the sum over
the classes. Equation numbers: ``ovseg_kernels/ops/window_argmax.py``. The bounds are left to the
CPU and to CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.upsample_argmax import LABEL_TYPES
from ._launch import ACC, on_device, tiles
from .upsample_argmax import _between, _store_label, _weighted

PIXELS, WARPS = 128, 4
# Never a reason to compile again.
SIZES = [
    "pixels",
    "background",
    "biased",
    "labelled",
    "limited",
    "valued",
    "n",
    "G",
    "C",
    "h",
    "w",
    "hc",
    "wc",
    "Hc",
    "Wc",
    "H",
    "W",
]
WINDOW, MERGED, OUTPUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _activated(x, norms, at, pixels, inside, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        e = tl.exp(-tl.abs(x))
        x = tl.where(x < 0.0, e, 1.0) / (1.0 + e)
    if ACTIVATION == 2:
        x = tl.exp(x - tl.load(norms + at, mask=inside, other=0.0)) / tl.load(
            norms + pixels + at, mask=inside, other=1.0
        )
    return x


@triton.jit
def _window(
    values,
    index,
    norms,
    k,
    c,
    v,
    u,
    inside,
    G,
    C,
    h,
    w,
    hc,
    wc,
    pixels,
    TABLES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return (1) or (2) at pixels (v, u) of the crop."""
    at = (k * hc + v) * wc + u
    if TABLES:
        group = tl.load(index + at, mask=inside, other=0).to(tl.int64)
        x = tl.load(values + (k * G + group) * C + c, mask=inside, other=0.0)
    else:
        y0, y1, g = _between(v, h, hc, ACC)
        x0, x1, f = _between(u, w, wc, ACC)
        plane = values + (k * C + c) * h * w
        left = _weighted(1.0 - g, tl.load(plane + y0 * w + x0, mask=inside, other=0.0))
        left += _weighted(g, tl.load(plane + y1 * w + x0, mask=inside, other=0.0))
        right = _weighted(1.0 - g, tl.load(plane + y0 * w + x1, mask=inside, other=0.0))
        right += _weighted(g, tl.load(plane + y1 * w + x1, mask=inside, other=0.0))
        x = _weighted(1.0 - f, left) + _weighted(f, right)
    return _activated(x, norms, at, pixels, inside, ACTIVATION)


@triton.jit
def _merged(
    values,
    index,
    origins,
    norms,
    c,
    v,
    u,
    wanted,
    n,
    G,
    C,
    h,
    w,
    hc,
    wc,
    Wc,
    pixels,
    TABLES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGE: tl.constexpr,
    ACC: tl.constexpr,
    BW: tl.constexpr,
):
    """Return (3) at pixels (v, u) of the canvas."""
    total, count = tl.zeros((BW,), ACC), tl.zeros((BW,), ACC)
    for k in range(0, n):
        y, x = v - tl.load(origins + 2 * k), u - tl.load(origins + 2 * k + 1)
        inside = wanted & (y >= 0) & (y < hc) & (x >= 0) & (x < wc)
        y, x = tl.where(inside, y, 0), tl.where(inside, x, 0)
        found = _window(
            values,
            index,
            norms,
            k,
            c,
            y,
            x,
            inside,
            G,
            C,
            h,
            w,
            hc,
            wc,
            pixels,
            TABLES,
            ACTIVATION if STAGE == WINDOW else 0,
            ACC,
        )
        total += tl.where(inside, found, 0.0)
        count += tl.where(inside, 1.0, 0.0)
    merged = total / tl.maximum(count, 1.0)
    return _activated(
        merged, norms, v * Wc + u, pixels, wanted, ACTIVATION if STAGE == MERGED else 0
    )


@triton.jit
def _output(
    values,
    index,
    origins,
    norms,
    c,
    Y,
    X,
    wanted,
    n,
    G,
    C,
    h,
    w,
    hc,
    wc,
    Hc,
    Wc,
    H,
    W,
    pixels,
    TABLES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGE: tl.constexpr,
    ACC: tl.constexpr,
    BW: tl.constexpr,
):
    """Return (4) without the bias."""
    v0, v1, g = _between(Y, Hc, H, ACC)
    u0, u1, f = _between(X, Wc, W, ACC)
    z = tl.zeros((BW,), ACC)
    for corner in tl.static_range(0, 4):
        v, to_row = (v1, g) if corner // 2 else (v0, 1.0 - g)
        u, to_column = (u1, f) if corner % 2 else (u0, 1.0 - f)
        m = _merged(
            values,
            index,
            origins,
            norms,
            c,
            v,
            u,
            wanted,
            n,
            G,
            C,
            h,
            w,
            hc,
            wc,
            Wc,
            pixels,
            TABLES,
            ACTIVATION,
            STAGE,
            ACC,
            BW,
        )
        z += _weighted(to_row * to_column, m)
    return _activated(z, norms, Y * W + X, pixels, wanted, ACTIVATION if STAGE == OUTPUT else 0)


@triton.jit(do_not_specialize=SIZES)
def window_argmax_norm_kernel(
    values,
    index,
    origins,
    norms,
    pixels,
    n,
    G,
    C,
    h,
    w,
    hc,
    wc,
    Hc,
    Wc,
    H,
    W,
    TABLES: tl.constexpr,
    STAGE: tl.constexpr,
    ACC: tl.constexpr,
    BW: tl.constexpr,
):
    """Write largest value and sum over the classes of a tile of pixels, for the softmax."""
    at = tl.program_id(0).to(tl.int64) * BW + tl.arange(0, BW)
    wanted = at < pixels
    h, w, hc, wc, H, W = (
        h.to(tl.int64),
        w.to(tl.int64),
        hc.to(tl.int64),
        wc.to(tl.int64),
        H.to(tl.int64),
        W.to(tl.int64),
    )
    Hc, Wc = Hc.to(tl.int64), Wc.to(tl.int64)
    top, total = tl.full((BW,), float("-inf"), ACC), tl.zeros((BW,), ACC)
    for c in range(0, C):
        if STAGE == WINDOW:
            k, v, u = at // (hc * wc), at // wc % hc, at % wc
            x = _window(
                values, index, norms, k, c, v, u, wanted, G, C, h, w, hc, wc, pixels, TABLES, 0, ACC
            )
        elif STAGE == MERGED:
            x = _merged(
                values,
                index,
                origins,
                norms,
                c,
                at // Wc,
                at % Wc,
                wanted,
                n,
                G,
                C,
                h,
                w,
                hc,
                wc,
                Wc,
                pixels,
                TABLES,
                0,
                STAGE,
                ACC,
                BW,
            )
        else:
            x = _output(
                values,
                index,
                origins,
                norms,
                c,
                at // W,
                at % W,
                wanted,
                n,
                G,
                C,
                h,
                w,
                hc,
                wc,
                Hc,
                Wc,
                H,
                W,
                pixels,
                TABLES,
                0,
                STAGE,
                ACC,
                BW,
            )
        larger = tl.maximum(top, x)
        total = total * tl.exp(top - larger) + tl.exp(x - larger)
        top = larger
    tl.store(norms + at, top, mask=wanted)
    tl.store(norms + pixels + at, total, mask=wanted)


@triton.jit(do_not_specialize=SIZES)
def window_argmax_fwd_kernel(
    values,
    index,
    origins,
    bias,
    class_labels,
    threshold,
    norms,
    labels,
    best_value,
    pixels,
    background,
    biased,
    labelled,
    limited,
    valued,
    n,
    G,
    C,
    h,
    w,
    hc,
    wc,
    Hc,
    Wc,
    H,
    W,
    TABLES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGE: tl.constexpr,
    ACC: tl.constexpr,
    BW: tl.constexpr,
):
    """Write labels and values of a tile of outputs, (1) to (5)."""
    at = tl.program_id(0).to(tl.int64) * BW + tl.arange(0, BW)
    h, w, hc, wc, H, W = (
        h.to(tl.int64),
        w.to(tl.int64),
        hc.to(tl.int64),
        wc.to(tl.int64),
        H.to(tl.int64),
        W.to(tl.int64),
    )
    Hc, Wc = Hc.to(tl.int64), Wc.to(tl.int64)
    wanted = at < H * W
    Y, X = tl.where(wanted, at // W, 0), tl.where(wanted, at % W, 0)
    best, winner = tl.full((BW,), float("-inf"), ACC), tl.zeros((BW,), tl.int64)
    for c in range(0, C):
        z = _output(
            values,
            index,
            origins,
            norms,
            c,
            Y,
            X,
            wanted,
            n,
            G,
            C,
            h,
            w,
            hc,
            wc,
            Hc,
            Wc,
            H,
            W,
            pixels,
            TABLES,
            ACTIVATION,
            STAGE,
            ACC,
            BW,
        )
        if biased:
            z += tl.load(bias + c)
        better = z > best
        winner = tl.where(better, c, winner)
        best = tl.where(better, z, best)
    _store_label(
        labels,
        best_value,
        at,
        winner,
        best,
        wanted,
        class_labels,
        threshold,
        background,
        labelled,
        limited,
        valued,
    )


def forward(
    values,
    index,
    origins,
    bias,
    class_labels,
    crop_height,
    crop_width,
    canvas_height,
    canvas_width,
    height,
    width,
    activation,
    stage,
    threshold,
    background,
    label_type,
    want_value,
):
    """Return (labels, value) as ``ovseg::window_argmax`` does."""
    values, origins = values.contiguous(), origins.contiguous()
    labels = torch.empty(height, width, dtype=LABEL_TYPES[label_type], device=values.device)
    value = values.new_empty(height if want_value else 0, width)
    limit = values if threshold is None else values.new_full((1,), threshold)
    tables = index is not None
    n, G, C, h, w = (*values.shape, 1, 1) if tables else (values.shape[0], 1, *values.shape[1:])
    sizes = (n, G, C, h, w, crop_height, crop_width, canvas_height, canvas_width, height, width)
    pixels = (
        (n * crop_height * crop_width, canvas_height * canvas_width, height * width)[stage]
        if activation == 2
        else 0
    )
    norms = values.new_empty(2 * pixels) if pixels else values
    maps = (values, index.contiguous() if tables else values, origins)
    same = {
        "TABLES": tables,
        "STAGE": stage if activation else 0,
        "ACC": ACC[values.dtype],
        "BW": PIXELS,
        "num_warps": WARPS,
    }
    with on_device(values):
        if pixels:
            window_argmax_norm_kernel[(tiles(pixels, PIXELS),)](
                *maps, norms, pixels, *sizes, **same
            )
        window_argmax_fwd_kernel[(tiles(height * width, PIXELS),)](
            *maps,
            values if bias is None else bias.contiguous(),
            origins if class_labels is None else class_labels.contiguous(),
            limit,
            norms,
            labels,
            value,
            pixels,
            background,
            int(bias is not None),
            int(class_labels is not None),
            int(threshold is not None),
            int(want_value),
            *sizes,
            ACTIVATION=activation,
            **same,
        )
    return labels, value
