"""Kernels of contrastive_loss. Equation numbers: ``ovseg_kernels/ops/contrastive_loss.py``.

A tile of the logits lives in registers. Statistics of its rows and columns are written apart and
merged by a second kernel in a fixed order; its gradients leave as coefficients, which the launcher
multiplies with the features. Softmax logits are in units of log 2, for one instruction makes 2 ** x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import log1p_of, whole
from .center_assignment import _dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Never a reason to compile again; the rows that are read start at 16 bytes whatever D is.
SIZES = ["B", "T", "D", "offset", "first", "last", "left", "right", "begin", "end", "count"]


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
    """Return p of a tile that ends before column ``last``; ``next`` is the first place in it.

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
    return p


@triton.jit
def _positives(
    image_ids,
    text_ids,
    pair_weights,
    i,
    j,
    last,
    right,
    B,
    offset,
    POSITIVES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return p of a tile: of a list, 1 for equal ids, or 1 on the diagonal; 0 outside."""
    if POSITIVES == 2:
        pairs = image_ids + B + 1
        begin = tl.load(image_ids + i, mask=i < last, other=0)
        end = tl.load(image_ids + i + 1, mask=i < last, other=0)
        begin = _first_at_least(pairs, begin, end, tl.min(j, 0))
        p = _listed(pairs, pair_weights, begin, end, j, tl.max(j, 0) + 1, ACC)
    else:
        if POSITIVES == 1:
            mine = tl.load(image_ids + i, mask=i < last, other=0)
            others = tl.load(text_ids + j, mask=j < right, other=0)
            same = mine[:, None] == others[None, :]
        else:
            same = i[:, None] + offset == j[None, :]
        p = (same & (i < last)[:, None] & (j < right)[None, :]).to(ACC)
    return p


@triton.jit
def _similarities(
    image,
    text,
    image_factor,
    text_factor,
    i,
    j,
    last,
    right,
    D,
    FACTORS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
):
    """Return s of a tile, (1): what is behind the last row is read as 0."""
    i0 = tl.min(i, 0)
    j0 = tl.min(j, 0)
    s = tl.zeros((i.shape[0], j.shape[0]), ACC)
    for d0 in range(0, D, BD):
        s = _dot(image.load([i0, d0]), text.load([j0, d0]).T, s, PRECISION, ACC)
    if FACTORS:
        s *= tl.load(image_factor + i, mask=i < last, other=0.0)[:, None]
        s *= tl.load(text_factor + j, mask=j < right, other=0.0)[None, :]
    return s


@triton.jit
def _meets(i, j, offset, POSITIVES: tl.constexpr):
    """Return whether a tile may hold a positive: most tiles have nothing of the diagonal."""
    if POSITIVES == 0:
        met = (tl.min(i, 0) + offset <= tl.max(j, 0)) & (tl.max(i, 0) + offset >= tl.min(j, 0))
    else:
        met = tl.full((), True, tl.int1)
    return met


@triton.jit
def _write_part(out, size, x, top, total, hits, count, inside):
    """Write the four statistics of the rows or columns of one tile, ``size`` apart."""
    tl.store(out + x, top, mask=inside)
    tl.store(out + size + x, total, mask=inside)
    tl.store(out + 2 * size + x, hits, mask=inside)
    tl.store(out + 3 * size + x, count, mask=inside)


@triton.jit
def _finite(top):
    """Return a maximum as exponentials take it: 0 for that of nothing."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit(do_not_specialize=SIZES)
def contrastive_loss_stats_kernel(
    image,
    text,
    image_factor,
    text_factor,
    scale_at,
    bias_at,
    image_ids,
    text_ids,
    pair_weights,
    row_parts,
    column_parts,
    first,
    last,
    B,
    T,
    D,
    offset,
    FACTORS: tl.constexpr,
    POSITIVES: tl.constexpr,
    SIGMOID: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the parts of every tile of the images from ``first`` to ``last``.

    Softmax: maximum, sum of exponentials by it, sum of p z, sum of p, of rows and of columns; those
    of columns begin behind what earlier images left. Sigmoid: the sum (4) of rows.
    """
    scale, bias = tl.load(scale_at), tl.load(bias_at)
    image_tiles, text_tiles = tl.cdiv(last - first, BI), tl.cdiv(T, BJ)
    for tile in tl.range(
        tl.program_id(0), image_tiles * text_tiles, tl.num_programs(0), flatten=True
    ):
        image_tile, text_tile = tile % image_tiles, tile // image_tiles
        i = first + image_tile * BI + tl.arange(0, BI)
        j = text_tile * BJ + tl.arange(0, BJ)
        s = _similarities(
            image, text, image_factor, text_factor, i, j, last, T, D, FACTORS, ACC, PRECISION, BD
        )
        met = _meets(i, j, offset, POSITIVES)
        inside = (i < last)[:, None] & (j < T)[None, :]
        own_parts = row_parts + text_tile.to(tl.int64) * (last - first) * (1 if SIGMOID else 4)
        if SIGMOID:
            z = scale * s + bias
            p = _positives(
                image_ids, text_ids, pair_weights, i, j, last, T, B, offset, POSITIVES, ACC
            )
            x = tl.where(p >= 1, -z, z)  # softplus(-z) where p is 1 cancels nothing
            loss = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
            loss += log1p_of(tl.exp(-tl.abs(x)))
            if POSITIVES == 2:
                loss -= tl.where((p >= 1) | (p == 0), 0.0, p * z)
            total = tl.sum(tl.where(inside, loss, 0.0), 1)
            tl.store(own_parts + i - first, total, mask=i < last)
        else:
            z = scale * LOG2E * s
            row_hits, row_count = tl.zeros((BI,), ACC), tl.zeros((BI,), ACC)
            column_hits, column_count = tl.zeros((BJ,), ACC), tl.zeros((BJ,), ACC)
            if met:
                p = _positives(
                    image_ids, text_ids, pair_weights, i, j, last, T, B, offset, POSITIVES, ACC
                )
                hit = tl.where(p != 0, p * z, 0.0)
                row_hits, column_hits = tl.sum(hit, 1), tl.sum(hit, 0)
                row_count, column_count = tl.sum(p, 1), tl.sum(p, 0)
            z = tl.where(inside, z, float("-inf"))
            # A NaN that the maximum passes over stays one in the sum.
            top = tl.max(z, 1)
            total = tl.sum(tl.exp2(z - _finite(top)[:, None]), 1)
            _write_part(
                own_parts, last - first, i - first, top, total, row_hits, row_count, i < last
            )
            top = tl.max(z, 0)
            total = tl.sum(tl.exp2(z - _finite(top)[None, :]), 0)
            _write_part(
                column_parts + (image_tile + 1).to(tl.int64) * T * 4,
                T,
                j,
                top,
                total,
                column_hits,
                column_count,
                j < T,
            )


@triton.jit(do_not_specialize=SIZES)
def contrastive_loss_merge_kernel(
    parts,
    out,
    begin,
    end,
    count,
    B,
    SIGMOID: tl.constexpr,
    KEEP: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """Merge the parts from ``begin`` to ``end`` of BR of the ``count`` rows, or columns.

    The result is their statistics in ``out``, whose three lines lie B apart; with KEEP it is part
    0, of all tiles so far. The order of every sum is that of the tiles.
    """
    c = tl.program_id(0) * BR + tl.arange(0, BR)
    size = tl.cast(count, tl.int64)
    total = tl.zeros((BR,), ACC)
    if SIGMOID:
        for k0 in range(begin, end, BP):
            k = k0 + tl.arange(0, BP)
            some = (k < end)[:, None] & (c < count)[None, :]
            at = k.to(tl.int64)[:, None] * size + c[None, :]
            total += tl.sum(tl.load(parts + at, mask=some, other=0.0), 0)
        hits, positives = tl.zeros((BR,), ACC), tl.full((BR,), 1.0, ACC)
    else:
        top = tl.full((BR,), float("-inf"), ACC)
        for k0 in range(begin, end, BP):
            k = k0 + tl.arange(0, BP)
            some = (k < end)[:, None] & (c < count)[None, :]
            at = k.to(tl.int64)[:, None] * 4 * size + c[None, :]
            top = tl.maximum(
                top, tl.max(tl.load(parts + at, mask=some, other=float("-inf")), 0)
            )
        hits, positives = tl.zeros((BR,), ACC), tl.zeros((BR,), ACC)
        for k0 in range(begin, end, BP):
            k = k0 + tl.arange(0, BP)
            some = (k < end)[:, None] & (c < count)[None, :]
            at = parts + k.to(tl.int64)[:, None] * 4 * size + c[None, :]
            its_top = tl.load(at, mask=some, other=float("-inf"))
            share = tl.load(at + size, mask=some, other=0.0)
            total += tl.sum(share * tl.exp2(its_top - _finite(top)[None, :]), 0)
            hits += tl.sum(tl.load(at + 2 * size, mask=some, other=0.0), 0)
            positives += tl.sum(tl.load(at + 3 * size, mask=some, other=0.0), 0)
    if KEEP:
        _write_part(parts, size, c, top, total, hits, positives, c < count)
    else:
        if not SIGMOID:
            some = total != 0.0
            lse = (_finite(top) + tl.log2(tl.where(some, total, 1.0))) * LN2
            total = tl.where(some, lse, float("-inf"))
            hits *= LN2
        tl.store(out + c, total, mask=c < count)
        tl.store(out + B + c, hits, mask=c < count)
        tl.store(out + 2 * B + c, positives, mask=c < count)


@triton.jit(do_not_specialize=SIZES)
def contrastive_loss_coefficients_kernel(
    image,
    text,
    image_factor,
    text_factor,
    scale_at,
    bias_at,
    image_ids,
    text_ids,
    pair_weights,
    rows,
    columns,
    row_weight,
    column_weight,
    out,
    sums,
    first,
    last,
    left,
    right,
    B,
    T,
    D,
    offset,
    FACTORS: tl.constexpr,
    POSITIVES: tl.constexpr,
    SIGMOID: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
):
    """Write (5) or (6), times the factors of both rows, of a block of the matrix.

    Its images are those from ``first`` to ``last``, its texts from ``left`` to ``right``. ``sums``
    gets the shares of every tile in d scale and d bias.
    """
    scale, bias = tl.load(scale_at), tl.load(bias_at)
    image_tiles, text_tiles = tl.cdiv(last - first, BI), tl.cdiv(right - left, BJ)
    for tile in tl.range(
        tl.program_id(0), image_tiles * text_tiles, tl.num_programs(0), flatten=True
    ):
        image_tile, text_tile = tile % image_tiles, tile // image_tiles
        i = first + image_tile * BI + tl.arange(0, BI)
        j = left + text_tile * BJ + tl.arange(0, BJ)
        s = _similarities(
            image, text, image_factor, text_factor, i, j, last, right, D, FACTORS, ACC, PRECISION, BD
        )
        met = _meets(i, j, offset, POSITIVES)
        weight_i = tl.load(row_weight + i, mask=i < last, other=0.0)
        if SIGMOID:
            z = scale * s + bias
            p = _positives(
                image_ids, text_ids, pair_weights, i, j, last, right, B, offset, POSITIVES, ACC
            )
            e = tl.exp(-tl.abs(z))
            dz = tl.where(z > 0, 1.0, e) / (1.0 + e) - tl.where(p > 1, 1.0, p)
            dz = weight_i[:, None] * dz
        else:
            z = scale * LOG2E * s
            weight_j = tl.load(column_weight + j, mask=j < right, other=0.0)
            lse_i = tl.load(rows + i, mask=i < last, other=0.0) * LOG2E
            lse_j = tl.load(columns + j, mask=j < right, other=0.0) * LOG2E
            dz = weight_i[:, None] * tl.exp2(z - lse_i[:, None])
            dz += weight_j[None, :] * tl.exp2(z - lse_j[None, :])
            if met:
                p = _positives(
                    image_ids, text_ids, pair_weights, i, j, last, right, B, offset, POSITIVES, ACC
                )
                total_i = tl.load(rows + 2 * B + i, mask=i < last, other=1.0)
                total_j = tl.load(columns + 2 * T + j, mask=j < right, other=1.0)
                share_i = weight_i / tl.where(total_i > 0, total_i, 1.0)
                share_j = weight_j / tl.where(total_j > 0, total_j, 1.0)
                dz -= tl.where(p != 0, p * (share_i[:, None] + share_j[None, :]), 0.0)
        dz = tl.where((i < last)[:, None] & (j < right)[None, :], dz, 0.0)
        tl.store(sums + 2 * tile, tl.sum(tl.sum(dz * s, 1).to(tl.float64), 0))
        if SIGMOID:
            tl.store(sums + 2 * tile + 1, tl.sum(tl.sum(dz, 1).to(tl.float64), 0))
        if FACTORS:
            dz *= tl.load(image_factor + i, mask=i < last, other=0.0)[:, None]
            dz *= tl.load(text_factor + j, mask=j < right, other=0.0)[None, :]
        out.store([image_tile * BI, text_tile * BJ], dz.to(out.dtype))


@triton.jit
def _times_power(x, e):
    """Return x 2 ** e; in two steps, for the power itself may leave the range."""
    half = tl.floor(e * 0.5)
    return x * tl.exp2(half)[:, None] * tl.exp2(e - half)[:, None]


@triton.jit
def _exponent(x):
    """Return the largest e with 2 ** e <= x, about; 0 for 0."""
    return tl.where(x > 0, tl.floor(tl.log2(tl.where(x > 0, x, 1.0))), 0.0)


@triton.jit(do_not_specialize=["count", "D"])
def contrastive_loss_scale_rows_kernel(
    x,
    out,
    factor,
    inverse,
    count,
    D,
    x_r: tl.int64,
    out_r: tl.int64,
    EPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write rows times a power of two, so that they are 1 to 2 long.

    ``factor`` makes unit vectors of them; ``inverse`` is 1 / max(\\|x\\|, EPS) of the row itself. No
    bit of a row is lost, but of what is 2 ** -14 of its length in float16.
    """
    D, x_r, out_r = whole(D, ALIGNED), whole(x_r, ALIGNED), whole(out_r, ALIGNED)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    x += row.to(tl.int64)[:, None] * x_r
    out += row.to(tl.int64)[:, None] * out_r
    top = tl.zeros((BR,), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        some = (row < count)[:, None] & (d < D)[None, :]
        v = tl.load(x + d[None, :], mask=some, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.abs(v), 1))
    e = _exponent(top)
    squared = tl.zeros((BR,), tl.float32)  # of the row by 2 ** e, which has squares
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        some = (row < count)[:, None] & (d < D)[None, :]
        v = _times_power(tl.load(x + d[None, :], mask=some, other=0.0).to(tl.float32), -e)
        squared += tl.sum(v * v, 1)
    length = tl.sqrt(squared)
    more = _exponent(length)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        some = (row < count)[:, None] & (d < D)[None, :]
        v = tl.load(x + d[None, :], mask=some, other=0.0).to(tl.float32)
        v = _times_power(v, -e - more)
        tl.store(out + d[None, :], v.to(out.dtype.element_ty), mask=some)
    norm = length * tl.exp2(e)
    short = norm < EPS  # it is divided by EPS
    unit = tl.where(length > 0, tl.exp2(more) / tl.where(length > 0, length, 1.0), 1.0)
    unit = tl.where(short & (length > 0), tl.exp2(e + more) / EPS, unit)
    tl.store(factor + row, unit, mask=row < count)
    tl.store(inverse + row, 1.0 / tl.where(short, EPS, norm), mask=row < count)


@triton.jit(do_not_specialize=["count", "D"])
def contrastive_loss_bwd_rows_kernel(
    sums,
    scaled,
    factor,
    inverse,
    scale_at,
    out,
    count,
    D,
    scaled_r: tl.int64,
    EPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the gradient of the features of one side from ``sums``, the products of (7).

    These hold the factor of their row. With u the unit vector and g its gradient, it is
    (g - (g . u) u) / \\|x\\|; of rows shorter than EPS, which u divides by EPS, it is g / EPS.
    """
    D, scaled_r = whole(D, ALIGNED), whole(scaled_r, ALIGNED)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    at = row.to(tl.int64)[:, None] * D
    scaled += row.to(tl.int64)[:, None] * scaled_r
    unit = tl.load(factor + row, mask=row < count, other=1.0)
    by_length = tl.load(inverse + row, mask=row < count, other=0.0)
    along = tl.zeros((BR,), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        some = (row < count)[:, None] & (d < D)[None, :]
        g = tl.load(sums + at + d[None, :], mask=some, other=0.0)
        v = tl.load(scaled + d[None, :], mask=some, other=0.0).to(tl.float32)
        along += tl.sum(g * v, 1)
    along = tl.where(by_length < 1.0 / EPS, along * unit * unit, 0.0)
    by_length *= tl.load(scale_at) / unit
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        some = (row < count)[:, None] & (d < D)[None, :]
        g = tl.load(sums + at + d[None, :], mask=some, other=0.0)
        v = tl.load(scaled + d[None, :], mask=some, other=0.0).to(tl.float32)
        g = by_length[:, None] * (g - along[:, None] * v)
        tl.store(out + at + d[None, :], g.to(out.dtype.element_ty), mask=some)
