"""A Triton kernel that reads memory and does nothing else, for the rate from L2 to the SMs.

The blocks of a tensor that the L2 holds are dealt out to all programs again and again; each sums
what it has read, so that no read can be left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096  # elements: 64 bytes a thread of 8 warps are under way


@triton.jit
def l2_read_kernel(x, sums, blocks, steps, BLOCK: tl.constexpr):
    """Read ``steps`` blocks a program, the next one ``num_programs`` further on, in a ring."""
    program = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(steps):
        block = (program + step * tl.num_programs(0)) % blocks
        total += tl.load(x + block * BLOCK + places)
    tl.store(sums + program, tl.sum(total))


def read(x: torch.Tensor, programs: int, steps: int) -> torch.Tensor:
    """Return the sum of what each of ``programs`` has read from ``x``, float32."""
    sums = torch.empty(programs, device=x.device)
    l2_read_kernel[(programs,)](x, sums, x.numel() // BLOCK, steps, BLOCK=BLOCK, num_warps=8)
    return sums
