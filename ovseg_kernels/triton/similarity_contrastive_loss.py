"""similarity_contrastive_loss in Triton: sweeps over the matrix, every sum in a fixed order.

Equation numbers: ``ovseg_kernels/ops``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import ACC, on_device, tiles
from ._patch_text_kernels import _larger

ROWS, COLUMNS, WARPS = 16, 64, 4  # of a tile: the matrix is read once, in lines
# Never a reason to compile again. The last three say which of the optional tensors are there.
SIZES = ["B", "T", "offset", "stride", "pair_stride", "positive_stride", "IDS", "PAIRS", "GIVEN"]


@triton.jit
def add_to_lse(top, total, x):
    """Add the columns of ``x`` to the running maximum and sum of exponentials of rows.

    A NaN stays one.
    """
    here = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), tl.max(x, 1))
    now = _larger(here, top)
    shift = tl.where(now == float("-inf"), 0.0, now)
    factor = tl.where(top == now, 1.0, tl.exp(top - shift))
    return now, total * factor + tl.sum(tl.exp(x - shift[:, None]), 1)


@triton.jit
def lse_of(top, total):
    """Return the log-sum-exp of a running maximum and sum; -infinity of nothing."""
    some = total != 0.0
    return tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))


@triton.jit
def _at(matrix, i, j, stride, TURNED: tl.constexpr):
    """Return the addresses of a tile of a matrix.

    Its rows, or columns if TURNED, lie ``stride`` apart and are dense.
    """
    return matrix + (
        j.to(tl.int64)[None, :] * stride + i[:, None]
        if TURNED
        else i.to(tl.int64)[:, None] * stride + j[None, :]
    )


@triton.jit
def _names(ids, k, size, shift, IDS):
    """Return what rows and columns are compared by: ids, or their own numbers, shifted."""
    return tl.where(IDS != 0, tl.load(ids + k, mask=(k < size) & (IDS != 0), other=0), k + shift)


@triton.jit
def _pairs(
    i,
    j,
    mine,
    others,
    pairs,
    pair_stride,
    given,
    positive_stride,
    inside,
    PAIRS,
    GIVEN,
    TURNED: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """Return (kept, positive) of a tile; the second are weights where ``given`` holds floats.

    ``mine`` and ``others`` name its rows and columns. ACROSS: ``given`` is dense along the other
    dimension than the similarity is.
    """
    at = _at(pairs, i, j, pair_stride, TURNED)
    kept = inside & (tl.load(at, mask=inside & (PAIRS != 0), other=1) != 0)
    at = _at(given, i, j, positive_stride, TURNED != ACROSS)
    positive = tl.load(at, mask=kept & (GIVEN != 0), other=0)
    if not positive.dtype.is_floating():
        positive = kept & tl.where(GIVEN != 0, positive != 0, mine[:, None] == others[None, :])
    return kept, positive


@triton.jit(do_not_specialize=SIZES)
def similarity_contrastive_loss_fwd_kernel(
    similarity,
    scale_at,
    own_ids,
    other_ids,
    pairs,
    given,
    out,
    B,
    T,
    offset,
    stride: tl.int64,
    pair_stride: tl.int64,
    positive_stride: tl.int64,
    IDS,
    PAIRS,
    GIVEN,
    TURNED: tl.constexpr,
    ACROSS: tl.constexpr,
    ACC: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
):
    """Write log-sum-exp, sum of p z and sum of p of BI rows.

    Called with TURNED the other way round, of columns.
    """
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    scale = tl.load(scale_at)
    mine = _names(own_ids, i, B, offset, IDS)
    top = tl.full((BI,), float("-inf"), ACC)
    total, hits, count = tl.zeros((BI,), ACC), tl.zeros((BI,), ACC), tl.zeros((BI,), ACC)
    for j0 in range(0, T, BJ):
        j = j0 + tl.arange(0, BJ)
        inside = (i < B)[:, None] & (j < T)[None, :]
        others = _names(other_ids, j, T, 0, IDS)
        kept, positive = _pairs(
            i,
            j,
            mine,
            others,
            pairs,
            pair_stride,
            given,
            positive_stride,
            inside,
            PAIRS,
            GIVEN,
            TURNED,
            ACROSS,
        )
        z = scale * tl.load(_at(similarity, i, j, stride, TURNED), mask=inside, other=0.0)
        x = tl.where(kept, z, float("-inf"))
        top, total = add_to_lse(top, total, x)
        if positive.dtype.is_floating():
            hits += tl.sum(tl.where(positive != 0.0, positive * z, 0.0), 1)
        else:
            hits += tl.sum(tl.where(positive, z, 0.0), 1)
        count += tl.sum(positive.to(ACC), 1)
    tl.store(out + i, lse_of(top, total), mask=i < B)
    tl.store(out + B + i, hits, mask=i < B)
    tl.store(out + 2 * B + i, count, mask=i < B)


@triton.jit(do_not_specialize=SIZES)
def similarity_contrastive_loss_bwd_kernel(
    similarity,
    scale_at,
    grad_at,
    own_ids,
    other_ids,
    pairs,
    given,
    rows,
    columns,
    row_weight,
    column_weight,
    out,
    partial,
    B,
    T,
    offset,
    stride: tl.int64,
    pair_stride: tl.int64,
    positive_stride: tl.int64,
    IDS,
    PAIRS,
    GIVEN,
    TURNED: tl.constexpr,
    ACROSS: tl.constexpr,
    ACC: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
):
    """Write equation (4), and the rows' shares of d scale."""
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    scale, grad = tl.load(scale_at), tl.load(grad_at)
    mine = _names(own_ids, i, B, offset, IDS)
    lse_i = tl.load(rows + i, mask=i < B, other=0.0)
    weight_i = tl.load(row_weight + i, mask=i < B, other=0.0)
    sum_i = tl.load(rows + 2 * B + i, mask=i < B, other=1.0)
    share_i = weight_i / tl.maximum(sum_i, 1.0)
    d_scale = tl.zeros((BI,), tl.float64)
    for j0 in range(0, T, BJ):
        j = j0 + tl.arange(0, BJ)
        inside = (i < B)[:, None] & (j < T)[None, :]
        others = _names(other_ids, j, T, 0, IDS)
        kept, positive = _pairs(
            i,
            j,
            mine,
            others,
            pairs,
            pair_stride,
            given,
            positive_stride,
            inside,
            PAIRS,
            GIVEN,
            TURNED,
            ACROSS,
        )
        lse_j = tl.load(columns + j, mask=j < T, other=0.0)
        weight_j = tl.load(column_weight + j, mask=j < T, other=0.0)
        sum_j = tl.load(columns + 2 * T + j, mask=j < T, other=1.0)
        phi = tl.load(_at(similarity, i, j, stride, TURNED), mask=inside, other=0.0)
        z = scale * phi
        # A row or column of weight 0 has no positive and may have no finite log-sum-exp.
        by_row, by_column = kept & (weight_i != 0.0)[:, None], kept & (weight_j != 0.0)[None, :]
        dz = tl.where(
            by_row, weight_i[:, None] * tl.exp(tl.where(by_row, z - lse_i[:, None], 0.0)), 0.0
        )
        dz += tl.where(
            by_column, weight_j[None, :] * tl.exp(tl.where(by_column, z - lse_j[None, :], 0.0)), 0.0
        )
        if positive.dtype.is_floating():
            some = positive != 0.0  # its sums are not zero either
            of_row = weight_i[:, None] * (positive / tl.where(some, sum_i[:, None], 1.0))
            of_column = weight_j[None, :] * (positive / tl.where(some, sum_j[None, :], 1.0))
            dz -= tl.where(some, of_row + of_column, 0.0)
        else:
            share_j = weight_j / tl.maximum(sum_j, 1.0)
            dz -= tl.where(positive, share_i[:, None] + share_j[None, :], 0.0)
        dz = tl.where(kept, dz * grad, 0.0)
        tl.store(out + i.to(tl.int64)[:, None] * T + j[None, :], scale * dz, mask=inside)
        d_scale += tl.sum(tl.where(kept, dz * phi, 0.0).to(tl.float64), 1)
    tl.store(partial + i, d_scale, mask=i < B)


def _options(similarity, image_ids, text_ids, pair_mask, positives):
    """Return pointers of optional arguments, the layout of the matrices, and flags of the kernels.

    A pointer that is never read stands for an argument that is absent: which of them are there is
    no reason to compile again.
    """
    ids = [
        similarity.new_empty(0, dtype=torch.int64) if x is None else x.contiguous()
        for x in (image_ids, text_ids)
    ]
    turned = similarity.stride(1) != 1 and similarity.stride(0) == 1
    dense = similarity if turned or similarity.stride(1) == 1 else similarity.contiguous()
    pairs = given = similarity.new_empty(0, 0, dtype=torch.uint8)
    if pair_mask is not None:  # dense along the same dimension
        pairs = (pair_mask.T.contiguous().T if turned else pair_mask.contiguous()).view(torch.uint8)
    if positives is not None:  # read where they lie, if one of their dimensions is dense
        given = positives.view(torch.uint8) if positives.dtype == torch.bool else positives
        if 1 not in given.stride():
            given = given.contiguous()
    across = positives is not None and given.stride(int(not turned)) != 1
    strides = (
        dense.stride(int(turned)),
        pairs.stride(int(turned)),
        given.stride(int(turned != across)),
    )
    present = [int(x is not None) for x in (image_ids, pair_mask, positives)]
    flags = {
        "ACROSS": across,
        "ACC": ACC[similarity.dtype],
        "BI": ROWS,
        "BJ": COLUMNS,
        "num_warps": WARPS,
    }
    return ids, (dense, pairs, given), (*strides, *present), turned, flags


def stats(similarity, logit_scale, image_ids, text_ids, pair_mask, positives, offset):
    """Return (rows [3, B], columns [3, T]) as ``ovseg::similarity_contrastive_stats`` does."""
    B, T = similarity.shape
    ids, (dense, pairs, given), strides, turned, flags = _options(
        similarity, image_ids, text_ids, pair_mask, positives
    )
    rows, columns = similarity.new_empty(3, B), similarity.new_empty(3, T)
    with on_device(similarity):
        for out, size, other, own, its, start, side in (
            (rows, B, T, ids[0], ids[1], offset, turned),
            (columns, T, B, ids[1], ids[0], -offset, not turned),
        ):
            if size:
                similarity_contrastive_loss_fwd_kernel[(tiles(size, ROWS),)](
                    dense,
                    logit_scale,
                    own,
                    its,
                    pairs,
                    given,
                    out,
                    size,
                    other,
                    start,
                    *strides,
                    TURNED=side,
                    **flags,
                )
    return rows, columns


def backward(
    grad,
    similarity,
    logit_scale,
    image_ids,
    text_ids,
    pair_mask,
    positives,
    rows,
    columns,
    row_weight,
    column_weight,
    offset,
):
    """Return both gradients as ``ovseg::similarity_contrastive_loss_backward`` does.

    They are d similarity and d logit_scale.
    """
    B, T = similarity.shape
    ids, (dense, pairs, given), strides, turned, flags = _options(
        similarity, image_ids, text_ids, pair_mask, positives
    )
    out = similarity.new_empty(B, T)
    partial = torch.zeros(B, dtype=torch.float64, device=similarity.device)
    if out.numel():
        with on_device(similarity):
            similarity_contrastive_loss_bwd_kernel[(tiles(B, ROWS),)](
                dense,
                logit_scale,
                grad,
                *ids,
                pairs,
                given,
                *(x.contiguous() for x in (rows, columns, row_weight, column_weight)),
                out,
                partial,
                B,
                T,
                offset,
                *strides,
                TURNED=turned,
                **flags,
            )
    return out, partial.sum().to(similarity.dtype)
