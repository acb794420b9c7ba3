"""Kernels of the backward of ``patch_text_similarity`` for 16-bit inputs, between library products.

With e_n the unit patches, p_n = a_n |u_n| / |v| and G their Gram matrix, equations (5) to (8) read

    (G p)_n = <e_n, v> / |v|     c_n = g d_n p_n (s_n - phi (G p)_n)     m_n = scale c_n + g p_n
    dq = sum_n m_n e_n
    |u_n| dU_n = sum_t m_tn q_t - sum_m H_nm e_m - e_n sum_t scale c_tn s_tn
    H = sum_t g_t phi_t p_t p_t^T

for the pooled vector; for the score p is a, (G p) is 1 and H is 0. One kernel writes p, a library
product makes G p of it, a second kernel makes m and g phi p, and library products the rest.
Coefficients are of any size: powers of two, known from the largest |g p| of a chunk, bring them
into the range of float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import whole
from ._patch_text_gram_kernels import (
    EPS,
    LN2,
    LOG2E,
    SIZES,
    _block,
    _cosines,
    _likelihood,
    _products,
    _scales,
    _write,
)
from ._patch_text_kernels import _larger

LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def _factor(bound):
    """Return the power of two that brings ``bound`` to 2^14 .. 2^15, and its inverse.

    1 for what is 0 or not finite.
    """
    field = (bound.to(tl.int32, bitcast=True) >> 23) & 255
    field = tl.where((field == 0) | (field == 255), 141, field)
    field = tl.minimum(tl.maximum(268 - field, 27), 227)
    down = 254 - field
    return (field << 23).to(tl.float32, bitcast=True), (down << 23).to(tl.float32, bitcast=True)


@triton.jit
def _log_sum(at, inside):
    """Return the log-sum of the weights by base 2; 0 for an image of which no patch is kept."""
    known = tl.load(at, mask=inside, other=0.0) * LOG2E
    return tl.where(known == float("-inf"), 0.0, known)


@triton.jit
def _weights(c, scale, bias, known, lengths, n, rho, SIGMOID: tl.constexpr):
    """Return p of one part, from the log-sum of the weights and rho = 1 / |v|.

    Rows that have cancelled may be longer than float16 holds; nothing of theirs has digits.
    """
    p = _likelihood(c, scale, bias, known, SIGMOID) * rho[:, None]
    p *= tl.maximum(tl.load(lengths + n), 0.0)[None, :]
    return tl.where(p > LARGEST_HALF, LARGEST_HALF, p)


@triton.jit
def _halves(s):
    """Return the left and the right half of a tile: fewer registers at a time."""
    return s.reshape(s.shape[0], 2, s.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _peak(p, g):
    """Return the largest |g p|, 0 where it is not finite."""
    peak = tl.max(tl.max(p, 1) * tl.abs(g), 0)
    return tl.where(peak < 1e38, peak, 0.0)


@triton.jit
def _weigh(
    s,
    weights,
    WIDTH: tl.constexpr,
    i,
    n0,
    v,
    r,
    t0,
    w,
    known,
    rho,
    g,
    scale,
    bias,
    absent,
    T,
    P,
    SIGMOID: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write p of one part; return its largest |g p|, and the rows' sums of p s."""
    n = n0 + tl.arange(0, WIDTH)
    c = _cosines(s, v, n, w, absent)
    p = _weights(c, scale, bias, known, r, n, rho, SIGMOID).to(tl.float16)
    _write(weights, p, i, t0, n0, T, P, TMA)
    p = p.to(tl.float32)
    return _peak(p, g), tl.sum(p * c, 1)


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_gram_bwd_weights_kernel(
    q,
    u1,
    u2,
    u3,
    lengths,
    inverse,
    text_inverse,
    scale_at,
    bias_at,
    lse,
    norm,
    grad,
    weights,
    weights_tail,
    peaks,
    dots,
    first,
    images,
    T,
    P,
    K,
    SIGMOID: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    TMA: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Write p [images, T, P], the largest |g p| of every tile and its rows' sums of p s."""
    text_tiles = tl.cdiv(T, BT)
    columns = P // (W1 + W2 + W3)
    scale, bias, absent = _scales(scale_at, bias_at)
    for tile in tl.range(
        tl.program_id(0), images * columns * text_tiles, tl.num_programs(0), disable_licm=True
    ):
        t0 = tile % text_tiles * BT
        n0 = tile // text_tiles % columns * (W1 + W2 + W3)
        i = tile // text_tiles // columns
        s1, s2, s3 = _products(q, u1, u2, u3, i, t0, n0, T, P, K, W1, W2, W3, TMA, BT, BK)
        r = lengths + i.to(tl.int64) * P
        v = inverse + i.to(tl.int64) * P
        t = t0 + tl.arange(0, BT)
        at = (first + i).to(tl.int64) * T + t
        w = tl.load(text_inverse + t, mask=t < T, other=0.0)
        g = tl.load(grad + at, mask=t < T, other=0.0)
        known = _log_sum(lse + at, t < T)
        length = tl.load(norm + at, mask=t < T, other=1.0)
        rho = 1.0 / _larger(length, tl.full((), EPS, tl.float32))
        peak = 0.0
        dot = tl.zeros((BT,), tl.float32)
        if W1 == 128:
            left, right = _halves(s1)
            here, sums = _weigh(
                left,
                weights,
                64,
                i,
                n0,
                v,
                r,
                t0,
                w,
                known,
                rho,
                g,
                scale,
                bias,
                absent,
                T,
                P,
                SIGMOID,
                TMA,
            )
            peak = tl.maximum(peak, here)
            dot += sums
            here, sums = _weigh(
                right,
                weights,
                64,
                i,
                n0 + 64,
                v,
                r,
                t0,
                w,
                known,
                rho,
                g,
                scale,
                bias,
                absent,
                T,
                P,
                SIGMOID,
                TMA,
            )
            peak = tl.maximum(peak, here)
            dot += sums
        else:
            here, sums = _weigh(
                s1,
                weights,
                64,
                i,
                n0,
                v,
                r,
                t0,
                w,
                known,
                rho,
                g,
                scale,
                bias,
                absent,
                T,
                P,
                SIGMOID,
                TMA,
            )
            peak = tl.maximum(peak, here)
            dot += sums
        if W2 > 0:
            here, sums = _weigh(
                s2,
                weights,
                64,
                i,
                n0 + W1,
                v,
                r,
                t0,
                w,
                known,
                rho,
                g,
                scale,
                bias,
                absent,
                T,
                P,
                SIGMOID,
                TMA,
            )
            peak = tl.maximum(peak, here)
            dot += sums
        if W3 > 0:
            here, sums = _weigh(
                s3,
                weights_tail,
                16,
                i,
                n0 + W1 + W2,
                v,
                r,
                t0,
                w,
                known,
                rho,
                g,
                scale,
                bias,
                absent,
                T,
                P,
                SIGMOID,
                TMA,
            )
            peak = tl.maximum(peak, here)
            dot += sums
        column = tile // text_tiles % columns
        to = dots + (column * images + i).to(tl.int64) * T + t
        tl.store(to, dot, mask=t < T)
        tl.store(peaks + tile, peak)


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_gram_bwd_similarity_kernel(
    weights,
    products,
    dots,
    similarity,
    norm,
    out,
    count,
    columns,
    P,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """Write phi of the rounded weights, sum p s / sum p (G p), of ``count`` rows.

    The scale multiplies s - phi G p, and the error that all of a row share cancels so. A row whose
    |v|^2 has cancelled, or is 0, is left to what is known of it.
    """
    P = whole(P, True)
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < count
    square = tl.zeros((BR,), tl.float32)
    for k in range(0, P, BN):
        n = k + tl.arange(0, BN)
        at = row[:, None] * P + n[None, :]
        where = inside[:, None] & (n < P)[None, :]
        p = tl.load(weights + at, mask=where, other=0.0).to(tl.float32)
        square += tl.sum(p * tl.load(products + at, mask=where, other=0.0).to(tl.float32), 1)
    dot = tl.zeros((BR,), tl.float32)
    for k in range(0, columns):
        dot += tl.load(dots + tl.cast(k, tl.int64) * count + row, mask=inside, other=0.0)
    phi = tl.load(similarity + row, mask=inside, other=0.0)
    known = tl.where(tl.load(norm + row, mask=inside, other=1.0) < EPS, 0.0, phi)
    near = (tl.abs(square - 1.0) < 0.1) | (phi != phi)
    tl.store(out + row, tl.where(near, dot / tl.where(near, square, 1.0), known), mask=inside)


@triton.jit
def _coefficients(
    s,
    weights,
    products,
    outer,
    coefficients,
    WIDTH: tl.constexpr,
    i,
    n0,
    v,
    sums,
    t0,
    w,
    known,
    g,
    phi,
    up,
    up_weights,
    scale,
    bias,
    absent,
    images,
    T,
    P,
    SIGMOID: tl.constexpr,
    POOL: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write m, g phi p and what leaves along the patches; return the rows' sums of c s and c."""
    n = n0 + tl.arange(0, WIDTH)
    s = _cosines(s, v, n, w, absent)
    if POOL == 0:
        p = _block(weights, i, t0, n0, T, P, s.shape[0], WIDTH, TMA).to(tl.float32)
        other = _block(products, i, t0, n0, T, P, s.shape[0], WIDTH, TMA).to(tl.float32)
        _write(outer, p * (g * phi * up_weights)[:, None], i, t0, n0, T, P, TMA)
        p *= g[:, None]
        c = p * (s - other * phi[:, None])
    else:
        p = _likelihood(s, scale, bias, known, SIGMOID) * g[:, None]
        c = p * (s - phi[:, None])
    if SIGMOID:
        c /= 1.0 + tl.exp2(s * scale + bias)
    m = scale * LN2 * c + p
    tl.store(sums + n, tl.sum((scale * LN2 * c if POOL == 0 else m) * s, 0))
    m *= tl.load(v + n)[None, :] * (w * up)[:, None]
    _write(coefficients, m, i * 0, t0, i * P + n0, T, images * P, TMA)
    return tl.sum(c * s, 1), tl.sum(c, 1)


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_gram_bwd_coefficients_kernel(
    q,
    u1,
    u2,
    u3,
    inverse,
    text_inverse,
    scale_at,
    bias_at,
    similarity,
    lse,
    grad,
    peak,
    weights,
    weights_tail,
    products,
    products_tail,
    outer,
    outer_tail,
    coefficients,
    coefficients_tail,
    along,
    scalars,
    factors,
    first,
    images,
    T,
    P,
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
    """Write m [T, images, P], and g phi p, which may take the place of G p; equations (5)-(7).

    ``similarity`` is that of the chunk; ``factors`` gets what takes the powers of two of m and of
    g phi p away again.
    """
    text_tiles = tl.cdiv(T, BT)
    columns = P // (W1 + W2 + W3)
    scale, bias, absent = _scales(scale_at, bias_at)
    largest = tl.load(peak)
    up, down = _factor((2.0 * tl.abs(tl.load(scale_at)) + 1.0) * largest)
    up_weights, down_weights = _factor(largest)
    if tl.program_id(0) == 0:
        tl.store(factors, down)
        tl.store(factors + 1, down_weights)
    for tile in tl.range(
        tl.program_id(0), images * columns * text_tiles, tl.num_programs(0), disable_licm=True
    ):
        t0 = tile % text_tiles * BT
        n0 = tile // text_tiles % columns * (W1 + W2 + W3)
        i = tile // text_tiles // columns
        s1, s2, s3 = _products(q, u1, u2, u3, i, t0, n0, T, P, K, W1, W2, W3, TMA, BT, BK)
        v = inverse + i.to(tl.int64) * P
        t = t0 + tl.arange(0, BT)
        at = (first + i).to(tl.int64) * T + t
        w = tl.load(text_inverse + t, mask=t < T, other=0.0)
        g = tl.load(grad + at, mask=t < T, other=0.0)
        phi = tl.load(similarity + i.to(tl.int64) * T + t, mask=t < T, other=0.0)
        known = _log_sum(lse + at, t < T)
        sums = along + (i.to(tl.int64) * text_tiles + t0 // BT) * P
        cs = tl.zeros((BT,), tl.float32)
        c = tl.zeros((BT,), tl.float32)
        # The widest part comes last: the registers of the others are free by then.
        if W3 > 0:
            a, b = _coefficients(
                s3,
                weights_tail,
                products_tail,
                outer_tail,
                coefficients_tail,
                16,
                i,
                n0 + W1 + W2,
                v,
                sums,
                t0,
                w,
                known,
                g,
                phi,
                up,
                up_weights,
                scale,
                bias,
                absent,
                images,
                T,
                P,
                SIGMOID,
                POOL,
                TMA,
            )
            cs += a
            c += b
        if W2 > 0:
            a, b = _coefficients(
                s2,
                weights,
                products,
                outer,
                coefficients,
                64,
                i,
                n0 + W1,
                v,
                sums,
                t0,
                w,
                known,
                g,
                phi,
                up,
                up_weights,
                scale,
                bias,
                absent,
                images,
                T,
                P,
                SIGMOID,
                POOL,
                TMA,
            )
            cs += a
            c += b
        if W1 == 128:
            left, right = _halves(s1)
            a, b = _coefficients(
                left,
                weights,
                products,
                outer,
                coefficients,
                64,
                i,
                n0,
                v,
                sums,
                t0,
                w,
                known,
                g,
                phi,
                up,
                up_weights,
                scale,
                bias,
                absent,
                images,
                T,
                P,
                SIGMOID,
                POOL,
                TMA,
            )
            cs += a
            c += b
            a, b = _coefficients(
                right,
                weights,
                products,
                outer,
                coefficients,
                64,
                i,
                n0 + 64,
                v,
                sums,
                t0,
                w,
                known,
                g,
                phi,
                up,
                up_weights,
                scale,
                bias,
                absent,
                images,
                T,
                P,
                SIGMOID,
                POOL,
                TMA,
            )
            cs += a
            c += b
        else:
            a, b = _coefficients(
                s1,
                weights,
                products,
                outer,
                coefficients,
                64,
                i,
                n0,
                v,
                sums,
                t0,
                w,
                known,
                g,
                phi,
                up,
                up_weights,
                scale,
                bias,
                absent,
                images,
                T,
                P,
                SIGMOID,
                POOL,
                TMA,
            )
            cs += a
            c += b
        tl.store(scalars + 2 * tile, tl.sum(cs.to(tl.float64), 0))
        tl.store(scalars + 2 * tile + 1, tl.sum(c.to(tl.float64), 0))


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_gram_bwd_hessian_kernel(
    hessian,
    inverse,
    out,
    factors,
    P,
    BLOCK: tl.constexpr,
):
    """Write H of an image in 16 bits, for a product with the copies of its patches."""
    i = tl.program_id(0).to(tl.int64)
    P = whole(P, True)
    hessian += i * P * P
    out += i * P * P
    largest = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, P * P, BLOCK):
        at = k + tl.arange(0, BLOCK)
        h = tl.load(hessian + at, mask=at < P * P, other=0.0)
        largest = tl.maximum(largest, tl.abs(h))
    up, down = _factor(tl.max(largest, 0))
    for k in range(0, P * P, BLOCK):
        at = k + tl.arange(0, BLOCK)
        h = tl.load(hessian + at, mask=at < P * P, other=0.0)
        h *= tl.load(inverse + i * P + at % P, mask=at < P * P, other=0.0) * up
        tl.store(out + at, h.to(out.dtype.element_ty), mask=at < P * P)
    tl.store(factors + i, down)


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_gram_bwd_patches_kernel(
    products,
    hessians,
    u,
    lengths,
    inverse,
    along,
    factors,
    hessian_factors,
    out,
    first,
    count,
    N,
    T,
    P,
    K,
    D,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write dU from its products, minus the part along each patch; ``count`` rows, P an image."""
    P, K, D = whole(P, True), whole(K, True), whole(D, ALIGNED)
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i = row // P
    n = row - i * P
    inside = (row < count) & (n < N)
    r = tl.load(lengths + row, mask=inside, other=-1.0)
    v = tl.load(inverse + row, mask=inside, other=1.0)
    eps = tl.full((), EPS, tl.float32)
    text_tiles = tl.cdiv(T, BT)
    sums = tl.zeros((BR,), tl.float32)
    for k in range(0, text_tiles):
        at = along + (i * text_tiles + k) * P + n
        sums += tl.load(at, mask=inside, other=0.0)
    # What the projection onto the sphere takes away; a norm clamped at EPS is a constant and has
    # none.
    sums = tl.where(r < eps, 0.0, sums) * v
    down = tl.load(factors) / v
    if VECTOR:
        down_hessian = tl.load(factors + 1)
        down_hessian *= tl.load(hessian_factors + i, mask=inside, other=0.0)
    kept = (r >= 0.0) | (r != r)
    for k in range(0, K, BD):
        d = k + tl.arange(0, BD)
        at = row[:, None] * K + d[None, :]
        du = tl.load(products + at, mask=inside[:, None], other=0.0) * down[:, None]
        if VECTOR:
            du -= tl.load(hessians + at, mask=inside[:, None], other=0.0) * down_hessian[:, None]
        du -= tl.load(u + at, mask=inside[:, None], other=0.0).to(tl.float32) * sums[:, None]
        du = tl.where(kept[:, None], du / _larger(r, eps)[:, None], 0.0)
        to = out + ((first + i) * N + n)[:, None] * D + d[None, :]
        tl.store(to, du.to(out.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
