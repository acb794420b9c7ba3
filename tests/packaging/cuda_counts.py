"""Writes the instructions of CUDA kernels, counted in their machine code, for the model of time.

nvcc -std=c++17 -O3 -arch=sm_90a -cubin -o x.cubin csrc/upsample_argmax/upsample_argmax_cuda.cu
python tests/packaging/cuda_counts.py benchmarks/gpu_counts.json x.cubin ...
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import compiled_code
import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# What the model reads: kernel, as the compiler writes its template arguments, a name for them, and
# what there is most of in its main loop.
KERNELS = {
    r"upsample_argmax_fwd_kernelIfE": ("float", "instructions"),
    r"upsample_mask_loss_fwd_kernelIfLb1E": ("float", "instructions"),
    r"upsample_mask_loss_bwd_kernelIfLb1E": ("float", "mufu"),
}


def counted(files: list[str]) -> list[dict]:
    """A row for each kernel of the table that the files hold."""
    found = []
    for file in files:
        for name, code in compiled_code.machine_code(file, CUOBJDUMP).items():
            for pattern, (case, by) in KERNELS.items():
                if re.search(pattern, name):
                    row = {"kernel": pattern.split("If")[0], "case": case, "arch": "sm_90a"}
                    found.append(row | compiled_code.counts(code, by))
    return found


if __name__ == "__main__":
    compiled_code.write_counts(Path(sys.argv[1]), counted(sys.argv[2:]))
