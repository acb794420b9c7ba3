"""center_assignment in Triton: tokens on rows, all centers on the columns of one block.

Equation numbers: ``ovseg_kernels/ops``. Scores, noise, softmax and counts are float32 (float64 for
float64) whatever the inputs. Sums have one owner and a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.patch_text_similarity import accumulation_dtype
from ._launch import ACC, aligned, halves, joined, on_device, program, rows, tiles, whole
from .philox import gumbel_from_bits, philox_bits

TOKENS = {2: 32, 4: 32, 8: 16}  # of a tile, by bytes of an accumulator
CHANNELS = {2: 64, 4: 32, 8: 16}  # of a step, by bytes of an element
WARPS = 4
# Never a reason to compile again; what copies need to know of the sizes and strides, ALIGNED says.
SIZES = [
    "G",
    "L",
    "D",
    "E",
    "q_b",
    "q_g",
    "k_b",
    "k_l",
    "v_b",
    "v_l",
    "normalizer",
    "need_keys",
    "need_values",
]


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Return sums + a b.

    float64 without tl.dot: Triton 3.8 cannot lower some of its float64 products for sm_80.
    """
    if tl.float64 == ACC:
        sums += tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=ACC)
    return sums


@triton.jit
def _rows(x, i, d, some, D, stride):
    """Load [rows, channels] of one image."""
    return tl.load(
        x + i.to(tl.int64)[:, None] * stride + d[None, :],
        mask=some[:, None] & (d < D)[None, :],
        other=0.0,
    )


@triton.jit
def _turned(x, i, d, some, D, stride):
    """Load [channels, rows] of one image."""
    return tl.load(
        x + i.to(tl.int64)[None, :] * stride + d[:, None],
        mask=some[None, :] & (d < D)[:, None],
        other=0.0,
    )


@triton.jit
def _scores(queries, keys, g, l, keep, G, D, q_g, k_l, ACC: tl.constexpr, BD: tl.constexpr):
    """Return q . k of a tile [tokens, centers] of one image, without scale and bias.

    16-bit operands are exact in the float32 sums.
    """
    z = tl.zeros((l.shape[0], g.shape[0]), ACC)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        z = _dot(
            _rows(keys, l, d, keep, D, k_l), _turned(queries, g, d, g < G, D, q_g), z, "ieee", ACC
        )
    return z


@triton.jit
def _factor(key_scale, b, l, L, scale, SCALED: tl.constexpr, ACC: tl.constexpr):
    """Return what a token's scores are multiplied by, [tokens]."""
    factor = tl.zeros((l.shape[0],), ACC) + scale
    if SCALED:
        factor *= tl.load(key_scale + b * L + l, mask=l < L, other=0.0)
    return factor


@triton.jit
def _biased(z, center_bias, b, g, G, BIASED: tl.constexpr):
    if BIASED:
        z += tl.load(center_bias + b * G + g, mask=g < G, other=0.0)[None, :]
    return z


@triton.jit
def _noise(noise, rng, b, g, l, G, L, NOISE: tl.constexpr, ACC: tl.constexpr):
    """Return Gumbel noise [tokens, centers]: given, from Philox, or none."""
    inside = (l < L)[:, None] & (g < G)[None, :]
    if NOISE == 1:
        u = tl.load(noise + (b * G + g)[None, :] * L + l[:, None], mask=inside, other=0.0).to(ACC)
    elif NOISE == 2:
        index = (b * L + l.to(tl.int64)[:, None]) * G + g.to(tl.int64)[None, :]
        u = gumbel_from_bits(philox_bits(tl.load(rng), tl.load(rng + 1), index)).to(ACC)
    else:
        u = tl.zeros((l.shape[0], g.shape[0]), ACC)
    return u


@triton.jit
def _softmax(y, g, G):
    """Return the softmax over the centers; a row with a NaN becomes NaN."""
    y = tl.where((g < G)[None, :], y, float("-inf"))
    e = tl.exp(y - tl.max(y, 1)[:, None])
    return tl.where((g < G)[None, :], e / tl.sum(e, 1)[:, None], 0.0)


@triton.jit
def _keep(mask, b, l, L, MASKED: tl.constexpr):
    keep = l < L
    if MASKED:
        keep = keep & (tl.load(mask + b * L + l, mask=keep, other=0) != 0)
    return keep


@triton.jit(do_not_specialize=SIZES)
def center_assignment_fwd_scores_kernel(
    queries,
    keys,
    center_bias,
    key_scale,
    mask,
    noise,
    rng,
    index,
    weights,
    soft,
    spoiled,
    G,
    L,
    D,
    q_b: tl.int64,
    q_g: tl.int64,
    k_b: tl.int64,
    k_l: tl.int64,
    scale,
    scale_low,
    tau,
    tau_low,
    ALIGNED: tl.constexpr,
    BIASED: tl.constexpr,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
    NOISE: tl.constexpr,
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    ACC: tl.constexpr,
    BL: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the winner (3), and where they are wanted two kinds of soft weights.

    They are the soft weights (2) and the softmax without noise (5).
    """
    tile, _, b = program(tl.cdiv(L, BL), 1)
    D, q_g, k_l = whole(D, ALIGNED), whole(q_g, ALIGNED), whole(k_l, ALIGNED)
    queries += b * whole(q_b, ALIGNED)
    keys += b * whole(k_b, ALIGNED)
    scale, tau = joined(scale, scale_low, ACC), joined(tau, tau_low, ACC)
    l, g = tile * BL + tl.arange(0, BL), tl.arange(0, BG)
    keep = _keep(mask, b, l, L, MASKED)
    z = _scores(queries, keys, g, l, keep, G, D, q_g, k_l, ACC, BD)
    z = _biased(
        z * _factor(key_scale, b, l, L, scale, SCALED, ACC)[:, None], center_bias, b, g, G, BIASED
    )
    if SOFT:
        at = soft + (b * G + g.to(tl.int64)[None, :]) * L + l[:, None]
        tl.store(
            at,
            tl.where(keep[:, None], _softmax(z, g, G), 0.0),
            mask=(l < L)[:, None] & (g < G)[None, :],
        )
    y = (z + _noise(noise, rng, b, g, l, G, L, NOISE, ACC)) / tau
    y = tl.where((g < G)[None, :], y, float("-inf"))
    top = tl.max(y, 1)
    # NaN, which is larger than all; a maximum may pass it by.
    some = tl.max((y != y).to(tl.int32), 1) > 0
    best = tl.min(
        tl.where(tl.where(some[:, None], y != y, y == top[:, None]), g[None, :], G - 1), 1
    )
    tl.store(index + b * L + l, tl.where(keep, best, -1).to(tl.int64), mask=l < L)
    # A token whose softmax is NaN: straight through, it has a weight of NaN for all centers.
    bad = keep & (some | (top - top != 0.0))
    tl.store(
        spoiled + b * tl.cdiv(L, BL) + tile,
        tl.where(tl.max(bad.to(tl.int32), 0) > 0, float("nan"), 0.0).to(ACC),
    )
    if not HARD:
        at = weights + (b * L + l)[:, None] * BG + g[None, :]
        tl.store(at, tl.where(keep[:, None], _softmax(y, g, G), 0.0), mask=(l < L)[:, None])


@triton.jit(do_not_specialize=SIZES)
def center_assignment_fwd_pool_kernel(
    values,
    mask,
    index,
    weights,
    spoiled,
    pooled,
    count,
    G,
    L,
    E,
    v_b: tl.int64,
    v_l: tl.int64,
    normalizer,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    HARD: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BL: tl.constexpr,
    BG: tl.constexpr,
    BE: tl.constexpr,
):
    """Write pooled and counts, (4) and (5).

    Tokens in order; a one-hot exists in registers only.
    """
    tile, _, b = program(tl.maximum(tl.cdiv(E, BE), 1), 1)
    E, v_l = whole(E, ALIGNED), whole(v_l, ALIGNED)
    values += b * whole(v_b, ALIGNED)
    e, g = tile * BE + tl.arange(0, BE), tl.arange(0, BG)
    sums, held, spoil = tl.zeros((BG, BE), ACC), tl.zeros((BG, BL), ACC), tl.zeros((), ACC)
    for l0 in range(0, L, BL):
        l = l0 + tl.arange(0, BL)
        keep = _keep(mask, b, l, L, MASKED)
        v = _rows(values, l, e, keep, E, v_l)
        if HARD:
            winner = tl.load(index + b * L + l, mask=l < L, other=-1)
            a = ((winner[None, :] == g[:, None]) & keep[None, :]).to(ACC)
            sums = _dot(a.to(v.dtype), v, sums, PRECISION, ACC)
        else:
            a = tl.load(
                weights + (b * L + l)[None, :] * BG + g[:, None], mask=keep[None, :], other=0.0
            )
            sums = _dot(a, v.to(ACC), sums, PRECISION, ACC)
        held += a  # summed once at the end: a sum in this loop breaks a pass of Triton 3.8
        spoil += tl.load(spoiled + b * tl.cdiv(L, BL) + l0 // BL)
    total = tl.sum(held, 1) + spoil
    n = tl.where(
        normalizer == 0,
        tl.where(total < 1.0, 1.0, total),
        tl.where(normalizer == 1, total + 1.0, 1.0),
    )
    row = b * G + g.to(tl.int64)
    tl.store(
        pooled + row[:, None] * E + e[None, :],
        (sums + spoil) / n[:, None],
        mask=(g < G)[:, None] & (e < E)[None, :],
    )
    if tile == 0:
        tl.store(count + row, total, mask=g < G)


@triton.jit(do_not_specialize=SIZES)
def center_assignment_bwd_tokens_kernel(
    queries,
    keys,
    values,
    center_bias,
    key_scale,
    mask,
    noise,
    rng,
    index,
    scaled,
    rho,
    grad_soft,
    d_scores,
    d_scale,
    d_keys,
    d_values,
    G,
    L,
    D,
    E,
    q_b: tl.int64,
    q_g: tl.int64,
    k_b: tl.int64,
    k_l: tl.int64,
    v_b: tl.int64,
    v_l: tl.int64,
    need_keys,
    need_values,
    scale,
    scale_low,
    tau,
    tau_low,
    ALIGNED: tl.constexpr,
    BIASED: tl.constexpr,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
    NOISE: tl.constexpr,
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    SHARED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BL: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
):
    """Write d scores (6), (7) of a tile of tokens, then d k (8) and d v (9) of the same tokens."""
    tile, _, b = program(tl.cdiv(L, BL), 1)
    D, E, q_g, k_l, v_l = (
        whole(D, ALIGNED),
        whole(E, ALIGNED),
        whole(q_g, ALIGNED),
        whole(k_l, ALIGNED),
        whole(v_l, ALIGNED),
    )
    queries += b * whole(q_b, ALIGNED)
    keys += b * whole(k_b, ALIGNED)
    values += b * whole(v_b, ALIGNED)
    scaled += b * G * E
    scale, tau = joined(scale, scale_low, ACC), joined(tau, tau_low, ACC)
    l, g = tile * BL + tl.arange(0, BL), tl.arange(0, BG)
    keep = _keep(mask, b, l, L, MASKED)
    raw = _scores(queries, keys, g, l, keep, G, D, q_g, k_l, ACC, BD)
    factor = _factor(key_scale, b, l, L, scale, SCALED, ACC)[:, None]
    z = _biased(raw * factor, center_bias, b, g, G, BIASED)
    ds = tl.zeros((BL, BG), ACC)
    for e0 in range(0, E, BD):
        e = e0 + tl.arange(0, BD)
        v = _rows(values, l, e, keep, E, v_l)
        ds = _dot(v.to(ACC), _turned(scaled, g, e, g < G, E, E), ds, PRECISION, ACC)
    s = _softmax((z + _noise(noise, rng, b, g, l, G, L, NOISE, ACC)) / tau, g, G)
    s = tl.where(keep[:, None], s, 0.0)
    ds -= tl.load(rho + b * G + g, mask=g < G, other=0.0)[None, :]
    dz = s * (ds - tl.sum(s * ds, 1)[:, None]) / tau
    inside = keep[:, None] & (g < G)[None, :]
    if SOFT:
        plain = tl.where(inside, _softmax(z, g, G), 0.0)
        upstream = tl.load(
            grad_soft + (b * G + g.to(tl.int64)[None, :]) * L + l[:, None], mask=inside, other=0.0
        )
        dz += plain * (upstream - tl.sum(plain * upstream, 1)[:, None])
    dz = tl.where(inside, dz, 0.0)
    tl.store(d_scores + (b * L + l)[:, None] * BG + g[None, :], dz, mask=(l < L)[:, None])
    if SCALED:
        tl.store(d_scale + b * L + l, tl.sum(dz * raw, 1) * scale, mask=l < L)  # (10)
    if HARD:  # from here on s are the weights of (9)
        winner = tl.load(index + b * L + l, mask=l < L, other=-1)
        s = ((winner[:, None] == g[None, :]) & inside).to(ACC) + tl.where(inside, s - s, 0.0)
    if need_keys:
        dk_scores = dz * factor
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            dk = _dot(
                dk_scores,
                _rows(queries, g, d, g < G, D, q_g).to(ACC),
                tl.zeros((BL, BD), ACC),
                PRECISION,
                ACC,
            )
            if SHARED:
                dk = _dot(s, _rows(scaled, g, d, g < G, D, D), dk, PRECISION, ACC)
            at = d_keys + (b * L + l)[:, None] * D + d[None, :]
            tl.store(at, dk.to(d_keys.dtype.element_ty), mask=(l < L)[:, None] & (d < D)[None, :])
    if need_values:
        for e0 in range(0, E, BD):
            e = e0 + tl.arange(0, BD)
            dv = _dot(s, _rows(scaled, g, e, g < G, E, E), tl.zeros((BL, BD), ACC), PRECISION, ACC)
            at = d_values + (b * L + l)[:, None] * E + e[None, :]
            tl.store(at, dv.to(d_values.dtype.element_ty), mask=(l < L)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=SIZES)
def center_assignment_bwd_queries_kernel(
    keys,
    key_scale,
    mask,
    d_scores,
    d_queries,
    G,
    L,
    D,
    k_b: tl.int64,
    k_l: tl.int64,
    scale,
    scale_low,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BL: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
):
    """Write d q = sum_l d scores k, (8): tokens in order."""
    tile, _, b = program(tl.cdiv(D, BD), 1)
    D, k_l = whole(D, ALIGNED), whole(k_l, ALIGNED)
    keys += b * whole(k_b, ALIGNED)
    scale = joined(scale, scale_low, ACC)
    d, g = tile * BD + tl.arange(0, BD), tl.arange(0, BG)
    dq = tl.zeros((BG, BD), ACC)
    for l0 in range(0, L, BL):
        l = l0 + tl.arange(0, BL)
        keep = _keep(mask, b, l, L, MASKED)
        dz = tl.load(
            d_scores + (b * L + l)[None, :] * BG + g[:, None], mask=(l < L)[None, :], other=0.0
        )
        k = _rows(keys, l, d, keep, D, k_l)
        dz *= _factor(key_scale, b, l, L, scale, SCALED, ACC)[None, :]
        dq = _dot(dz, k.to(ACC), dq, PRECISION, ACC)
    at = d_queries + (b * G + g.to(tl.int64)[:, None]) * D + d[None, :]
    tl.store(at, dq.to(d_queries.dtype.element_ty), mask=(g < G)[:, None] & (d < D)[None, :])


class _Call:
    """The arguments that forward and backward share.

    Absent tensors are stood in for by one that is there, and never read.
    """

    def __init__(
        self, queries, keys, values, center_bias, key_scale, mask, noise, rng, hard, scale, tau
    ):
        self.B, self.G, self.D = queries.shape
        self.queries, self.keys = rows(queries), rows(keys)
        self.values = self.keys if values is keys else rows(values)
        self.q_strides, self.k_strides, self.v_strides = (
            x.stride()[:2] for x in (self.queries, self.keys, self.values)
        )
        self.scale, self.tau = halves(scale), halves(tau)
        self.L, self.E = keys.shape[1], values.shape[2]
        acc = accumulation_dtype(queries)
        self.center_bias = queries if center_bias is None else center_bias
        self.key_scale = queries if key_scale is None else key_scale
        self.mask = queries if mask is None else mask.contiguous().view(torch.uint8)
        self.noise, self.rng = (
            queries if noise is None else noise.contiguous(),
            queries if rng is None else rng,
        )
        step = CHANNELS[queries.element_size()]
        self.tokens = TOKENS[acc.itemsize]
        # Centers of a block, and the pitch of what lies between the kernels.
        self.BG = max(16, triton.next_power_of_2(self.G))
        self.step = {"BL": self.tokens, "BG": self.BG, "num_warps": WARPS}
        self.BD, self.wide = step, CHANNELS[torch.empty((), dtype=acc).element_size()]
        self.options = {
            "MASKED": mask is not None,
            "ACC": ACC[acc],
            "ALIGNED": aligned(self.queries, self.keys, self.values),
        }
        self.extras = {"BIASED": center_bias is not None, "SCALED": key_scale is not None}
        self.kind = {"NOISE": 1 if noise is not None else 2 if rng is not None else 0, "HARD": hard}
        # Products with d scores, which can be of any size: 16-bit operands are exact in tf32, and
        # so is a one-hot.
        self.precision = "tf32" if queries.element_size() == 2 else "ieee"
        self.dtype = acc


def forward(
    queries,
    keys,
    values,
    center_bias,
    key_scale,
    mask,
    noise,
    rng,
    scale,
    tau,
    hard,
    normalizer,
    want_soft,
):
    """Return (pooled, index, count, soft) as ``ovseg::center_assignment`` does."""
    x = _Call(queries, keys, values, center_bias, key_scale, mask, noise, rng, hard, scale, tau)
    pooled, count = (
        queries.new_empty(shape, dtype=x.dtype) for shape in ((x.B, x.G, x.E), (x.B, x.G))
    )
    index = queries.new_empty((x.B, x.L), dtype=torch.int64)
    soft = queries.new_empty((x.B if want_soft else 0, x.G, x.L), dtype=x.dtype)
    weights = queries.new_empty((0 if hard else x.B, x.L, x.BG), dtype=x.dtype)
    spoiled = queries.new_empty((x.B, tiles(x.L, x.tokens)), dtype=x.dtype)
    if x.B == 0:
        return pooled, index, count, soft
    with on_device(queries):
        if x.L:
            center_assignment_fwd_scores_kernel[(tiles(x.L, x.tokens) * x.B,)](
                x.queries,
                x.keys,
                x.center_bias,
                x.key_scale,
                x.mask,
                x.noise,
                x.rng,
                index,
                weights,
                soft,
                spoiled,
                x.G,
                x.L,
                x.D,
                *x.q_strides,
                *x.k_strides,
                *x.scale,
                *x.tau,
                SOFT=want_soft,
                BD=x.BD,
                **x.step,
                **x.options,
                **x.kind,
                **x.extras,
            )
        center_assignment_fwd_pool_kernel[(max(1, tiles(x.E, x.BD)) * x.B,)](
            x.values,
            x.mask,
            index,
            weights,
            spoiled,
            pooled,
            count,
            x.G,
            x.L,
            x.E,
            *x.v_strides,
            normalizer,
            HARD=hard,
            PRECISION=x.precision,
            BE=x.BD,
            **x.step,
            **x.options,
        )
    return pooled, index, count, soft


def backward(
    grad,
    grad_count,
    grad_soft,
    queries,
    keys,
    values,
    center_bias,
    key_scale,
    mask,
    noise,
    rng,
    pooled,
    index,
    count,
    scale,
    tau,
    hard,
    normalizer,
    need_queries,
    need_keys,
    need_values,
    shared,
):
    """Return the five gradients as ``ovseg::center_assignment_backward`` does.

    They are d queries, d keys, d values, d center_bias, d key_scale.
    """
    x = _Call(queries, keys, values, center_bias, key_scale, mask, noise, rng, hard, scale, tau)
    d_queries, d_keys, d_values = (
        like.new_empty((like.shape[0] if need else 0, *like.shape[1:]))
        for like, need in ((queries, need_queries), (keys, need_keys), (values, need_values))
    )
    d_bias = queries.new_zeros((0 if center_bias is None else x.B, x.G), dtype=x.dtype)
    d_scale = queries.new_empty((0 if key_scale is None else x.B, x.L), dtype=x.dtype)
    if x.B == 0 or x.L == 0:
        return d_queries.zero_(), d_keys, d_values, d_bias, d_scale
    n = (torch.where(count < 1, 1, count), count + 1, torch.ones_like(count))[normalizer]
    scaled = (grad / n[..., None]).contiguous()
    rho = (pooled * scaled).sum(-1)
    if normalizer != 1:  # constant divisors
        rho = torch.where(count < 1, 0, rho) if normalizer == 0 else torch.zeros_like(rho)
    if grad_count is not None:
        rho = rho - grad_count
    d_scores = queries.new_empty((x.B, x.L, x.BG), dtype=x.dtype)
    soft = queries if grad_soft is None else grad_soft.contiguous()
    with on_device(queries):
        center_assignment_bwd_tokens_kernel[(tiles(x.L, x.tokens) * x.B,)](
            x.queries,
            x.keys,
            x.values,
            x.center_bias,
            x.key_scale,
            x.mask,
            x.noise,
            x.rng,
            index,
            scaled,
            rho,
            soft,
            d_scores,
            d_scale,
            d_keys,
            d_values,
            x.G,
            x.L,
            x.D,
            x.E,
            *x.q_strides,
            *x.k_strides,
            *x.v_strides,
            int(need_keys),
            int(need_values),
            *x.scale,
            *x.tau,
            SOFT=grad_soft is not None,
            SHARED=shared,
            PRECISION=x.precision,
            BD=x.wide,
            **x.step,
            **x.options,
            **x.kind,
            **x.extras,
        )
        if need_queries:
            center_assignment_bwd_queries_kernel[(tiles(x.D, x.wide) * x.B,)](
                x.keys,
                x.key_scale,
                x.mask,
                d_scores,
                d_queries,
                x.G,
                x.L,
                x.D,
                *x.k_strides,
                *x.scale,
                SCALED=key_scale is not None,
                PRECISION=x.precision,
                BD=x.wide,
                **x.step,
                **x.options,
            )
    if center_bias is not None:
        d_bias = d_scores[..., : x.G].sum(1)  # (10)
    return d_queries, d_keys, d_values, d_bias, d_scale
