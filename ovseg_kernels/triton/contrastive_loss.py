"""contrastive_loss in Triton: logits exist tile by tile, d logits a chunk of images at a time.

Equation numbers: ``ovseg_kernels/ops``. Sums have one owner and a fixed order. float32 products are
exact, or tf32 where the operator allows it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import ACC, aligned, chunk_size, log1p_of, on_device, pitch, program, tiles, whole
from .center_assignment import _dot
from .similarity_contrastive_loss import add_to_lse, lse_of

CHUNK_BYTES = 64 << 20
TILE = {torch.float32: (64, 32), torch.float64: (16, 16)}  # rows and columns, and a step of depth
WARPS = 4
# Never a reason to compile again; what copies need to know of D, ALIGNED says.
SIZES = ["B", "T", "D", "P", "offset", "shift", "first", "last", "rows", "depth"]


@triton.jit
def _logits(
    own, other, i, j, B, T, D, PRECISION: tl.constexpr, ACC: tl.constexpr, BD: tl.constexpr
):
    """Return own_i . other_j of a tile."""
    s = tl.zeros((i.shape[0], j.shape[0]), ACC)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        a = tl.load(
            own + i.to(tl.int64)[:, None] * D + d[None, :],
            mask=(i < B)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        b = tl.load(
            other + j.to(tl.int64)[None, :] * D + d[:, None],
            mask=(j < T)[None, :] & (d < D)[:, None],
            other=0.0,
        )
        s = _dot(a, b, s, PRECISION, ACC)
    return s


@triton.jit
def _matched(i, j, mine, others, offset, inside, POSITIVES: tl.constexpr, ACC: tl.constexpr):
    """Return p of a tile: 1 for equal ids, or for the diagonal."""
    same = mine[:, None] == others[None, :] if POSITIVES == 1 else j[None, :] == i[:, None] + offset
    return (inside & same).to(ACC)


@triton.jit
def _first_at_least(columns, low, high, least):
    """Return, for each row, the first of its places from ``low`` to ``high`` that is not below."""
    open_rows = low < high
    while tl.max(open_rows.to(tl.int32), 0) > 0:
        middle = low + (high - low) // 2
        below = tl.load(columns + middle, mask=open_rows, other=0) < least
        low = tl.where(open_rows & below, middle + 1, low)
        high = tl.where(open_rows & (below == 0), middle, high)
        open_rows = low < high
    return low


@triton.jit
def _listed(columns, weights, next, end, j, last, ACC: tl.constexpr):
    """Return (p of a tile that ends before column ``last``, the places that follow it).

    A step takes one pair of every row; a pair listed twice is added in the order of the list.
    """
    p = tl.zeros((next.shape[0], j.shape[0]), ACC)
    column = tl.load(columns + next, mask=next < end, other=last)
    here = (next < end) & (column < last)
    while tl.max(here.to(tl.int32), 0) > 0:
        weight = tl.load(weights + next, mask=here, other=0.0)
        p += tl.where(here[:, None] & (column[:, None] == j[None, :]), weight[:, None], 0.0)
        next += here.to(tl.int64)
        column = tl.load(columns + next, mask=next < end, other=last)
        here = (next < end) & (column < last)
    return p, next


@triton.jit(do_not_specialize=SIZES)
def contrastive_loss_fwd_kernel(
    own,
    other,
    scale_at,
    bias_at,
    own_ids,
    other_ids,
    pair_weights,
    out,
    B,
    T,
    D,
    offset,
    shift,
    ALIGNED: tl.constexpr,
    POSITIVES: tl.constexpr,
    SIGMOID: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BD: tl.constexpr,
):
    """Write log-sum-exp (sigmoid: loss), sum of p z and sum of p of BI rows.

    Called with the sides swapped, of columns; their weights begin at ``shift``.
    """
    D = whole(D, ALIGNED)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    scale, bias = tl.load(scale_at), tl.load(bias_at)
    mine = tl.load(own_ids + i, mask=i < B, other=0) if POSITIVES else i
    end = tl.load(own_ids + i + 1, mask=i < B, other=0) if POSITIVES == 2 else mine
    top = tl.full((BI,), float("-inf"), ACC)
    total, hits, count = tl.zeros((BI,), ACC), tl.zeros((BI,), ACC), tl.zeros((BI,), ACC)
    for j0 in range(0, T, BI):
        j = j0 + tl.arange(0, BI)
        inside = (i < B)[:, None] & (j < T)[None, :]
        if POSITIVES == 2:
            p, mine = _listed(own_ids + B + 1, pair_weights + shift, mine, end, j, j0 + BI, ACC)
        else:
            others = tl.load(other_ids + j, mask=j < T, other=0) if POSITIVES else j
            p = _matched(i, j, mine, others, offset, inside, POSITIVES, ACC)
        z = scale * _logits(own, other, i, j, B, T, D, PRECISION, ACC, BD) + bias
        if SIGMOID:  # (4); softplus(-z) where p is 1, which cancels nothing
            x = tl.where(p >= 1, -z, z)
            softplus = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p_of(
                tl.exp(-tl.abs(x))
            )
            if POSITIVES == 2:
                softplus -= tl.where((p >= 1) | (p == 0), 0.0, p * z)
            total += tl.sum(tl.where(inside, softplus, 0.0), 1)
        else:
            x = tl.where(inside, z, float("-inf"))
            top, total = add_to_lse(top, total, x)
            hits += tl.sum(tl.where(p != 0, p * z, 0.0), 1)
            count += tl.sum(p, 1)
    if SIGMOID:
        count += 1.0
    else:
        total = lse_of(top, total)
    tl.store(out + i, total, mask=i < B)
    tl.store(out + B + i, hits, mask=i < B)
    tl.store(out + 2 * B + i, count, mask=i < B)


@triton.jit(do_not_specialize=SIZES)
def contrastive_loss_bwd_logits_kernel(
    image,
    text,
    scale_at,
    bias_at,
    grad_at,
    image_ids,
    text_ids,
    pair_weights,
    rows,
    columns,
    row_weight,
    column_weight,
    out,
    partial,
    first,
    last,
    B,
    T,
    P,
    D,
    offset,
    ALIGNED: tl.constexpr,
    POSITIVES: tl.constexpr,
    SIGMOID: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BD: tl.constexpr,
):
    """Write equation (5) or (6) of a tile, times the scale; and its shares of d scale, d bias."""
    P, D, image_tiles, text_tiles = (
        whole(P, True),
        whole(D, ALIGNED),
        tl.cdiv(last - first, BI),
        tl.cdiv(T, BI),
    )
    image_tile, text_tile, _ = program(image_tiles, text_tiles)
    i, j = first + image_tile * BI + tl.arange(0, BI), text_tile * BI + tl.arange(0, BI)
    inside = (i < last)[:, None] & (j < T)[None, :]
    scale, bias, grad = tl.load(scale_at), tl.load(bias_at), tl.load(grad_at)
    mine = tl.load(image_ids + i, mask=i < last, other=0) if POSITIVES else i
    if POSITIVES == 2:
        end = tl.load(image_ids + i + 1, mask=i < last, other=0)
        begin = _first_at_least(image_ids + B + 1, mine, end, text_tile * BI)
        p, _ = _listed(image_ids + B + 1, pair_weights, begin, end, j, (text_tile + 1) * BI, ACC)
    else:
        others = tl.load(text_ids + j, mask=j < T, other=0) if POSITIVES else j
        p = _matched(i, j, mine, others, offset, inside, POSITIVES, ACC)
    s = _logits(image, text, i, j, last, T, D, PRECISION, ACC, BD)
    z = scale * s + bias
    weight_i = tl.load(row_weight + i, mask=i < last, other=0.0)
    if SIGMOID:
        e = tl.exp(-tl.abs(z))
        dz = weight_i[:, None] * (tl.where(z > 0, 1.0, e) / (1.0 + e) - tl.where(p > 1, 1.0, p))
    else:
        lse_i, lse_j = (
            tl.load(rows + i, mask=i < last, other=0.0),
            tl.load(columns + j, mask=j < T, other=0.0),
        )
        weight_j = tl.load(column_weight + j, mask=j < T, other=0.0)
        total_i = tl.load(rows + 2 * B + i, mask=i < last, other=1.0)
        total_j = tl.load(columns + 2 * T + j, mask=j < T, other=1.0)
        share_i = weight_i / tl.where(total_i > 0, total_i, 1.0)
        share_j = weight_j / tl.where(total_j > 0, total_j, 1.0)
        dz = weight_i[:, None] * tl.exp(tl.where(inside, z - lse_i[:, None], 0.0))
        dz += weight_j[None, :] * tl.exp(tl.where(inside, z - lse_j[None, :], 0.0))
        dz -= tl.where(p != 0, p * (share_i[:, None] + share_j[None, :]), 0.0)
    dz = tl.where(inside, dz * grad, 0.0)
    at = out + (i - first).to(tl.int64)[:, None] * P + j[None, :]
    tl.store(at, tl.where(inside, scale * dz, 0.0), mask=(i < last)[:, None] & (j < P)[None, :])
    at = partial + (image_tile.to(tl.int64) * text_tiles + text_tile) * 2
    tl.store(at, tl.sum(tl.sum(dz.to(tl.float64) * tl.where(inside, s, 0.0).to(tl.float64), 1), 0))
    tl.store(at + 1, tl.sum(tl.sum(dz.to(tl.float64), 1), 0))


@triton.jit(do_not_specialize=SIZES)
def contrastive_loss_bwd_product_kernel(
    d_logits,
    features,
    out,
    rows,
    depth,
    P,
    D,
    ALIGNED: tl.constexpr,
    TURNED: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BD: tl.constexpr,
):
    """Write d features of one side, (7).

    out (+)= d_logits features, or of the transposed d_logits.
    """
    P, D = whole(P, True), whole(D, ALIGNED)
    row_tile, channel_tile, _ = program(tl.cdiv(rows, BI), tl.cdiv(D, BI))
    r, d = row_tile * BI + tl.arange(0, BI), channel_tile * BI + tl.arange(0, BI)
    sums = tl.zeros((BI, BI), ACC)
    for k0 in range(0, depth, BD):
        k = k0 + tl.arange(0, BD)
        if TURNED:  # d_logits [depth, rows]; zero up to the pitch
            dz = tl.load(
                d_logits + k.to(tl.int64)[None, :] * P + r[:, None],
                mask=(r < P)[:, None] & (k < depth)[None, :],
                other=0.0,
            )
        else:
            dz = tl.load(
                d_logits + r.to(tl.int64)[:, None] * P + k[None, :],
                mask=(r < rows)[:, None] & (k < P)[None, :],
                other=0.0,
            )
        x = tl.load(
            features + k.to(tl.int64)[:, None] * D + d[None, :],
            mask=(k < depth)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        sums = _dot(dz, x, sums, PRECISION, ACC)
    inside = (r < rows)[:, None] & (d < D)[None, :]
    at = out + r.to(tl.int64)[:, None] * D + d[None, :]
    if ADD:
        sums += tl.load(at, mask=inside, other=0.0)
    tl.store(at, sums, mask=inside)


def _options(image, text, image_ids, text_ids, pair_weights, tf32):
    """Return (ids of both sides, weights of pairs, POSITIVES, tile, options of all kernels).

    POSITIVES are 0 for the diagonal, 1 for equal ids, 2 for a list.
    """
    tile, step = TILE[image.dtype]
    ids = (image, image) if image_ids is None else (image_ids.contiguous(), text_ids.contiguous())
    positives = 2 if pair_weights is not None else int(image_ids is not None)
    weights = image if pair_weights is None else pair_weights.contiguous()
    shared = {
        "ALIGNED": aligned(image, text),
        "ACC": ACC[image.dtype],
        "PRECISION": "tf32" if tf32 else "ieee",
        "BI": tile,
        "BD": step,
        "num_warps": WARPS,
    }
    return ids, weights, positives, tile, shared


def stats(
    image, text, logit_scale, logit_bias, image_ids, text_ids, pair_weights, offset, sigmoid, tf32
):
    """Return (rows [3, B], columns [3, T]) as ``ovseg::contrastive_stats`` does."""
    image, text, (B, D), T = image.contiguous(), text.contiguous(), image.shape, text.shape[0]
    ids, weights, positives, tile, shared = _options(
        image, text, image_ids, text_ids, pair_weights, tf32
    )
    rows, columns = image.new_empty(3, B), image.new_zeros(3, T)
    pairs = weights.shape[1] if positives == 2 else 0
    sides = (
        (rows, image, text, ids, offset, 0),
        (columns, text, image, ids[::-1], -offset, pairs),
    )
    with on_device(image):
        for out, own, other, its, start, shift in sides[:1] if sigmoid else sides:
            if own.shape[0]:
                contrastive_loss_fwd_kernel[(tiles(own.shape[0], tile),)](
                    own,
                    other,
                    logit_scale,
                    logit_bias,
                    *its,
                    weights,
                    out,
                    own.shape[0],
                    other.shape[0],
                    D,
                    start,
                    shift,
                    POSITIVES=positives,
                    SIGMOID=sigmoid,
                    **shared,
                )
    return rows, columns


def backward(
    grad,
    image,
    text,
    logit_scale,
    logit_bias,
    image_ids,
    text_ids,
    pair_weights,
    rows,
    columns,
    row_weight,
    column_weight,
    offset,
    sigmoid,
    tf32,
    need_image,
    need_text,
):
    """Return the four gradients as ``ovseg::contrastive_loss_backward`` does.

    They are d image, d text, d logit_scale, d logit_bias.
    """
    image, text, (B, D), T = image.contiguous(), text.contiguous(), image.shape, text.shape[0]
    ids, weights, positives, tile, shared = _options(
        image, text, image_ids, text_ids, pair_weights, tf32
    )
    d_image, d_text = (
        image.new_zeros(B if need_image else 0, D),
        image.new_zeros(T if need_text else 0, D),
    )
    sums = torch.zeros(2, dtype=torch.float64, device=image.device)
    P = pitch(T)
    size = chunk_size(B, P * image.element_size(), CHUNK_BYTES)
    if B and T:
        d_logits = image.new_empty(size, P)
        saved = [x.contiguous() for x in (rows, columns, row_weight, column_weight)]
        with on_device(image):
            for first in range(0, B, size):
                last = min(first + size, B)
                image_tiles, text_tiles = tiles(last - first, tile), tiles(T, tile)
                partial = torch.empty(
                    image_tiles, text_tiles, 2, dtype=torch.float64, device=image.device
                )
                contrastive_loss_bwd_logits_kernel[(image_tiles * text_tiles,)](
                    image,
                    text,
                    logit_scale,
                    logit_bias,
                    grad,
                    *ids,
                    weights,
                    *saved,
                    d_logits,
                    partial,
                    first,
                    last,
                    B,
                    T,
                    P,
                    D,
                    offset,
                    POSITIVES=positives,
                    SIGMOID=sigmoid,
                    **shared,
                )
                sums += partial.sum((0, 1))
                if need_image:
                    contrastive_loss_bwd_product_kernel[(image_tiles * tiles(D, tile),)](
                        d_logits,
                        text,
                        d_image[first:],
                        last - first,
                        T,
                        P,
                        D,
                        TURNED=False,
                        ADD=False,
                        **shared,
                    )
                if need_text:
                    contrastive_loss_bwd_product_kernel[(text_tiles * tiles(D, tile),)](
                        d_logits,
                        image[first:],
                        d_text,
                        T,
                        last - first,
                        P,
                        D,
                        TURNED=True,
                        ADD=first > 0,
                        **shared,
                    )
    d_scale, d_bias = sums.to(image.dtype)
    return d_image, d_text, d_scale.clone(), d_bias.clone()
