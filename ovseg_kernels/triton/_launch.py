"""Parts that all launchers share.

They are the device of a call, chunks of images, rows that copies like, numbers as arguments, and
the grid.
"""

from __future__ import annotations

import contextlib
import ctypes
import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
PITCH = tl.constexpr(16)  # rows between kernels start at multiples of this many elements


def on_device(x: torch.Tensor):
    """Return a block in which the device of ``x`` is the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def tiles(count: int, size: int) -> int:
    """Return the number of tiles of ``size`` that hold ``count``."""
    return triton.cdiv(count, size)


def pitch(count: int) -> int:
    """Return the elements from one row to the next of a buffer of ours.

    Its copies are then of 16 bytes, whatever the length of a row.
    """
    return tiles(count, PITCH.value) * PITCH.value


def descriptor(x: torch.Tensor, tile: list[int]) -> TensorDescriptor:
    """Return ``x`` as copies of whole tiles read or write it, which end where ``x`` does."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), tile)


def multiprocessors(x: torch.Tensor) -> int:
    """Return how many programs run at a time on the device of ``x``; few where none is a GPU."""
    if x.device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def capability(x: torch.Tensor) -> int:
    """Return that of the device of ``x``, as 80 or 90; an H100's on a CPU."""
    if x.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def shared_memory(x: torch.Tensor) -> int:
    """Return the bytes that a program may have on the device of ``x``; an H100's on a CPU."""
    if x.device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin


def chunk_size(images: int, bytes_per_image: int, limit: int) -> int:
    """Return the images at a time.

    What lies between two kernels stays near ``limit`` bytes.
    """
    return max(1, min(images, limit // max(1, bytes_per_image), 65535))


def rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with its last dimension side by side in memory: a copy where it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def aligned(*tensors: torch.Tensor) -> bool:
    """Return whether rows start at 16 bytes and are multiples of 16 elements, in all ``tensors``.

    This is the form that copies of 16 bytes serve. One flag and not the specialisation of every
    size and stride: two compilations of a kernel and not dozens.
    """
    for x in tensors:
        strides = [
            stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1
        ]
        if x.data_ptr() % 16 or x.shape[-1] % 16 or any(stride % 16 for stride in strides):
            return False
    return True


def halves(x: float) -> tuple[float, float]:
    """Return ``x`` as two float32, which is what Triton makes of a number.

    As arguments they cost no copy to the device, and float64 inputs keep 48 bits.
    """
    high = ctypes.c_float(x).value
    return high, x - high if math.isfinite(high) else 0.0


def row_norms(x: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """Return |x| of the rows of ``x`` [N, D] or [B, N, D].

    One row lies side by side in memory.
    """
    norms = x.new_empty(x.shape[:-1], dtype=acc)
    if norms.numel():
        strides = (0, *x.stride())[-3:-1]
        with on_device(x):
            row_norms_kernel[(tiles(norms.numel(), 4),)](
                x,
                norms,
                norms.numel(),
                *x.shape[-2:],
                *strides,
                ALIGNED=aligned(x),
                ACC=ACC[acc],
                BR=4,
                BD=128,
                num_warps=4,
            )
    return norms


@triton.jit(do_not_specialize=["count", "N", "D", "x_b", "x_n"])
def row_norms_kernel(
    x,
    norms,
    count,
    N,
    D,
    x_b: tl.int64,
    x_n: tl.int64,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write |x| of ``count`` rows, N of an image.

    Not torch's: its squares leave the range of float32 at lengths of 1.8e19.
    """
    D, x_b, x_n = whole(D, ALIGNED), whole(x_b, ALIGNED), whole(x_n, ALIGNED)
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i = row // N
    x += (i * x_b + (row - i * N) * x_n)[:, None]
    squared, unit = tl.zeros((BR,), ACC), tl.full((BR,), 1.0, ACC)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        v = tl.load(x + d[None, :], mask=(row < count)[:, None] & (d < D)[None, :], other=0.0)
        squared, unit, _ = squares(v.to(ACC), squared, unit)
    tl.store(norms + row, tl.sqrt(squared) * unit, mask=row < count)


@triton.jit
def squares(v, squared, unit):
    """Return ``squared`` with the squares of the rows of ``v`` added, their ``unit``, and v by it.

    The squares are by the ``unit``, which is 1 or what makes them small enough.
    """
    longest = tl.max(tl.abs(v), 1)
    wider = tl.where(longest > unit * 1e15, longest, unit)
    v *= (1.0 / wider)[:, None]
    return squared * (unit / wider) * (unit / wider) + tl.sum(v * v, 1), wider, v


@triton.jit
def joined(high, low, ACC: tl.constexpr):
    """Return what :func:`halves` took apart, in ``ACC``."""
    x = tl.full((), high, ACC)
    if tl.float64 == ACC:
        x += tl.full((), low, ACC)
    return x


@triton.jit
def log1p_of(e):
    """Return log(1 + e) without losing a small e: Kahan's correction of the rounded 1 + e."""
    one = 1.0 + e
    return tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))


@triton.jit
def whole(x, ALIGNED: tl.constexpr):
    """Return ``x``, as the multiple of 16 that the launcher has found it to be.

    The compiler learns of it so.
    """
    if ALIGNED:
        x = x // 16 * 16
    return x


@triton.jit
def program(n0, n1):
    """Return the coordinates of a program in a grid of n0 x n1 x the rest, the last one int64.

    All of it lies along x: y and z end at 65535.
    """
    p = tl.program_id(0)
    return p % n0, p // n0 % n1, (p // n0 // n1).to(tl.int64)
