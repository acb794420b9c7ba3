"""dense_contrastive_loss in Triton: keys of a chunk of pixels at a time.

Of them torch keeps the best. Equation numbers: ``ovseg_kernels/ops``. Similarities of 16-bit pixels
are tf32 products, others exact. Sums have one owner and a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import (
    ACC,
    aligned,
    chunk_size,
    halves,
    joined,
    on_device,
    program,
    row_norms,
    rows,
    tiles,
    whole,
)
from .center_assignment import _dot
from .philox import gumbel_from_bits, philox_bits, uniform_from_bits

CHUNK_BYTES = 64 << 20
TILE = {torch.float32: (64, 32), torch.float64: (16, 16)}  # texts and pixels, and a step of depth
WARPS = 4
# Never a reason to compile again; what copies need to know of D and the strides, ALIGNED says.
SIZES = ["T", "N", "D", "K", "units", "entries", "first", "count", "pixels_in_all", "p_b", "p_n"]


@triton.jit(do_not_specialize=SIZES)
def dense_contrastive_loss_select_keys_kernel(
    pixels,
    texts,
    inverse,
    image_ids,
    text_ids,
    rng,
    lowest,
    keys,
    T,
    N,
    D,
    first,
    count,
    pixels_in_all,
    p_b: tl.int64,
    p_n: tl.int64,
    inverse_temperature,
    inverse_temperature_low,
    margin,
    margin_low,
    ALIGNED: tl.constexpr,
    IDS: tl.constexpr,
    POSITIVES: tl.constexpr,
    SAMPLING: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the keys of (2) or (3) of a tile; -infinity where a pixel is not eligible."""
    D, p_b, p_n = whole(D, ALIGNED), whole(p_b, ALIGNED), whole(p_n, ALIGNED)
    pixel_tile, text_tile, _ = program(tl.cdiv(count, BT), tl.cdiv(T, BT))
    j = text_tile * BT + tl.arange(0, BT)
    at = pixel_tile * BT + tl.arange(0, BT)
    x = first + at.to(tl.int64)
    i = x // N
    inside = (j < T)[:, None] & (at < count)[None, :]
    if IDS:
        mine = (
            tl.load(text_ids + j, mask=j < T, other=0)[:, None]
            == tl.load(image_ids + i, mask=at < count, other=0)[None, :]
        )
    else:
        mine = j[:, None] == i[None, :]
    eligible = inside & (mine if POSITIVES else ~mine)
    key = tl.full((BT, BT), float("-inf"), ACC)
    # Most tiles hold no pair of a text with its own image.
    if tl.max(tl.max(eligible.to(tl.int32), 1), 0) > 0:
        s = tl.zeros((BT, BT), ACC)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            q = tl.load(
                texts + j.to(tl.int64)[:, None] * D + d[None, :],
                mask=(j < T)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            u = tl.load(
                pixels + (i * p_b + (x - i * N) * p_n)[None, :] + d[:, None],
                mask=(at < count)[None, :] & (d < D)[:, None],
                other=0.0,
            )
            s = _dot(q, u.to(ACC), s, PRECISION, ACC)
        s *= tl.load(inverse + x, mask=at < count, other=0.0)[None, :]
        if (not POSITIVES) and SAMPLING == 1:
            top = tl.load(lowest + j, mask=j < T, other=float("inf"))[:, None]
            eligible = eligible & (s < top) & (s >= top - joined(margin, margin_low, ACC))
        if (not POSITIVES) and SAMPLING >= 2:
            bits = philox_bits(
                tl.load(rng), tl.load(rng + 1), j.to(tl.int64)[:, None] * pixels_in_all + x[None, :]
            )
            if SAMPLING == 2:
                s = s * joined(
                    inverse_temperature, inverse_temperature_low, ACC
                ) + gumbel_from_bits(bits).to(ACC)
            else:
                s = uniform_from_bits(bits).to(ACC)
        key = tl.where(eligible, tl.where(s != s, float("inf"), s), float("-inf"))
    tl.store(keys + j.to(tl.int64)[:, None] * count + at[None, :], key, mask=inside)


@triton.jit
def _inverse_norm(u):
    longest = tl.max(tl.abs(u), 0)
    unit = tl.where(longest > 1e15, longest, 1.0)  # squares leave the range of float32
    u = u / unit
    norm = tl.sqrt(tl.sum(u * u, 0)) * unit
    return 1.0 / tl.maximum(norm, 1e-12, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pixel(pixels, index, N, D, d, p_b, p_n, ACC: tl.constexpr):
    i = index // N
    return tl.load(
        pixels + i * p_b + (index - i * N) * p_n + d, mask=(d < D) & (index >= 0), other=0.0
    ).to(ACC)


@triton.jit(do_not_specialize=SIZES)
def dense_contrastive_loss_fwd_gather_kernel(
    pixels,
    texts,
    index,
    similarity,
    unit,
    K,
    units,
    N,
    D,
    p_b: tl.int64,
    p_n: tl.int64,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BD: tl.constexpr,
):
    """Write the similarity of one entry.

    And its unit vector if it is among the first of its text.
    """
    D, p_b, p_n = whole(D, ALIGNED), whole(p_b, ALIGNED), whole(p_n, ALIGNED)
    entry = tl.program_id(0).to(tl.int64)
    j, k, d, x = entry // K, entry % K, tl.arange(0, BD), tl.load(index + entry)
    u = _pixel(pixels, x, N, D, d, p_b, p_n, ACC)
    u = tl.where(x >= 0, u * _inverse_norm(u), 0.0)
    tl.store(similarity + entry, tl.sum(u * tl.load(texts + j * D + d, mask=d < D, other=0.0), 0))
    tl.store(unit + (j * units + k) * D + d, u, mask=(d < D) & (k < units))


@triton.jit(do_not_specialize=SIZES)
def dense_contrastive_loss_bwd_texts_kernel(
    pixels,
    index,
    grad,
    d_texts,
    K,
    N,
    D,
    p_b: tl.int64,
    p_n: tl.int64,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BD: tl.constexpr,
):
    """Write (9) of one text."""
    D, p_b, p_n = whole(D, ALIGNED), whole(p_b, ALIGNED), whole(p_n, ALIGNED)
    j, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    sums = tl.zeros((BD,), ACC)
    for k in range(0, K):
        x = tl.load(index + j * K + k)
        u = _pixel(pixels, x, N, D, d, p_b, p_n, ACC)
        sums += tl.where(x >= 0, tl.load(grad + j * K + k) * u * _inverse_norm(u), 0.0)
    tl.store(d_texts + j * D + d, sums, mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def dense_contrastive_loss_bwd_pixels_kernel(
    pixels,
    texts,
    index,
    order,
    grad,
    grad_unit,
    d_pixels,
    K,
    units,
    entries,
    N,
    D,
    p_b: tl.int64,
    p_n: tl.int64,
    ALIGNED: tl.constexpr,
    SIMILARITY: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    BD: tl.constexpr,
):
    """Write (8) of one pixel, by the program of its first entry."""
    D, p_b, p_n = whole(D, ALIGNED), whole(p_b, ALIGNED), whole(p_n, ALIGNED)
    e, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    x = tl.load(index + tl.load(order + e))
    before = tl.load(index + tl.load(order + e - 1, mask=e > 0, other=0), mask=e > 0, other=-1)
    if (x >= 0) & (before != x):
        v = tl.zeros((BD,), ACC)
        more = True
        while more:
            entry = tl.load(order + e)
            j, k = entry // K, entry % K
            if SIMILARITY:
                v += tl.load(grad + entry) * tl.load(texts + j * D + d, mask=d < D, other=0.0)
            if UNIT:
                v += tl.load(
                    grad_unit + (j * units + k) * D + d, mask=(d < D) & (k < units), other=0.0
                )
            e += 1
            following = tl.load(order + e, mask=e < entries, other=0)
            more = tl.load(index + following, mask=e < entries, other=-1) == x
        u = _pixel(pixels, x, N, D, d, p_b, p_n, ACC)
        inverse = _inverse_norm(u)
        # A clamped norm: u / eps has no radial part to remove.
        along = tl.where(inverse < 1e12, tl.sum(v * u, 0) * inverse * inverse, 0.0)
        tl.store(
            d_pixels + x * D + d,
            (inverse * (v - along * u)).to(d_pixels.dtype.element_ty),
            mask=d < D,
        )


def _best(keys, count):
    """Return (keys, places) of the ``count`` largest of every row, ties by place."""
    count = min(count, keys.shape[1])
    if keys.dtype == torch.float64:
        found, places = keys.sort(dim=1, descending=True, stable=True)
        return found[:, :count], places[:, :count]
    # One int64 holds key and place, so that topk has no ties to break: floats in the order of
    # integers, -0 made +0.
    bits = (keys + 0.0).view(torch.int32)
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(torch.int64)
    places = torch.arange(keys.shape[1], device=keys.device)
    found = ((ordered << 32) | (0xFFFFFFFF - places)).topk(count, dim=1)[0]
    places = 0xFFFFFFFF - (found & 0xFFFFFFFF)
    return keys.gather(1, places), places


def select(
    pixels, texts, image_ids, text_ids, rng, k_pos, k_neg, skip, sampling, temperature, margin
):
    """Return (positive, negative) as ``ovseg::dense_contrastive_select`` does."""
    (B, N, D), T, acc = pixels.shape, texts.shape[0], texts.dtype
    pixels, texts, total = rows(pixels), texts.contiguous(), B * N
    skip = min(skip, total)
    inverse = 1 / row_norms(pixels, acc).clamp_(min=1e-12)
    ids = (texts, texts) if image_ids is None else (image_ids.contiguous(), text_ids.contiguous())
    tile, step = TILE[acc]
    size = (
        chunk_size(triton.cdiv(max(1, total), 4096), 4096 * max(1, T) * acc.itemsize, CHUNK_BYTES)
        * 4096
    )
    numbers = *halves(1 / temperature), *halves(margin)
    options = {
        "IDS": image_ids is not None,
        "ACC": ACC[acc],
        "PRECISION": "tf32" if pixels.element_size() == 2 else "ieee",
        "ALIGNED": aligned(pixels, texts),
        "BT": tile,
        "BD": step,
        "num_warps": WARPS,
    }

    def stream(positives, lowest, wanted):
        best, where = (
            texts.new_empty(T, 0),
            torch.empty(T, 0, dtype=torch.int64, device=texts.device),
        )
        for first in range(0, total if T else 0, size):
            count = min(size, total - first)
            keys = texts.new_empty(T, count)
            dense_contrastive_loss_select_keys_kernel[(tiles(count, tile) * tiles(T, tile),)](
                pixels,
                texts,
                inverse,
                *ids,
                inverse if rng is None else rng,
                lowest,
                keys,
                T,
                N,
                D,
                first,
                count,
                total,
                *pixels.stride()[:2],
                *numbers,
                POSITIVES=positives,
                SAMPLING=0 if positives else sampling,
                **options,
            )
            found, places = _best(keys, wanted)
            best, where = torch.cat([best, found], 1), torch.cat([where, places + first], 1)
            best, places = _best(best, wanted)
            where = where.gather(1, places)
        where = torch.where(best == -torch.inf, -1, where)
        return best, torch.nn.functional.pad(where, (0, wanted - where.shape[1]), value=-1)

    with on_device(pixels):
        best, positive = stream(True, inverse, k_pos)
        lowest = (
            torch.where(best == -torch.inf, torch.inf, best).amin(1)
            if best.shape[1]
            else texts.new_full((T,), torch.inf)
        )
        return positive, stream(False, lowest, k_neg + skip)[1][:, skip:].contiguous()


def gather(pixels, texts, index, units):
    """Return (similarity, unit) as ``ovseg::dense_contrastive_gather`` does."""
    (B, N, D), (T, K), pixels, texts = pixels.shape, index.shape, rows(pixels), texts.contiguous()
    similarity, unit = texts.new_zeros(T, K), texts.new_zeros(T, units, D)
    if T * K * B * N:
        with on_device(pixels):
            dense_contrastive_loss_fwd_gather_kernel[(T * K,)](
                pixels,
                texts,
                index.contiguous(),
                similarity,
                unit,
                K,
                units,
                N,
                D,
                *pixels.stride()[:2],
                ALIGNED=aligned(pixels, texts),
                ACC=ACC[texts.dtype],
                BD=triton.next_power_of_2(D),
                num_warps=WARPS,
            )
    return similarity, unit


def backward(
    grad_similarity, grad_unit, pixels, texts, index, order, units, need_pixels, need_texts
):
    """Return (d pixels, d texts) as ``ovseg::dense_contrastive_gather_backward`` does."""
    (B, N, D), (T, K), texts, index = (
        pixels.shape,
        index.shape,
        texts.contiguous(),
        index.contiguous(),
    )
    pixels, strides = rows(pixels), rows(pixels).stride()[:2]
    d_pixels, d_texts = (
        pixels.new_zeros(B if need_pixels else 0, N, D),
        texts.new_zeros(T if need_texts else 0, D),
    )
    grads = [texts if g is None else g.contiguous() for g in (grad_similarity, grad_unit)]
    options = {
        "ALIGNED": aligned(pixels, texts),
        "ACC": ACC[texts.dtype],
        "BD": triton.next_power_of_2(D),
        "num_warps": WARPS,
    }
    if T * K * B * N:
        with on_device(pixels):
            if need_texts and grad_similarity is not None:
                dense_contrastive_loss_bwd_texts_kernel[(T,)](
                    pixels, index, grads[0], d_texts, K, N, D, *strides, **options
                )
            if need_pixels:
                dense_contrastive_loss_bwd_pixels_kernel[(T * K,)](
                    pixels,
                    texts,
                    index,
                    order.contiguous(),
                    *grads,
                    d_pixels,
                    K,
                    units,
                    T * K,
                    N,
                    D,
                    *strides,
                    SIMILARITY=grad_similarity is not None,
                    UNIT=grad_unit is not None,
                    **options,
                )
    return d_pixels, d_texts
