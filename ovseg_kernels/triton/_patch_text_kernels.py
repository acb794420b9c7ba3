"""Kernels of ``patch_text_similarity``; ``patch_text_similarity.py`` launches them.

Equation numbers: ``ovseg_kernels/ops/patch_text_similarity.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import (
    program,
    squares,
    whole,
)

# Never a reason to compile again; what copies need to know of D and the strides, ALIGNED says. P is
# the pitch of N.
SIZES = ["T", "N", "P", "D", "first", "images", "slots", "patch_b", "patch_n", "text_t"]


@triton.jit
def _logit(s, scale, bias, SIGMOID: tl.constexpr):
    """Return log f(s), equation (2)."""
    if SIGMOID:
        y = scale * s + bias
        x = tl.minimum(y, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(y)))
    else:
        x = scale * s
    return x


@triton.jit
def _larger(x, y):
    """Return the larger one; a NaN on either side is kept."""
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def _tile(base, rows, columns, row_stride, column_stride, n_rows, n_columns):
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    at = (
        base
        + rows.to(tl.int64)[:, None] * row_stride
        + columns.to(tl.int64)[None, :] * column_stride
    )
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _patches(patches, n, d, keep, D, patch_n):
    """Load [patches, channels] of one image."""
    return tl.load(
        patches + n.to(tl.int64)[:, None] * patch_n + d[None, :],
        mask=keep[:, None] & (d < D)[None, :],
        other=0.0,
    )


@triton.jit
def _turned(patches, n, d, keep, D, patch_n):
    """Load [channels, patches] of one image."""
    return tl.load(
        patches + n.to(tl.int64)[None, :] * patch_n + d[:, None],
        mask=keep[None, :] & (d < D)[:, None],
        other=0.0,
    )


@triton.jit
def _kept(mask, image, n, N, MASKED: tl.constexpr):
    keep = n < N
    if MASKED:
        keep = keep & (tl.load(mask + image * N + n, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _cosines(
    patches,
    texts,
    norms,
    text_norms,
    i,
    t,
    n,
    keep,
    T,
    N,
    D,
    patch_n,
    text_t,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
):
    """Return (1) of one tile of one image.

    Raw operands enter the product, norms scale its sums.
    """
    s = tl.zeros((t.shape[0], n.shape[0]), ACC)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        q = _tile(texts, t, d, text_t, 1, T, D)
        s = tl.dot(
            q, _turned(patches, n, d, keep, D, patch_n), s, input_precision=PRECISION, out_dtype=ACC
        )
    r = tl.load(norms + i * N + n, mask=n < N, other=1.0)
    rq = tl.load(text_norms + t, mask=t < T, other=1.0)
    eps = tl.full((), 1e-12, ACC)
    return s / _larger(r, eps)[None, :] / _larger(rq, eps)[:, None]


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_fwd_kernel(
    patches,
    texts,
    mask,
    scale_at,
    bias_at,
    norms,
    text_norms,
    similarity,
    lse,
    best,
    first,
    T,
    N,
    D,
    patch_b: tl.int64,
    patch_n: tl.int64,
    text_t: tl.int64,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    SIGMOID: tl.constexpr,
    POOL: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Sweep over the patches with a running maximum and sums.

    They give the log-sum of the weights, and (3) for score and max.
    """
    text_tile, _, i = program(tl.cdiv(T, BT), 1)
    image = first + i
    D, patch_n, text_t = whole(D, ALIGNED), whole(patch_n, ALIGNED), whole(text_t, ALIGNED)
    patches += image * whole(patch_b, ALIGNED)
    t = text_tile * BT + tl.arange(0, BT)
    scale, bias = tl.load(scale_at), tl.load(bias_at)
    top = tl.full((BT,), float("-inf"), ACC)
    total, along = tl.zeros((BT,), ACC), tl.zeros((BT,), ACC)
    found = tl.full((BT,), -1, tl.int32)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        keep = _kept(mask, image, n, N, MASKED)
        s = _cosines(
            patches,
            texts,
            norms,
            text_norms,
            i,
            t,
            n,
            keep,
            T,
            N,
            D,
            patch_n,
            text_t,
            ACC,
            PRECISION,
            BD,
        )
        x = s if POOL == 2 else _logit(s, scale, bias, SIGMOID)
        x = tl.where(keep[None, :], x, float("-inf"))
        here = tl.max(x, 1)
        here = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), here)
        now = _larger(here, top)
        if POOL == 2:
            hit = keep[None, :] & ((x == now[:, None]) | (x != x))
            place = tl.min(tl.where(hit, n[None, :], N), 1)
            found = tl.where((place < N) & ((top != now) | (found < 0)), place, found)
        else:
            shift = tl.where(now == float("-inf"), 0.0, now)
            e = tl.where(keep[None, :], tl.exp(x - shift[:, None]), 0.0)
            factor = tl.where(top == now, 1.0, tl.exp(top - shift))
            total = total * factor + tl.sum(e, 1)
            along = along * factor + tl.sum(tl.where(keep[None, :], e * s, 0.0), 1)
        top = now
    out = image * T + t
    inside = t < T
    if POOL == 2:
        tl.store(similarity + out, tl.where(found >= 0, top, 0.0), mask=inside)
        tl.store(best + i * T + t, found, mask=inside)
    else:
        some = total != 0.0
        tl.store(
            lse + out,
            tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf")),
            mask=inside,
        )
        if POOL == 1:
            tl.store(
                similarity + out,
                tl.where(some, along / tl.where(some, total, 1.0), 0.0),
                mask=inside,
            )


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_weights_kernel(
    patches,
    texts,
    mask,
    scale_at,
    bias_at,
    norms,
    text_norms,
    lse,
    weights,
    first,
    T,
    N,
    P,
    D,
    patch_b: tl.int64,
    patch_n: tl.int64,
    text_t: tl.int64,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    SIGMOID: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the weights a of one tile, their log-sum known, equation (2); zero up to the pitch."""
    text_tile, patch_tile, i = program(tl.cdiv(T, BT), tl.cdiv(N, BN))
    image = first + i
    P, D, patch_n, text_t = (
        whole(P, True),
        whole(D, ALIGNED),
        whole(patch_n, ALIGNED),
        whole(text_t, ALIGNED),
    )
    patches += image * whole(patch_b, ALIGNED)
    t = text_tile * BT + tl.arange(0, BT)
    n = patch_tile * BN + tl.arange(0, BN)
    keep = _kept(mask, image, n, N, MASKED)
    s = _cosines(
        patches,
        texts,
        norms,
        text_norms,
        i,
        t,
        n,
        keep,
        T,
        N,
        D,
        patch_n,
        text_t,
        ACC,
        PRECISION,
        BD,
    )
    known = tl.load(lse + image * T + t, mask=t < T, other=0.0)
    x = _logit(s, tl.load(scale_at), tl.load(bias_at), SIGMOID)
    a = tl.where(keep[None, :], tl.exp(tl.where(keep[None, :], x - known[:, None], 0.0)), 0.0)
    at = weights + (i * T + t)[:, None] * P + n[None, :]
    tl.store(at, a.to(weights.dtype.element_ty), mask=(t < T)[:, None] & (n < P)[None, :])


@triton.jit
def _pooled(
    weights,
    patches,
    mask,
    image,
    t,
    d,
    T,
    N,
    P,
    D,
    patch_n,
    MASKED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
):
    """Return v = sum_n a_n u_n of one tile of texts and channels of one image."""
    v = tl.zeros((t.shape[0], d.shape[0]), ACC)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        a = _tile(weights, t, n, P, 1, T, P)
        u = _patches(patches, n, d, _kept(mask, image, n, N, MASKED), D, patch_n)
        v = tl.dot(a, u.to(a.dtype), v, input_precision=PRECISION, out_dtype=ACC)
    return v


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_pooled_norms_kernel(
    weights,
    patches,
    texts,
    mask,
    text_norms,
    lse,
    similarity,
    norm,
    first,
    T,
    N,
    P,
    D,
    patch_b: tl.int64,
    patch_n: tl.int64,
    text_t: tl.int64,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Write |v| and (4); v never leaves the program."""
    text_tile, _, i = program(tl.cdiv(T, BT), 1)
    image = first + i
    P, D, patch_n, text_t = (
        whole(P, True),
        whole(D, ALIGNED),
        whole(patch_n, ALIGNED),
        whole(text_t, ALIGNED),
    )
    patches += image * whole(patch_b, ALIGNED)
    t = text_tile * BT + tl.arange(0, BT)
    squared, dot, unit = tl.zeros((BT,), ACC), tl.zeros((BT,), ACC), tl.full((BT,), 1.0, ACC)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        v = _pooled(
            weights + i * T * P,
            patches,
            mask,
            image,
            t,
            d,
            T,
            N,
            P,
            D,
            patch_n,
            MASKED,
            ACC,
            PRECISION,
            BN,
        )
        before = unit
        squared, unit, v = squares(v, squared, unit)
        dot = dot * (before / unit) + tl.sum(v * _tile(texts, t, d, text_t, 1, T, D).to(ACC), 1)
    length = tl.sqrt(squared) * unit
    eps = tl.full((), 1e-12, ACC)
    rq = tl.load(text_norms + t, mask=t < T, other=1.0)
    tl.store(norm + image * T + t, length, mask=t < T)
    # Whether there is a patch that is kept.
    some = tl.load(lse + image * T + t, mask=t < T, other=0.0) != float("-inf")
    phi = dot / _larger(rq, eps) * (unit / _larger(length, eps))
    tl.store(similarity + image * T + t, tl.where(some, phi, 0.0), mask=t < T)


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_vectors_kernel(
    weights,
    patches,
    mask,
    norm,
    vectors,
    first,
    T,
    N,
    P,
    D,
    patch_b: tl.int64,
    patch_n: tl.int64,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Write v / |v|.

    Lengths meet 1 / |v| before they meet each other, whose product may have no place in ACC.
    """
    text_tile, channel_tile, i = program(tl.cdiv(T, BT), tl.cdiv(D, BD))
    image = first + i
    P, D, patch_n = whole(P, True), whole(D, ALIGNED), whole(patch_n, ALIGNED)
    patches += image * whole(patch_b, ALIGNED)
    t = text_tile * BT + tl.arange(0, BT)
    d = channel_tile * BD + tl.arange(0, BD)
    v = _pooled(
        weights + i * T * P,
        patches,
        mask,
        image,
        t,
        d,
        T,
        N,
        P,
        D,
        patch_n,
        MASKED,
        ACC,
        PRECISION,
        BN,
    )
    v /= _larger(tl.load(norm + image * T + t, mask=t < T, other=1.0), tl.full((), 1e-12, ACC))[
        :, None
    ]
    at = vectors + (i * T + t)[:, None] * D + d[None, :]
    tl.store(at, v.to(vectors.dtype.element_ty), mask=(t < T)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_bwd_coefficients_kernel(
    patches,
    texts,
    mask,
    scale_at,
    bias_at,
    norms,
    text_norms,
    similarity,
    lse,
    norm,
    best,
    grad,
    vectors,
    coefficients,
    factors,
    along,
    scalars,
    first,
    T,
    N,
    P,
    D,
    patch_b: tl.int64,
    patch_n: tl.int64,
    text_t: tl.int64,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    SIGMOID: tl.constexpr,
    POOL: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BACK: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the coefficients m with dU = m^T q + .., dq = m U, from cosines; equations (5)-(7)."""
    text_tiles, patch_tiles = tl.cdiv(T, BT), tl.cdiv(N, BN)
    text_tile, patch_tile, i = program(text_tiles, patch_tiles)
    image = first + i
    P, D, patch_n, text_t = (
        whole(P, True),
        whole(D, ALIGNED),
        whole(patch_n, ALIGNED),
        whole(text_t, ALIGNED),
    )
    patches += image * whole(patch_b, ALIGNED)
    t = text_tile * BT + tl.arange(0, BT)
    n = patch_tile * BN + tl.arange(0, BN)
    keep = _kept(mask, image, n, N, MASKED)
    s = _cosines(
        patches,
        texts,
        norms,
        text_norms,
        i,
        t,
        n,
        keep,
        T,
        N,
        D,
        patch_n,
        text_t,
        ACC,
        PRECISION,
        BD,
    )
    scale, bias = tl.load(scale_at), tl.load(bias_at)
    eps = tl.full((), 1e-12, ACC)
    r = tl.load(norms + i * N + n, mask=n < N, other=1.0)
    rq = tl.load(text_norms + t, mask=t < T, other=1.0)
    g = tl.load(grad + image * T + t, mask=t < T, other=0.0)
    phi = tl.load(similarity + image * T + t, mask=t < T, other=0.0)
    inside = (t < T)[:, None] & keep[None, :]
    if POOL == 2:
        place = tl.load(best + i * T + t, mask=t < T, other=-1)
        c = tl.zeros((BT, BN), ACC)
        total = tl.where(inside & (place[:, None] == n[None, :]), g[:, None], 0.0)
        m = total / _larger(r, eps)[None, :]
        parallel = total * s
    else:
        known = tl.load(lse + image * T + t, mask=t < T, other=0.0)
        x = _logit(s, scale, bias, SIGMOID)
        a = tl.where(inside, tl.exp(tl.where(inside, x - known[:, None], 0.0)), 0.0)
        slope = 1.0 / (1.0 + tl.exp(scale * s + bias)) if SIGMOID else 1.0
        if POOL == 1:
            c = g[:, None] * a * slope * (s - phi[:, None])  # (5)
            total = g[:, None] * a + scale * c
            m = total / _larger(r, eps)[None, :]
            parallel = total * s
        else:
            length = tl.load(norm + image * T + t, mask=t < T, other=1.0)
            rho = 1.0 / _larger(length, eps)
            back = tl.where(length < eps, 0.0, phi)
            uv = tl.zeros((BT, BN), ACC)
            for d0 in range(0, D, BD):
                d = d0 + tl.arange(0, BD)
                v = _tile(vectors + i * T * D, t, d, D, 1, T, D)
                u = _turned(patches, n, d, keep, D, patch_n)
                uv = tl.dot(v, u.to(v.dtype), uv, input_precision=BACK, out_dtype=ACC)
            c = (
                g[:, None]
                * a
                * slope
                * (r[None, :] * rho[:, None] * s - back[:, None] * (uv * rho[:, None]))
            )  # (6)
            m = scale * c / _larger(r, eps)[None, :] + g[:, None] * a * rho[:, None]  # (7)
            parallel = scale * c * s
            if patch_tile == 0:
                tl.store(factors + i * T + t, -g * back * rho, mask=t < T)
    at = coefficients + (i * T + t)[:, None] * P + n[None, :]
    m = tl.where(inside, m / _larger(rq, eps)[:, None], 0.0)
    tl.store(at, m.to(coefficients.dtype.element_ty), mask=(t < T)[:, None] & (n < P)[None, :])
    parallel = tl.where(inside, parallel, 0.0)
    tl.store(along + (i * text_tiles + text_tile) * N + n, tl.sum(parallel, 0), mask=n < N)
    block = (i * patch_tiles + patch_tile) * text_tiles + text_tile
    c = tl.where(inside, c, 0.0)
    # "max" has no c, be s NaN.
    tl.store(
        scalars + 2 * block, tl.sum(tl.sum(tl.where(c == 0.0, 0.0, c * s), 1).to(tl.float64), 0)
    )
    tl.store(scalars + 2 * block + 1, tl.sum(tl.sum(c, 1).to(tl.float64), 0))


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_bwd_patches_kernel(
    coefficients,
    texts,
    weights,
    vectors,
    factors,
    along,
    patches,
    mask,
    out,
    first,
    T,
    N,
    P,
    D,
    patch_b: tl.int64,
    patch_n: tl.int64,
    text_t: tl.int64,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Write dU = m^T q - sum_t h_t |v_t| a_t v_t / |v_t|, minus the part along each patch."""
    patch_tile, channel_tile, i = program(tl.cdiv(N, BN), tl.cdiv(D, BD))
    image = first + i
    P, D, patch_n, text_t = (
        whole(P, True),
        whole(D, ALIGNED),
        whole(patch_n, ALIGNED),
        whole(text_t, ALIGNED),
    )
    patches += image * whole(patch_b, ALIGNED)
    n = patch_tile * BN + tl.arange(0, BN)
    d = channel_tile * BD + tl.arange(0, BD)
    du = tl.zeros((BN, BD), ACC)
    for t0 in range(0, T, BT):
        t = t0 + tl.arange(0, BT)
        m = _tile(coefficients + i * T * P, n, t, 1, P, P, T)
        q = _tile(texts, t, d, text_t, 1, T, D)
        du = tl.dot(m, q.to(m.dtype), du, input_precision=PRECISION, out_dtype=ACC)
        if VECTOR:
            h = tl.load(factors + i * T + t, mask=t < T, other=0.0)
            a = _tile(weights + i * T * P, n, t, 1, P, P, T)
            v = _tile(vectors + i * T * D, t, d, D, 1, T, D)
            du = tl.dot(
                (a.to(ACC) * h[None, :]).to(a.dtype),
                v,
                du,
                input_precision=PRECISION,
                out_dtype=ACC,
            )
    keep = _kept(mask, image, n, N, MASKED)
    inside = keep[:, None] & (d < D)[None, :]
    u = _patches(patches, n, d, keep, D, patch_n)
    back = tl.load(along + i * N + n, mask=n < N, other=0.0)
    du = tl.where(inside, du - back[:, None] * u.to(ACC), 0.0)
    at = out + (image * N + n)[:, None] * D + d[None, :]
    tl.store(at, du.to(out.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def patch_text_similarity_bwd_texts_kernel(
    coefficients,
    patches,
    mask,
    out,
    first,
    images,
    slots,
    T,
    N,
    P,
    D,
    patch_b: tl.int64,
    patch_n: tl.int64,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Write dq of one slot.

    Its images of this chunk, in order, onto what earlier chunks left there.
    """
    text_tile, channel_tile, slot = program(tl.cdiv(T, BT), tl.cdiv(D, BD))
    P, D, patch_n, patch_b = (
        whole(P, True),
        whole(D, ALIGNED),
        whole(patch_n, ALIGNED),
        whole(patch_b, ALIGNED),
    )
    t = text_tile * BT + tl.arange(0, BT)
    d = channel_tile * BD + tl.arange(0, BD)
    dq = tl.zeros((BT, BD), ACC)
    for k in range(images * slot // slots, images * (slot + 1) // slots):
        i = tl.cast(k, tl.int64)
        u = patches + (first + i) * patch_b
        dq += _pooled(
            coefficients + i * T * P,
            u,
            mask,
            first + i,
            t,
            d,
            T,
            N,
            P,
            D,
            patch_n,
            MASKED,
            ACC,
            PRECISION,
            BN,
        )
    at = out + (slot * T + t)[:, None] * D + d[None, :]
    inside = (t < T)[:, None] & (d < D)[None, :]
    if first > 0:
        dq += tl.load(at, mask=inside, other=0.0)
    tl.store(at, dq, mask=inside)
