"""Philox in Triton, by the contract of ``ovseg_kernels/philox.py``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_bits(seed, offset, index):
    """Return 32 bits for each element ``index`` (int64), as uint32."""
    counter = offset + index // 4
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero, n_rounds=10)
    lane = (index % 4).to(tl.int32)
    return tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))


@triton.jit
def uniform_from_bits(bits):
    """Return uniform numbers, equation (2) of ``ovseg_kernels/philox.py``."""
    return ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def gumbel_from_bits(bits):
    """Return standard Gumbel numbers, equation (3) of ``ovseg_kernels/philox.py``."""
    return -tl.log(-tl.log(uniform_from_bits(bits)))


@triton.jit(do_not_specialize=["count"])
def philox_kernel(rng, bits_out, uniform_out, gumbel_out, count, BLOCK: tl.constexpr):
    """Write all three for a flat tensor.

    The tests run it; operators inline the functions above.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = philox_bits(tl.load(rng), tl.load(rng + 1), index)
    inside = index < count
    tl.store(bits_out + index, bits.to(tl.int64), mask=inside)
    tl.store(uniform_out + index, uniform_from_bits(bits), mask=inside)
    tl.store(gumbel_out + index, gumbel_from_bits(bits), mask=inside)
