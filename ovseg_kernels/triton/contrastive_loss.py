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
SIZES = ["B", "T", "D", "P", "offset", "first", "last", "rows", "depth"]


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
def _positive(i, j, mine, others, offset, inside, IDS: tl.constexpr):
    same = mine[:, None] == others[None, :] if IDS else j[None, :] == i[:, None] + offset
    return inside & same


@triton.jit(do_not_specialize=SIZES)
def contrastive_loss_fwd_kernel(
    own,
    other,
    scale_at,
    bias_at,
    own_ids,
    other_ids,
    out,
    B,
    T,
    D,
    offset,
    ALIGNED: tl.constexpr,
    IDS: tl.constexpr,
    SIGMOID: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BD: tl.constexpr,
):
    """Write log-sum-exp (sigmoid: loss), sum and number of positives of BI rows.

    Called with the sides swapped, of columns.
    """
    D = whole(D, ALIGNED)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    scale, bias = tl.load(scale_at), tl.load(bias_at)
    mine = tl.load(own_ids + i, mask=i < B, other=0) if IDS else i
    top = tl.full((BI,), float("-inf"), ACC)
    total, hits, count = tl.zeros((BI,), ACC), tl.zeros((BI,), ACC), tl.zeros((BI,), ACC)
    for j0 in range(0, T, BI):
        j = j0 + tl.arange(0, BI)
        inside = (i < B)[:, None] & (j < T)[None, :]
        others = tl.load(other_ids + j, mask=j < T, other=0) if IDS else j
        positive = _positive(i, j, mine, others, offset, inside, IDS)
        z = scale * _logits(own, other, i, j, B, T, D, PRECISION, ACC, BD) + bias
        if SIGMOID:  # (4)
            x = tl.where(positive, -z, z)
            softplus = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p_of(
                tl.exp(-tl.abs(x))
            )
            total += tl.sum(tl.where(inside, softplus, 0.0), 1)
        else:
            x = tl.where(inside, z, float("-inf"))
            top, total = add_to_lse(top, total, x)
            hits += tl.sum(tl.where(positive, z, 0.0), 1)
            count += tl.sum(positive.to(ACC), 1)
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
    IDS: tl.constexpr,
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
    mine = tl.load(image_ids + i, mask=i < last, other=0) if IDS else i
    others = tl.load(text_ids + j, mask=j < T, other=0) if IDS else j
    positive = _positive(i, j, mine, others, offset, inside, IDS)
    s = _logits(image, text, i, j, last, T, D, PRECISION, ACC, BD)
    z = scale * s + bias
    weight_i = tl.load(row_weight + i, mask=i < last, other=0.0)
    if SIGMOID:
        e = tl.exp(-tl.abs(z))
        dz = weight_i[:, None] * (tl.where(z > 0, 1.0, e) / (1.0 + e) - positive.to(ACC))
    else:
        lse_i, lse_j = (
            tl.load(rows + i, mask=i < last, other=0.0),
            tl.load(columns + j, mask=j < T, other=0.0),
        )
        weight_j = tl.load(column_weight + j, mask=j < T, other=0.0)
        share_i = weight_i / tl.maximum(tl.load(rows + 2 * B + i, mask=i < last, other=1.0), 1.0)
        share_j = weight_j / tl.maximum(tl.load(columns + 2 * T + j, mask=j < T, other=1.0), 1.0)
        dz = weight_i[:, None] * tl.exp(tl.where(inside, z - lse_i[:, None], 0.0))
        dz += weight_j[None, :] * tl.exp(tl.where(inside, z - lse_j[None, :], 0.0))
        dz -= tl.where(positive, share_i[:, None] + share_j[None, :], 0.0)
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


def _options(image, text, image_ids, text_ids, tf32):
    tile, step = TILE[image.dtype]
    ids = (image, image) if image_ids is None else (image_ids.contiguous(), text_ids.contiguous())
    shared = {
        "ALIGNED": aligned(image, text),
        "ACC": ACC[image.dtype],
        "PRECISION": "tf32" if tf32 else "ieee",
        "BI": tile,
        "BD": step,
        "num_warps": WARPS,
    }
    return ids, image_ids is not None, tile, shared


def stats(image, text, logit_scale, logit_bias, image_ids, text_ids, offset, sigmoid, tf32):
    """Return (rows [3, B], columns [3, T]) as ``ovseg::contrastive_stats`` does."""
    image, text, (B, D), T = image.contiguous(), text.contiguous(), image.shape, text.shape[0]
    ids, with_ids, tile, shared = _options(image, text, image_ids, text_ids, tf32)
    rows, columns = image.new_empty(3, B), image.new_zeros(3, T)
    sides = ((rows, image, text, ids, offset), (columns, text, image, ids[::-1], -offset))
    with on_device(image):
        for out, own, other, its, start in sides[:1] if sigmoid else sides:
            if own.shape[0]:
                contrastive_loss_fwd_kernel[(tiles(own.shape[0], tile),)](
                    own,
                    other,
                    logit_scale,
                    logit_bias,
                    *its,
                    out,
                    own.shape[0],
                    other.shape[0],
                    D,
                    start,
                    IDS=with_ids,
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
    ids, with_ids, tile, shared = _options(image, text, image_ids, text_ids, tf32)
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
                    IDS=with_ids,
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
