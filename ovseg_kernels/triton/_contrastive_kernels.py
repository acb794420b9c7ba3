"""Kernels of contrastive_loss. Equation numbers: ``ovseg_kernels/ops/contrastive_loss.py``.

A tile of the logits lives in registers. Statistics of its rows and columns are written apart and
merged by a second kernel in a fixed order; its gradients leave as coefficients, which the launcher
multiplies with the features. Softmax logits are in units of log 2, for an instruction makes 2 ** x.

Positives are the diagonal, or PAIRS: those of row i are texts[begins[i]:ends[i]], rising, of equal
ids and of a list alike, so that both give the same bits. A tile takes a pair of each row at a time.

D is a multiple of 16 and rows lie D apart. COPIED says that tiles are copied whole, by descriptors:
before sm_90 these are read element by element, and addresses are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import log1p_of, whole
from .center_assignment import _dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Never a reason to compile again.
SIZES = ["B", "T", "D", "offset", "first", "last", "left", "right"]
SIZES += ["pitch", "begin", "end", "count"]


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
def _next_pair(texts, weights, next, end, last):
    """Return (column, p, the place that follows) of the next pair of each row before ``last``.

    Where there is none the column is -1.
    """
    column = tl.load(texts + next, mask=next < end, other=last)
    here = (next < end) & (column < last)
    p = tl.load(weights + next, mask=here, other=0.0)
    return tl.where(here, column, -1).to(tl.int32), p, next + here.to(tl.int64)


@triton.jit
def _first_pair(begins, ends, texts, weights, i, j0, last, BJ: tl.constexpr):
    """Return what ``_next_pair`` does of the first pair of a tile, and where its rows end."""
    begin = tl.load(begins + i, mask=i < last, other=0)
    end = tl.load(ends + i, mask=i < last, other=0)
    begin = _first_at_least(texts, begin, end, j0)
    column, p, next = _next_pair(texts, weights, begin, end, j0 + BJ)
    return column, p, next, end


@triton.jit
def _hits(z, column, p, j):
    """Return the sums of p z of rows and of columns, of one pair in each row."""
    at = tl.where(p != 0, column, -1)[:, None] == j[None, :]
    picked = tl.where(at, z, 0.0)
    row_hits = tl.where(p != 0, p * tl.sum(picked, 1), 0.0)
    return row_hits, tl.sum(tl.where(at, p[:, None] * picked, 0.0), 0)


@triton.jit
def _labelled(z, column, p, j):
    """Return (z with the sign turned where p is 1 or more, the sum of p z where it is less).

    Of one pair in each row: the sigmoid loss of a positive is softplus(-z), which cancels nothing.
    """
    at = tl.where(p != 0, column, -1)[:, None] == j[None, :]
    part = tl.where((p != 0) & ((p >= 1) == 0), p * tl.sum(tl.where(at, z, 0.0), 1), 0.0)
    return tl.where(at & (p >= 1)[:, None], -z, z), part


@triton.jit
def _less(dz, column, p, by, j):
    """Return ``dz`` without p times ``by``, of one pair in each row."""
    at = tl.where(p != 0, column, -1)[:, None] == j[None, :]
    return tl.where(at, dz - (p * by)[:, None], dz)


@triton.jit
def _shares(row_vectors, column_vectors, i, column, last, right, B, T):
    """Return what p is multiplied with in (5), of one pair in each row."""
    of_row = tl.load(row_vectors + B + i, mask=i < last, other=0.0)
    inside = (column >= 0) & (column < right)
    return of_row + tl.load(column_vectors + T + column, mask=inside, other=0.0)


@triton.jit
def _rows(x, first, last, d0, D, COPIED: tl.constexpr, SIZE: tl.constexpr, BD: tl.constexpr):
    """Load SIZE rows from ``first`` on, and BD channels of them; 0 behind the last row."""
    if COPIED:
        tile = x.load([first, d0])
    else:
        row = first + tl.arange(0, SIZE)
        d = d0 + tl.arange(0, BD)
        inside = (row < last)[:, None] & (d < D)[None, :]
        tile = tl.load(x + row.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _products(
    image,
    text,
    i0,
    j0,
    last,
    right,
    D,
    COPIED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
):
    """Return the products of BI rows of images and BJ of texts."""
    D = whole(D, True)
    s = tl.zeros((BI, BJ), ACC)
    for d0 in range(0, D, BD):
        a = _rows(image, i0, last, d0, D, COPIED, BI, BD)
        b = _rows(text, j0, right, d0, D, COPIED, BJ, BD)
        s = _dot(a, b.T, s, PRECISION, ACC)
    return s


@triton.jit
def _by_factors(x, image_factor, text_factor, i, j, last, right, FACTORS: tl.constexpr):
    """Return a tile times the factors of its rows and columns, where there are some."""
    if FACTORS:
        x *= tl.load(image_factor + i, mask=i < last, other=0.0)[:, None]
        x *= tl.load(text_factor + j, mask=j < right, other=0.0)[None, :]
    return x


@triton.jit
def _meets(i0, j0, offset, BI: tl.constexpr, BJ: tl.constexpr):
    """Return whether a tile holds a part of the diagonal: most do not."""
    return (i0 + offset < j0 + BJ) & (i0 + offset > j0 - BI)


@triton.jit
def _write_two(out, size, x, top, total, inside):
    """Write two statistics of the rows or columns of one tile, ``size`` apart."""
    tl.store(out + x, top, mask=inside)
    tl.store(out + size + x, total, mask=inside)


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
    begins,
    ends,
    pair_texts,
    pair_weights,
    row_parts,
    column_parts,
    first,
    last,
    B,
    T,
    D,
    offset,
    COPIED: tl.constexpr,
    FACTORS: tl.constexpr,
    PAIRS: tl.constexpr,
    SIGMOID: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the parts of every tile of the images from ``first`` to ``last``.

    Softmax: maximum, sum of exponentials by it, sum of p z, of rows and of columns; those of
    columns begin behind what earlier images left. Sigmoid: the sum (4) of rows.
    """
    scale, bias = tl.load(scale_at), tl.load(bias_at)
    image_tiles, text_tiles = tl.cdiv(last - first, BI), tl.cdiv(T, BJ)
    for tile in tl.range(
        tl.program_id(0), image_tiles * text_tiles, tl.num_programs(0), flatten=True
    ):
        image_tile, text_tile = tile % image_tiles, tile // image_tiles
        i0 = first + image_tile * BI
        j0 = text_tile * BJ
        s = _products(image, text, i0, j0, last, T, D, COPIED, ACC, PRECISION, BI, BJ, BD)
        i, j = i0 + tl.arange(0, BI), j0 + tl.arange(0, BJ)
        s = _by_factors(s, image_factor, text_factor, i, j, last, T, FACTORS)
        own_parts = row_parts + text_tile.to(tl.int64) * (last - first) * (1 if SIGMOID else 3)
        if SIGMOID:
            z = scale * s + bias
            less = tl.zeros((BI,), ACC)
            if not PAIRS:
                if _meets(i0, j0, offset, BI, BJ):
                    z, _ = _labelled(z, i + offset, tl.full((BI,), 1.0, ACC), j)
            else:
                column, p, next, end = _first_pair(
                    begins, ends, pair_texts, pair_weights, i, j0, last, BJ
                )
                while tl.max(column, 0) >= 0:
                    z, part = _labelled(z, column, p, j)
                    less += part
                    column, p, next = _next_pair(pair_texts, pair_weights, next, end, j0 + BJ)
            loss = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
            loss += log1p_of(tl.exp(-tl.abs(z)))
            inside = (i < last)[:, None] & (j < T)[None, :]
            total = tl.sum(tl.where(inside, loss, 0.0), 1) - less
            tl.store(own_parts + i - first, total, mask=i < last)
        else:
            z = scale * LOG2E * s
            z = tl.where((i < last)[:, None] & (j < T)[None, :], z, float("-inf"))
            # A NaN that the maximum passes over stays one in the sum.
            top = tl.max(z, 1)
            total = tl.sum(tl.exp2(z - _finite(top)[:, None]), 1)
            _write_two(own_parts, last - first, i - first, top, total, i < last)
            top = tl.max(z, 0)
            total = tl.sum(tl.exp2(z - _finite(top)[None, :]), 0)
            its_parts = column_parts + (image_tile + 1).to(tl.int64) * T * 3
            _write_two(its_parts, T, j, top, total, j < T)
            row_hits, column_hits = tl.zeros((BI,), ACC), tl.zeros((BJ,), ACC)
            if not PAIRS:
                if _meets(i0, j0, offset, BI, BJ):
                    one = ((i < last) & (i + offset < T)).to(ACC)
                    row_hits, column_hits = _hits(z, i + offset, one, j)
            else:
                column, p, next, end = _first_pair(
                    begins, ends, pair_texts, pair_weights, i, j0, last, BJ
                )
                while tl.max(column, 0) >= 0:
                    of_rows, of_columns = _hits(z, column, p, j)
                    row_hits += of_rows
                    column_hits += of_columns
                    column, p, next = _next_pair(pair_texts, pair_weights, next, end, j0 + BJ)
            tl.store(own_parts + 2 * (last - first) + i - first, row_hits, mask=i < last)
            tl.store(its_parts + 2 * T + j, column_hits, mask=j < T)


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

    The result is the first two lines of their statistics in ``out``, B apart; with KEEP it is part
    0, of all tiles so far. The order of every sum is that of the tiles.
    """
    c = tl.program_id(0) * BR + tl.arange(0, BR)
    size = tl.cast(count, tl.int64)
    total, hits = tl.zeros((BR,), ACC), tl.zeros((BR,), ACC)
    if SIGMOID:
        for k0 in range(begin, end, BP):
            k = k0 + tl.arange(0, BP)
            some = (k < end)[:, None] & (c < count)[None, :]
            at = k.to(tl.int64)[:, None] * size + c[None, :]
            total += tl.sum(tl.load(parts + at, mask=some, other=0.0), 0)
    else:
        top = tl.full((BR,), float("-inf"), ACC)
        for k0 in range(begin, end, BP):
            k = k0 + tl.arange(0, BP)
            some = (k < end)[:, None] & (c < count)[None, :]
            at = k.to(tl.int64)[:, None] * 3 * size + c[None, :]
            top = tl.maximum(top, tl.max(tl.load(parts + at, mask=some, other=float("-inf")), 0))
        for k0 in range(begin, end, BP):
            k = k0 + tl.arange(0, BP)
            some = (k < end)[:, None] & (c < count)[None, :]
            at = parts + k.to(tl.int64)[:, None] * 3 * size + c[None, :]
            its_top = tl.load(at, mask=some, other=float("-inf"))
            share = tl.load(at + size, mask=some, other=0.0)
            total += tl.sum(share * tl.exp2(its_top - _finite(top)[None, :]), 0)
            hits += tl.sum(tl.load(at + 2 * size, mask=some, other=0.0), 0)
    if KEEP:
        _write_two(parts, size, c, top, total, c < count)
        tl.store(parts + 2 * size + c, hits, mask=c < count)
    else:
        if not SIGMOID:
            some = total != 0.0
            lse = (_finite(top) + tl.log2(tl.where(some, total, 1.0))) * LN2
            total = tl.where(some, lse, float("-inf"))
            hits *= LN2
        tl.store(out + c, total, mask=c < count)
        tl.store(out + B + c, hits, mask=c < count)


@triton.jit(do_not_specialize=SIZES)
def contrastive_loss_list_kernel(begins, texts, weights, out, count, BR: tl.constexpr):
    """Write the weights of a list for the other kernels.

    The first of equal pairs has the sum, in the order of the list, and the others have 0.
    """
    c = tl.program_id(0) * BR + tl.arange(0, BR)
    next = tl.load(begins + c, mask=c < count, other=0)
    end = tl.load(begins + c + 1, mask=c < count, other=0)
    first = next
    before = next * 0 - 1
    total = tl.zeros((BR,), weights.dtype.element_ty)
    while tl.max((next < end).to(tl.int32), 0) > 0:
        column = tl.load(texts + next, mask=next < end, other=0)
        weight = tl.load(weights + next, mask=next < end, other=0.0)
        same = column == before
        first, total = tl.where(same, first, next), tl.where(same, total + weight, weight)
        tl.store(out + next, 0.0, mask=next < end)
        tl.store(out + first, total, mask=next < end)  # of the same thread, so later
        before = column
        next += 1


@triton.jit(do_not_specialize=SIZES)
def contrastive_loss_counts_kernel(
    begins, weights, out, count, BR: tl.constexpr, ACC: tl.constexpr
):
    """Write the sum of p of BR rows, or columns, of a list, in its order."""
    c = tl.program_id(0) * BR + tl.arange(0, BR)
    next = tl.load(begins + c, mask=c < count, other=0)
    end = tl.load(begins + c + 1, mask=c < count, other=0)
    total = tl.zeros((BR,), ACC)
    while tl.max((next < end).to(tl.int32), 0) > 0:
        total += tl.load(weights + next, mask=next < end, other=0.0)
        next += 1
    tl.store(out + c, total, mask=c < count)


@triton.jit(do_not_specialize=SIZES)
def contrastive_loss_coefficients_kernel(
    image,
    text,
    image_factor,
    text_factor,
    scale_at,
    bias_at,
    begins,
    ends,
    pair_texts,
    pair_weights,
    row_vectors,
    column_vectors,
    text_factor_again,
    out,
    sums,
    first,
    last,
    left,
    right,
    B,
    T,
    D,
    pitch,
    offset,
    COPIED: tl.constexpr,
    FACTORS: tl.constexpr,
    PAIRS: tl.constexpr,
    SIGMOID: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
):
    """Write (5) or (6), times the factors of both rows, of a block of the matrix.

    Its images are those from ``first`` to ``last``, its texts from ``left`` to ``right``. ``sums``
    gets the shares of every tile in d scale and d bias. The vectors are those of the next kernel,
    or the weights of the rows for the sigmoid.
    """
    scale, bias = tl.load(scale_at), tl.load(bias_at)
    image_tiles, text_tiles = tl.cdiv(last - first, BI), tl.cdiv(right - left, BJ)
    for tile in tl.range(
        tl.program_id(0), image_tiles * text_tiles, tl.num_programs(0), flatten=True
    ):
        image_tile, text_tile = tile % image_tiles, tile // image_tiles
        i0 = first + image_tile * BI
        j0 = left + text_tile * BJ
        s = _products(image, text, i0, j0, last, right, D, COPIED, ACC, PRECISION, BI, BJ, BD)
        i, j = i0 + tl.arange(0, BI), j0 + tl.arange(0, BJ)
        s = _by_factors(s, image_factor, text_factor, i, j, last, right, FACTORS)
        if SIGMOID:
            z = scale * s + bias
            e = tl.exp(-tl.abs(z))
            dz = tl.where(z > 0, 1.0, e) / (1.0 + e)
            if not PAIRS:
                if _meets(i0, j0, offset, BI, BJ):
                    dz = _less(dz, i + offset, tl.full((BI,), 1.0, ACC), 1.0, j)
            else:
                column, p, next, end = _first_pair(
                    begins, ends, pair_texts, pair_weights, i, j0, last, BJ
                )
                while tl.max(column, 0) >= 0:
                    dz = _less(dz, column, tl.where(p > 1, 1.0, p), 1.0, j)
                    column, p, next = _next_pair(pair_texts, pair_weights, next, end, j0 + BJ)
            dz *= tl.load(row_vectors + i, mask=i < last, other=0.0)[:, None]
        else:
            z = scale * LOG2E * s
            dz = tl.exp2(z - tl.load(row_vectors + i, mask=i < last, other=0.0)[:, None])
            dz += tl.exp2(z - tl.load(column_vectors + j, mask=j < right, other=0.0)[None, :])
            if not PAIRS:
                if _meets(i0, j0, offset, BI, BJ):
                    share = _shares(row_vectors, column_vectors, i, i + offset, last, right, B, T)
                    dz = _less(dz, i + offset, tl.full((BI,), 1.0, ACC), share, j)
            else:
                column, p, next, end = _first_pair(
                    begins, ends, pair_texts, pair_weights, i, j0, last, BJ
                )
                while tl.max(column, 0) >= 0:
                    share = _shares(row_vectors, column_vectors, i, column, last, right, B, T)
                    dz = _less(dz, column, p, share, j)
                    column, p, next = _next_pair(pair_texts, pair_weights, next, end, j0 + BJ)
        dz = tl.where((i < last)[:, None] & (j < right)[None, :], dz, 0.0)
        tl.store(sums + 2 * tile, tl.sum(tl.sum(dz * s, 1).to(tl.float64), 0))
        if SIGMOID:
            tl.store(sums + 2 * tile + 1, tl.sum(tl.sum(dz, 1).to(tl.float64), 0))
        # Read again, by an address of its own: kept meanwhile, it would take 32 registers.
        dz = _by_factors(dz, image_factor, text_factor_again, i, j, last, right, FACTORS)
        if COPIED:
            out.store([image_tile * BI, text_tile * BJ], dz.to(out.dtype))
        else:
            row = image_tile * BI + tl.arange(0, BI)
            column = text_tile * BJ + tl.arange(0, BJ)
            P = whole(pitch, True)
            inside = (i < last)[:, None] & (column < P)[None, :]
            at = out + row.to(tl.int64)[:, None] * P + column[None, :]
            tl.store(at, dz.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def contrastive_loss_bwd_vectors_kernel(part, weight, out, count, BR: tl.constexpr):
    """Write what (5) needs of the rows, or columns, from their statistics and weights.

    It is log2 of what 2 ** z is divided by, and what p is multiplied with.
    """
    c = tl.program_id(0) * BR + tl.arange(0, BR)
    some = c < count
    w = tl.load(weight + c, mask=some, other=1.0)
    lse = tl.load(part + c, mask=some, other=0.0)
    total = tl.load(part + 2 * count + c, mask=some, other=1.0)
    less = tl.where(w == 0, float("-inf"), tl.log2(tl.where(w == 0, 1.0, w)))
    tl.store(out + c, lse * LOG2E - less, mask=some)
    tl.store(out + count + c, w / tl.where(total > 0, total, 1.0), mask=some)


@triton.jit
def _times_power(x, e):
    """Return x 2 ** e; in two steps, for the power itself may leave the range."""
    half = tl.floor(e * 0.5)
    return x * tl.exp2(half)[:, None] * tl.exp2(e - half)[:, None]


@triton.jit
def _exponent(x):
    """Return the largest e with 2 ** e <= x, about; 0 for 0."""
    return tl.where(x > 0, tl.floor(tl.log2(tl.where(x > 0, x, 1.0))), 0.0)


@triton.jit(do_not_specialize=["count", "D", "P"])
def contrastive_loss_scale_rows_kernel(
    x,
    out,
    factor,
    inverse,
    count,
    D,
    P,
    x_r: tl.int64,
    EPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write rows times a power of two, so that they are 1 to 2 long.

    Behind their D channels follow zeros, up to P. ``factor`` makes unit vectors of them;
    ``inverse`` is one by the length of the row itself, or by EPS if that is more. No bit of a row
    is lost, but of what is 2 ** -14 of its length in float16.
    """
    D, x_r, P = whole(D, ALIGNED), whole(x_r, ALIGNED), whole(P, True)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    x += row.to(tl.int64)[:, None] * x_r
    out += row.to(tl.int64)[:, None] * P
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
    for d0 in range(0, P, BD):
        d = d0 + tl.arange(0, BD)
        some = (row < count)[:, None] & (d < D)[None, :]
        v = tl.load(x + d[None, :], mask=some, other=0.0).to(tl.float32)
        v = _times_power(v, -e - more)
        inside = (row < count)[:, None] & (d < P)[None, :]
        tl.store(out + d[None, :], v.to(out.dtype.element_ty), mask=inside)
    norm = length * tl.exp2(e)
    short = norm < EPS  # it is divided by EPS
    unit = tl.where(length > 0, tl.exp2(more) / tl.where(length > 0, length, 1.0), 1.0)
    unit = tl.where(short & (length > 0), tl.exp2(e + more) / EPS, unit)
    tl.store(factor + row, unit, mask=row < count)
    tl.store(inverse + row, 1.0 / tl.where(short, EPS, norm), mask=row < count)


@triton.jit(do_not_specialize=["count", "D", "P"])
def contrastive_loss_bwd_rows_kernel(
    sums,
    scaled,
    factor,
    inverse,
    scale_at,
    out,
    count,
    D,
    P,
    EPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the gradient of the features of one side from ``sums``, the products of (7).

    These hold the factor of their row. With u the unit vector and g its gradient, it is
    g - (g . u) u by the length; of rows shorter than EPS, which u divides by EPS, it is g / EPS.
    """
    D, P = whole(D, ALIGNED), whole(P, True)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    sums += row.to(tl.int64)[:, None] * P
    scaled += row.to(tl.int64)[:, None] * P
    out += row.to(tl.int64)[:, None] * D
    unit = tl.load(factor + row, mask=row < count, other=1.0)
    by_length = tl.load(inverse + row, mask=row < count, other=0.0)
    along = tl.zeros((BR,), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        some = (row < count)[:, None] & (d < D)[None, :]
        g = tl.load(sums + d[None, :], mask=some, other=0.0)
        v = tl.load(scaled + d[None, :], mask=some, other=0.0).to(tl.float32)
        along += tl.sum(g * v, 1)
    along = tl.where(by_length < 1.0 / EPS, along * unit * unit, 0.0)
    by_length *= tl.load(scale_at) / unit
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        some = (row < count)[:, None] & (d < D)[None, :]
        g = tl.load(sums + d[None, :], mask=some, other=0.0)
        v = tl.load(scaled + d[None, :], mask=some, other=0.0).to(tl.float32)
        g = by_length[:, None] * (g - along[:, None] * v)
        tl.store(out + d[None, :], g.to(out.dtype.element_ty), mask=some)
