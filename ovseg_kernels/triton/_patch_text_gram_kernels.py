"""Kernels of ``patch_text_similarity`` for 16-bit inputs; ``_patch_text_gram.py`` launches them.

Texts lie on the rows of a tile and the patches of one image on its columns, in up to three parts of
W1, W2 and W3 columns: 128 + 64 + 16 hold the 196 patches of a common encoder with little padding.
Operands are copies whose rows a power of two has brought to lengths of 1 to 2, so that no product
leaves its range; absent patches, masked ones and those that pad, are rows of zeros with the length
-1 and the inverse -1. The Gram matrix is that of the unit patches. Equation numbers:
``ovseg_kernels/ops/patch_text_similarity.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import squares, whole
from ._patch_text_kernels import _larger

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EPS = tl.constexpr(1e-12)
# Weights of at most this: it has a place in float16, and small ones stay normal numbers there.
UNIT = tl.constexpr(32768.0)
UNIT_LOG2 = tl.constexpr(15.0)
# Below this share of sum (a |u|)^2, rounding has taken too much of |v|^2: the row has cancelled.
CANCELLED = tl.constexpr(0.25)
# Stands for the cosine of an absent patch, in the direction in which weights vanish.
ABSENT = tl.constexpr(1e30)
LARGEST_HALF = tl.constexpr(65504.0)

SIZES = ["T", "N", "P", "K", "D", "first", "images", "count", "columns", "x_b", "x_n"]


@triton.jit
def _powers(length):
    """Return the power of two below ``length``, and its inverse; 1 for what is no normal number."""
    field = length.to(tl.int32, bitcast=True) & 0x7F800000
    field = tl.where((field == 0) | (field == 0x7F800000), 0x3F800000, field)
    field = tl.where(field > 0x7E800000, 0x7E800000, field)
    down = 0x7F000000 - field
    return field.to(tl.float32, bitcast=True), down.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_rows_kernel(
    x,
    mask,
    out,
    lengths,
    inverse,
    first,
    count,
    N,
    P,
    D,
    K,
    x_b: tl.int64,
    x_n: tl.int64,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Copy ``count`` rows, P of an image, to lengths of 1 to 2; write |x| and 1 / |copy|."""
    D, K = whole(D, ALIGNED), whole(K, True)
    x_b, x_n = whole(x_b, ALIGNED), whole(x_n, ALIGNED)
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i = row // P
    n = row - i * P
    keep = (row < count) & (n < N)
    if MASKED:
        keep = keep & (tl.load(mask + (first + i) * N + n, mask=keep, other=0) != 0)
    x += ((first + i) * x_b + n * x_n)[:, None]
    squared, unit = tl.zeros((BR,), tl.float32), tl.full((BR,), 1.0, tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        v = tl.load(x + d[None, :], mask=keep[:, None] & (d < D)[None, :], other=0.0)
        squared, unit, _ = squares(v.to(tl.float32), squared, unit)
    length = tl.sqrt(squared) * unit
    up, down = _powers(length)
    eps = tl.full((), EPS, tl.float32)
    for d0 in range(0, K, BD):
        d = d0 + tl.arange(0, BD)
        v = tl.load(x + d[None, :], mask=keep[:, None] & (d < D)[None, :], other=0.0)
        v = v.to(tl.float32) * down[:, None]
        at = out + row[:, None] * K + d[None, :]
        tl.store(at, v.to(out.dtype.element_ty), mask=(row < count)[:, None] & (d < K)[None, :])
    tl.store(lengths + row, tl.where(keep, length, -1.0), mask=row < count)
    tl.store(
        inverse + row,
        tl.where(keep, tl.where(length > 0.0, up / _larger(length, eps), 1.0), -1.0),
        mask=row < count,
    )


@triton.jit
def _block(x, i, n, k, P, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """Load [ROWS, COLUMNS] of matrix i of [.., P, K], from row n and column k on.

    ``x`` is a descriptor where TMA, else a pointer. Rows from P on are zeros; K ends no block.
    """
    if TMA:
        block = x.load([i, n, k]).reshape(ROWS, COLUMNS)
    else:
        row = tl.arange(0, ROWS)
        x += (i.to(tl.int64) * P + n) * whole(K, True) + k
        at = x + (row[:, None] * whole(K, True) + tl.arange(0, COLUMNS)[None, :])
        block = tl.load(at, mask=(n + row < P)[:, None], other=0.0)
    return block


@triton.jit
def _write(x, block, i, n, k, P, K, TMA: tl.constexpr):
    """Write a block where :func:`_block` reads it; rows from P on are not."""
    block = block.to(x.dtype if TMA else x.dtype.element_ty)
    if TMA:
        x.store([i, n, k], block.reshape(1, block.shape[0], block.shape[1]))
    else:
        row = tl.arange(0, block.shape[0])
        x += (i.to(tl.int64) * P + n) * whole(K, True) + k
        at = x + (row[:, None] * whole(K, True) + tl.arange(0, block.shape[1])[None, :])
        tl.store(at, block, mask=(n + row < P)[:, None])


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_gram_kernel(
    u,
    gram,
    inverse,
    P,
    K,
    HALF: tl.constexpr,
    TMA: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Write one tile of the cosines of the patches of an image with each other.

    HALF: only of the tiles on and above the diagonal.
    """
    wide = tl.cdiv(P, BN)
    p = tl.program_id(0)
    column = p % wide
    row = p // wide % wide
    i = p // wide // wide
    if not HALF or column >= row:
        g = tl.zeros((BN, BN), tl.float32)
        for k in range(0, K, BK):
            a = _block(u, i, row * BN, k, P, K, BN, BK, TMA)
            b = _block(u, i, column * BN, k, P, K, BN, BK, TMA)
            g = tl.dot(a, b.T, g)
        n = row * BN + tl.arange(0, BN)
        m = column * BN + tl.arange(0, BN)
        inverse += i.to(tl.int64) * P
        g *= tl.load(inverse + n, mask=n < P, other=0.0)[:, None]
        g *= tl.load(inverse + m, mask=m < P, other=0.0)[None, :]
        at = gram + (i.to(tl.int64) * P + n)[:, None] * whole(P, True) + m[None, :]
        tl.store(at, g.to(gram.dtype.element_ty), mask=(n < P)[:, None] & (m < P)[None, :])


@triton.jit
def _products(
    q,
    u1,
    u2,
    u3,
    i,
    t0,
    n0,
    T,
    P,
    K,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    TMA: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Return the products of the texts from t0 on with three parts of the patches from n0 on."""
    s1 = tl.zeros((BT, W1), tl.float32)
    s2 = tl.zeros((BT, W2 if W2 > 0 else 16), tl.float32)
    s3 = tl.zeros((BT, W3 if W3 > 0 else 16), tl.float32)
    for k in range(0, K, BK):
        x = _block(q, i * 0, t0, k, T, K, BT, BK, TMA)
        s1 = tl.dot(x, _block(u1, i, n0, k, P, K, W1, BK, TMA).T, s1)
        if W2 > 0:
            s2 = tl.dot(x, _block(u2, i, n0 + W1, k, P, K, W2, BK, TMA).T, s2)
        if W3 > 0:
            s3 = tl.dot(x, _block(u3, i, n0 + W1 + W2, k, P, K, W3, BK, TMA).T, s3)
    return s1, s2, s3


@triton.jit
def _cosines(s, inverse, n, text_inverse, absent):
    """Return (1) of one part; ``absent`` where there is no patch, whose product is 0."""
    v = tl.load(inverse + n)
    return s * text_inverse[:, None] * v[None, :] + tl.where(v < 0.0, absent, 0.0)[None, :]


@triton.jit
def _scales(scale_at, bias_at):
    """Return scale and bias in base 2, and what stands for the cosine of an absent patch.

    A scale of 0 becomes one that changes no weight and still takes absent patches away.
    """
    scale, bias = tl.load(scale_at) * LOG2E, tl.load(bias_at) * LOG2E
    scale = tl.where(tl.abs(scale) < 1e-20, 1e-20, scale)
    return scale, bias, tl.where(scale < 0.0, ABSENT, -ABSENT)


@triton.jit
def _likelihood(c, scale, bias, shift, SIGMOID: tl.constexpr):
    """Return f(c) 2^-shift, equation (2), where neither needs to have a place in float32."""
    if SIGMOID:
        y = c * scale + bias
        f = tl.exp2(tl.minimum(y, 0.0) - shift[:, None]) / (1.0 + tl.exp2(-tl.abs(y)))
    else:
        f = tl.exp2(c * scale - shift[:, None])
    return f


@triton.jit
def _log_likelihood(y, bias, SIGMOID: tl.constexpr):
    """Return log2 f of a row's largest scale c."""
    if SIGMOID:
        y += bias
        y = tl.minimum(y, 0.0) - tl.log2(1.0 + tl.exp2(-tl.abs(y)))
    return y


@triton.jit
def _weights(c, scale, bias, shift, lengths, n, per_longest, SIGMOID: tl.constexpr):
    """Return f(c) by UNIT / its largest, and the same times |u| / the longest patch."""
    e = _likelihood(c, scale, bias, shift, SIGMOID)
    return e, e * (tl.load(lengths + n) * per_longest)[None, :]


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_gram_fwd_kernel(
    q,
    u1,
    u2,
    u3,
    g11,
    g12,
    g13,
    g22,
    g23,
    g33,
    lengths,
    inverse,
    text_inverse,
    scale_at,
    bias_at,
    similarity,
    lse,
    norm,
    cancelled,
    first,
    images,
    T,
    K,
    SIGMOID: tl.constexpr,
    POOL: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    TMA: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Write (3) or (4) of all texts with all patches of an image, a tile of texts at a time.

    All cosines of a row are in registers: its largest exponent is known before the first weight.
    Where |v|^2 has cancelled, the norm written is -1, and ``cancelled`` is 1.
    """
    P: tl.constexpr = W1 + W2 + W3
    text_tiles = tl.cdiv(T, BT)
    scale, bias, absent = _scales(scale_at, bias_at)
    n1 = tl.arange(0, W1)
    n2 = W1 + tl.arange(0, W2 if W2 > 0 else 16)
    n3 = W1 + W2 + tl.arange(0, W3 if W3 > 0 else 16)
    for tile in tl.range(
        tl.program_id(0), images * text_tiles, tl.num_programs(0), disable_licm=True
    ):
        t0 = tile % text_tiles * BT
        i = tile // text_tiles
        s1, s2, s3 = _products(q, u1, u2, u3, i, t0, 0, T, P, K, W1, W2, W3, TMA, BT, BK)
        r = lengths + i.to(tl.int64) * P
        v = inverse + i.to(tl.int64) * P
        t = t0 + tl.arange(0, BT)
        w = tl.load(text_inverse + t, mask=t < T, other=0.0)
        longest = tl.max(tl.load(r + n1), 0)
        c1 = _cosines(s1, v, n1, w, absent)
        top = tl.max(c1 if POOL == 2 else c1 * scale, 1)
        if W2 > 0:
            longest = tl.maximum(longest, tl.max(tl.load(r + n2), 0))
            c2 = _cosines(s2, v, n2, w, absent)
            top = tl.maximum(top, tl.max(c2 if POOL == 2 else c2 * scale, 1))
        if W3 > 0:
            longest = tl.maximum(longest, tl.max(tl.load(r + n3), 0))
            c3 = _cosines(s3, v, n3, w, absent)
            top = tl.maximum(top, tl.max(c3 if POOL == 2 else c3 * scale, 1))
        out = (first + i).to(tl.int64) * T + t
        inside = t < T
        some = longest >= 0.0
        if POOL == 2:
            # Maxima pass over NaN; sums do not.
            bad = tl.sum(c1 * 0.0, 1)
            if W2 > 0:
                bad += tl.sum(c2 * 0.0, 1)
            if W3 > 0:
                bad += tl.sum(c3 * 0.0, 1)
            tl.store(similarity + out, tl.where(some, top + bad, 0.0), mask=inside)
        else:
            top = _log_likelihood(top, bias, SIGMOID)
            shift = top - UNIT_LOG2
            per_longest = 1.0 / tl.maximum(longest, 1e-37)
            e1, w1 = _weights(c1, scale, bias, shift, r, n1, per_longest, SIGMOID)
            total = tl.sum(e1, 1)
            along = tl.sum((w1 if POOL == 0 else e1) * c1, 1)
            if POOL == 0:
                spread = tl.sum(w1 * w1, 1)
                p1 = w1.to(tl.float16)
            if W2 > 0:
                e2, w2 = _weights(c2, scale, bias, shift, r, n2, per_longest, SIGMOID)
                total += tl.sum(e2, 1)
                along += tl.sum((w2 if POOL == 0 else e2) * c2, 1)
                if POOL == 0:
                    spread += tl.sum(w2 * w2, 1)
                    p2 = w2.to(tl.float16)
            if W3 > 0:
                e3, w3 = _weights(c3, scale, bias, shift, r, n3, per_longest, SIGMOID)
                total += tl.sum(e3, 1)
                along += tl.sum((w3 if POOL == 0 else e3) * c3, 1)
                if POOL == 0:
                    spread += tl.sum(w3 * w3, 1)
                    p3 = w3.to(tl.float16)
            known = top * LN2 + tl.log(total / UNIT)
            tl.store(lse + out, tl.where(some, known, float("-inf")), mask=inside)
            if POOL == 1:
                tl.store(similarity + out, tl.where(some, along / total, 0.0), mask=inside)
            else:
                # v^2 = p1 G11 p1 + p2 G22 p2 + p3 G33 p3 + 2 (p1 G12 p2 + p1 G13 p3 + p2 G23 p3)
                a = tl.dot(p1, _block(g11, i, 0, 0, P, P, W1, W1, TMA))
                squared = tl.sum(a * p1.to(tl.float32), 1)
                if W2 > 0:
                    b = tl.dot(p1, _block(g12, i, 0, W1, P, P, W1, W2, TMA)) * 2.0
                    b = tl.dot(p2, _block(g22, i, W1, W1, P, P, W2, W2, TMA), b)
                    squared += tl.sum(b * p2.to(tl.float32), 1)
                if W3 > 0:
                    d = tl.dot(p1, _block(g13, i, 0, W1 + W2, P, P, W1, W3, TMA))
                    if W2 > 0:
                        d = tl.dot(p2, _block(g23, i, W1, W1 + W2, P, P, W2, W3, TMA), d)
                    g = _block(g33, i, W1 + W2, W1 + W2, P, P, W3, W3, TMA)
                    d = tl.dot(p3, g, d * 2.0)
                    squared += tl.sum(d * p3.to(tl.float32), 1)
                # Weights far below UNIT, of patches far shorter than the longest, were rounded too.
                least = tl.where(longest > 0.0, 1.0, -1.0)
                lost = inside & ((squared < spread * CANCELLED) | (spread < least))
                length = tl.sqrt(tl.maximum(squared, 0.0)) * longest
                eps = tl.full((), EPS, tl.float32)
                phi = along * longest / total / _larger(length / total, eps)
                # |v| of the weights that the backward makes of the rounded lse: a large scale would
                # multiply the difference.
                length = length / UNIT / tl.exp2(known * LOG2E - top)
                tl.store(similarity + out, tl.where(some, phi, 0.0), mask=inside)
                length = tl.where(lost, -1.0, tl.where(some, length, 0.0))
                tl.store(norm + out, length, mask=inside)
                if tl.max(lost.to(tl.int32), 0) > 0:
                    tl.store(cancelled, 1)


@triton.jit
def _careful(w, u, v):
    """Return v + w u with all digits of w: in pieces that are exact in the dtype of u."""
    piece = w.to(u.dtype)
    v = tl.dot(piece, u, v)
    rest = w - piece.to(tl.float32)
    piece = rest.to(u.dtype)
    v = tl.dot(piece, u, v)
    if u.dtype == tl.bfloat16:
        rest -= piece.to(tl.float32)
        v = tl.dot(rest.to(u.dtype), u, v)
    return v


@triton.jit
def _careful_weights(c, scale, bias, known, r, v, n, per_longest, SIGMOID: tl.constexpr):
    """Return the weights of the copies in v / longest, by rows whose log-sum is known."""
    a = _likelihood(c, scale, bias, known, SIGMOID)
    return a * (tl.load(r + n) * tl.load(v + n) * per_longest)[None, :]


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_gram_cancelled_kernel(
    q,
    u1,
    u2,
    u3,
    lengths,
    inverse,
    text_inverse,
    scale_at,
    bias_at,
    similarity,
    lse,
    norm,
    cancelled,
    first,
    images,
    T,
    K,
    SIGMOID: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    TMA: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Write |v| and (4) where the forward has left the norm -1, from v and unrounded weights."""
    P: tl.constexpr = W1 + W2 + W3
    text_tiles = tl.cdiv(T, BT)
    tiles = images * text_tiles
    if tl.load(cancelled) == 0:
        tiles = 0
    scale, bias, absent = _scales(scale_at, bias_at)
    n1 = tl.arange(0, W1)
    n2 = W1 + tl.arange(0, W2 if W2 > 0 else 16)
    n3 = W1 + W2 + tl.arange(0, W3 if W3 > 0 else 16)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        t0 = tile % text_tiles * BT
        i = tile // text_tiles
        t = t0 + tl.arange(0, BT)
        out = (first + i).to(tl.int64) * T + t
        lost = tl.load(norm + out, mask=t < T, other=0.0) < 0.0
        if tl.max(lost.to(tl.int32), 0) > 0:
            s1, s2, s3 = _products(q, u1, u2, u3, i, t0, 0, T, P, K, W1, W2, W3, TMA, BT, BK)
            r = lengths + i.to(tl.int64) * P
            v = inverse + i.to(tl.int64) * P
            w = tl.load(text_inverse + t, mask=t < T, other=0.0)
            known = tl.load(lse + out, mask=lost, other=0.0) * LOG2E
            longest = tl.max(tl.load(r + n1), 0)
            if W2 > 0:
                longest = tl.maximum(longest, tl.max(tl.load(r + n2), 0))
            if W3 > 0:
                longest = tl.maximum(longest, tl.max(tl.load(r + n3), 0))
            per_longest = 1.0 / tl.maximum(longest, 1e-37)
            s1 = _cosines(s1, v, n1, w, absent)
            s1 = _careful_weights(s1, scale, bias, known, r, v, n1, per_longest, SIGMOID)
            top = tl.max(s1, 1)
            if W2 > 0:
                s2 = _cosines(s2, v, n2, w, absent)
                s2 = _careful_weights(s2, scale, bias, known, r, v, n2, per_longest, SIGMOID)
                top = tl.maximum(top, tl.max(s2, 1))
            if W3 > 0:
                s3 = _cosines(s3, v, n3, w, absent)
                s3 = _careful_weights(s3, scale, bias, known, r, v, n3, per_longest, SIGMOID)
                top = tl.maximum(top, tl.max(s3, 1))
            top = tl.maximum(top, 1e-37)
            up = UNIT / top
            s1 *= up[:, None]
            s2 *= up[:, None]
            s3 *= up[:, None]
            squared, dot = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
            for k in range(0, K, BK):
                pooled = tl.zeros((BT, BK), tl.float32)
                pooled = _careful(s1, _block(u1, i, 0, k, P, K, W1, BK, TMA), pooled)
                if W2 > 0:
                    pooled = _careful(s2, _block(u2, i, W1, k, P, K, W2, BK, TMA), pooled)
                if W3 > 0:
                    pooled = _careful(s3, _block(u3, i, W1 + W2, k, P, K, W3, BK, TMA), pooled)
                squared += tl.sum(pooled * pooled, 1)
                x = _block(q, i * 0, t0, k, T, K, BT, BK, TMA)
                dot += tl.sum(pooled * x.to(tl.float32), 1)
            unit = top / UNIT * longest
            length = tl.sqrt(squared) * unit
            phi = dot * w * unit / _larger(length, tl.full((), EPS, tl.float32))
            tl.store(norm + out, length, mask=lost)
            tl.store(similarity + out, phi, mask=lost)
