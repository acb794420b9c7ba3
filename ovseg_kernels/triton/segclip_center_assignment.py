"""grouped_inverse_std in Triton: tokens on rows, the channels of one group on the columns.

Equation numbers: ``ovseg_kernels/ops/segclip_center_assignment.py``. W_k x' lives in registers, a
group at a time, with sums in float32 (float64 for float64) whatever the inputs. Its variance is
taken about the mean of each group and merged in the order of the groups (Chan, Golub and LeVeque,
1983): E[y^2] - E[y]^2 would lose the digits of a norm whose mean is large. Groups wider than
``WIDEST`` are products for the library: the closed form answers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import segclip_center_assignment as reference
from ..reference.patch_text_similarity import accumulation_dtype
from ._launch import ACC, aligned, halves, joined, on_device, tiles, whole
from .center_assignment import _dot

WIDEST = {2: 128, 4: 64, 8: 16}  # channels of a group, by bytes of an element
ROWS = {2: 128, 4: 32, 8: 16}  # tokens of a tile, where a group has at most 64 channels
PROGRAMS = 528  # that share the tokens of d weight: four for each of the 132 multiprocessors
WARPS = {2: 4, 4: 8, 8: 4}  # exact float32 has no tensor cores: more threads hold its operands
STAGES = 3
# Never a reason to compile again.
SIZES = ["rows", "D", "S", "steps"]


@triton.jit
def _tile(x, r, c, rows, columns, pitch):
    """Load [rows, columns] of a matrix whose rows lie ``pitch`` apart."""
    return tl.load(
        x + r.to(tl.int64)[:, None] * pitch + c[None, :],
        mask=(r < rows)[:, None] & (c < columns)[None, :],
        other=0.0,
    )


@triton.jit
def _projected(
    tokens, weight, r, k, rows, D, S, ACC: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr
):
    """Return x' of group k, its block of W_k [out, in], and W_k x' in ``ACC``."""
    c = tl.arange(0, BS)
    x = _tile(tokens + k * S, r, c, rows, S, D)
    w = _tile(weight + k * S * S, c, c, S, S, S)
    return x, w, _dot(x, tl.trans(w), tl.zeros((BR, BS), ACC), "ieee", ACC)


@triton.jit(do_not_specialize=SIZES)
def segclip_center_assignment_fwd_std_kernel(
    tokens,
    weight,
    found,
    rows,
    D,
    S,
    eps,
    eps_low,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BS: tl.constexpr,
):
    """Write r of (5): the variance of W_k x' over all channels, plus eps, to the power of -1/2."""
    D, S = whole(D, ALIGNED), whole(S, ALIGNED)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = (tl.arange(0, BS) < S)[None, :]
    mean, squares = tl.zeros((BR,), ACC), tl.zeros((BR,), ACC)
    for k in range(0, D // S):
        _, _, y = _projected(tokens, weight, r, k, rows, D, S, ACC, BR, BS)
        own = tl.sum(y, 1) / S  # absent channels are 0
        apart = tl.where(inside, y - own[:, None], 0.0)
        delta = own - mean
        # k groups are merged already. Products in this order: 0 times a square that has overflowed
        # would be NaN.
        share = tl.full((), 1.0, ACC) / (k + 1)
        mean += delta * share
        squares += tl.sum(apart * apart, 1) + delta * (delta * (S * k * share))
    variance = squares / D
    # 0 times an infinite variance: NaN, as the norm has it, where its inverse would pass for 0.
    std = tl.sqrt(variance + joined(eps, eps_low, ACC))
    tl.store(found + r, 1.0 / std + variance * 0.0, mask=r < rows)


@triton.jit(do_not_specialize=SIZES)
def segclip_center_assignment_bwd_tokens_kernel(
    tokens,
    weight,
    average,
    found,
    grad,
    means,
    d_tokens,
    rows,
    D,
    S,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BS: tl.constexpr,
):
    """Write d x' = W_k^T d y with d y = -r^3 (y - mean y) / D d r, and mean y for d weight.

    mean y is x' times ``average``, the mean of the rows of W_k by their columns.
    """
    D, S = whole(D, ALIGNED), whole(S, ALIGNED)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, BS)
    mean = tl.zeros((BR,), ACC)
    for k in range(0, D // S):
        x = _tile(tokens + k * S, r, c, rows, S, D).to(ACC)
        mean += tl.sum(x * tl.load(average + k * S + c, mask=c < S, other=0.0)[None, :], 1)
    tl.store(means + r, mean, mask=r < rows)
    inverse = tl.load(found + r, mask=r < rows, other=0.0)
    factor = -tl.load(grad + r, mask=r < rows, other=0.0) * inverse * inverse / D
    for k in range(0, D // S):
        _, w, y = _projected(tokens, weight, r, k, rows, D, S, ACC, BR, BS)
        # Of length 1 in each channel: what 16 bits hold, whatever the gradient.
        unit = (y - mean[:, None]) * inverse[:, None]
        dx = _dot(unit.to(w.dtype), w, tl.zeros((BR, BS), ACC), "ieee", ACC) * factor[:, None]
        at = d_tokens + r.to(tl.int64)[:, None] * D + k * S + c[None, :]
        inside = (r < rows)[:, None] & (c < S)[None, :]
        tl.store(at, dx.to(d_tokens.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def segclip_center_assignment_bwd_weight_kernel(
    tokens,
    weight,
    means,
    found,
    grad,
    parts,
    rows,
    D,
    S,
    steps,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BS: tl.constexpr,
):
    """Write d W_k = sum_l d y_l x'_l of one group and ``steps`` tiles of tokens, in their order."""
    D, S = whole(D, ALIGNED), whole(S, ALIGNED)
    k, part = tl.program_id(0) % (D // S), tl.program_id(0) // (D // S)
    c = tl.arange(0, BS)
    sums = tl.zeros((BS, BS), ACC)
    for step in range(0, steps):
        r = (part * steps + step) * BR + tl.arange(0, BR)
        x, _, y = _projected(tokens, weight, r, k, rows, D, S, ACC, BR, BS)
        inverse = tl.load(found + r, mask=r < rows, other=0.0)
        mean = tl.load(means + r, mask=r < rows, other=0.0)
        factor = -tl.load(grad + r, mask=r < rows, other=0.0) * inverse * inverse * inverse / D
        dy = (y - mean[:, None]) * factor[:, None]
        sums = _dot(tl.trans(dy.to(x.dtype)), x, sums, "ieee", ACC)
    at = parts + (part * (D // S) + k).to(tl.int64) * S * S + c[:, None] * S + c[None, :]
    tl.store(at, sums, mask=(c < S)[:, None] & (c < S)[None, :])


def _blocks(tokens, weight):
    """Return tokens [B L, D] and weight side by side in memory, and what all kernels take."""
    S = weight.shape[1]
    bytes_each = tokens.element_size()
    x, w = tokens.reshape(-1, weight.shape[0]).contiguous(), weight.contiguous()
    BS = max(16, triton.next_power_of_2(S))
    options = {
        "ALIGNED": aligned(x, w),
        "ACC": ACC[accumulation_dtype(tokens)],
        "BR": ROWS[bytes_each] if BS <= 64 else 64,
        "BS": BS,
        "num_warps": WARPS[bytes_each],
        "num_stages": STAGES,
    }
    return x, w, options


def forward(tokens, weight, eps):
    """Return r [B, L] as ``ovseg::grouped_inverse_std`` does."""
    if weight.shape[1] > WIDEST[tokens.element_size()]:
        return reference.inverse_std(tokens, weight, eps)
    found = tokens.new_empty(tokens.shape[:2], dtype=accumulation_dtype(tokens))
    if found.numel():
        x, w, options = _blocks(tokens, weight)
        grid = (tiles(len(x), options["BR"]),)
        with on_device(tokens):
            segclip_center_assignment_fwd_std_kernel[grid](
                x, w, found, *x.shape, w.shape[1], *halves(eps), **options
            )
    return found


def backward(grad, tokens, weight, found):
    """Return d tokens and d weight as ``ovseg::grouped_inverse_std_backward`` does."""
    D, S = weight.shape
    if WIDEST[tokens.element_size()] < S or not found.numel():
        return reference.inverse_std_backward(grad, tokens, weight, found)
    x, w, options = _blocks(tokens, weight)
    rows, groups = len(x), D // S
    d_tokens = tokens.new_empty(tokens.shape)
    average = w.to(found.dtype).unflatten(0, (groups, S)).sum(1).div_(D)
    means = found.new_empty(rows)
    saved = found.contiguous(), grad.contiguous()
    count = tiles(rows, options["BR"])
    steps = tiles(count, max(1, PROGRAMS // groups))
    parts = found.new_empty(tiles(count, steps), D, S)
    with on_device(tokens):
        segclip_center_assignment_bwd_tokens_kernel[(count,)](
            x, w, average, *saved, means, d_tokens, rows, D, S, **options
        )
        segclip_center_assignment_bwd_weight_kernel[(len(parts) * groups,)](
            x, w, means, *saved, parts, rows, D, S, steps, **options
        )
    return d_tokens, parts.sum(0).to(weight.dtype)
