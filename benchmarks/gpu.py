"""The runner on a GPU: cold L2, CUDA events, the allocator's peak; a product and a copy of the same run as the roofline.

    python -m benchmarks.gpu --out benchmarks/results/<device>/<date>.jsonl

One JSON line a measurement. An implementation whose values differ from eager's is not timed; one that runs out of memory
is written down as that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

import ovseg_kernels as ok

from . import registry
from .registry import FUSED, GPU_CASES, Case
from .run import step

DEVICE = "cuda"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Computed in float32 by us whatever the inputs, while eager in 16 bits selects other pixels or centers: values cannot be compared.
FLOAT32_ONLY = ("similarity_contrastive_loss", "contrastive_loss", "dense_contrastive_loss", "folded_center_assignment",
                "segclip_center_assignment", "upsample_argmax", "window_argmax",
                "upsample_mask_loss")
TOLERANCE = {"bfloat16": 3e-2, "float16": 1e-2, "float32": 1e-4}  # relative to the largest value, of values and gradients


def milliseconds(function: Callable[[], Any], seconds: float) -> dict[str, float]:
    """p20, median and p80 with the L2 flushed before every run."""
    p20, median, p80 = do_bench(function, warmup=25, rep=max(100, int(1000 * seconds)), quantiles=[0.2, 0.5, 0.8])
    return {"ms_p20": round(p20, 4), "ms": round(median, 4), "ms_p80": round(p80, 4)}


def rooflines(seconds: float) -> list[dict[str, Any]]:
    """What this GPU reaches now: a large product of random numbers in each dtype, and a copy."""
    rows = []
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=dtype) for _ in range(2))
        row = {"op": "roofline", "case": "product 8192", "dtype": name, "implementation": "torch.matmul",
               **milliseconds(lambda a=a, b=b: a @ b, seconds)}
        rows.append({**row, "tflops": round(2 * 8192**3 / row["ms"] / 1e9, 1)})
    x, y = (torch.randn(2**28, device=DEVICE) for _ in range(2))
    row = {"op": "roofline", "case": "copy 1 GiB", "dtype": "float32", "implementation": "Tensor.copy_",
           **milliseconds(lambda: y.copy_(x), seconds)}
    return [*rows, {**row, "gb_per_s": round(2 * x.numel() * 4 / row["ms"] / 1e6)}]


def ours() -> dict[str, str]:
    """Row name -> backend, for each GPU backend that is there."""
    return {f"{FUSED} ({name})": name for name in ("cuda", "triton") if ok.available_backends()[name] == "yes"}


def difference(found, expected) -> float:
    """Relative to the largest value; of labels the share that differs."""
    if not found[0].is_floating_point():
        return float((found[0] != expected[0]).float().mean())
    pairs = zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True)
    return max(float(((a - b).float().abs().max() / b.float().abs().max().clamp_min(1e-12)).detach()) for a, b in pairs)


def measure(case: Case, dtype: str, seconds: float) -> list[dict[str, Any]]:
    tensors = registry.inputs(case, DTYPES[dtype], device=DEVICE)
    functions, backends = registry.implementations(case), ours()
    truth, rows = None, []
    for name in dict.fromkeys(["eager", *backends, *functions]):
        if name == FUSED or (name not in functions and name not in backends):
            continue
        function = functions[FUSED if name in backends else name]
        row: dict[str, Any] = {"op": case.op, "case": case.name, "shape": case.shape, "options": case.options, "dtype": dtype,
                               "implementation": name}
        rows.append(row)
        try:
            # Entered once: choosing a backend registers kernels, which is no part of a call.
            with ok.backend(backends.get(name, "auto")):
                torch.cuda.empty_cache()
                found = step(function, tensors)
                gradients = sum(x.numel() * x.element_size() for x in found[1])
                truth = truth or tuple(found)
                row["difference_from_eager"] = difference(found, truth)
                if row["difference_from_eager"] > TOLERANCE[dtype]:
                    row["failed"] = f"values differ by {row['difference_from_eager']:.2g}"
                    continue
                del found
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step(function, tensors)
                row["extra_mib"] = round((torch.cuda.max_memory_allocated() - before - gradients) / 2**20, 1)
                row.update(milliseconds(lambda f=function: step(f, tensors), seconds))
                if flops := registry.useful_flops(case):
                    row["tflops"] = round(flops / row["ms"] / 1e9, 1)
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return rows


def environment() -> dict[str, Any]:
    import triton

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()
        except FileNotFoundError:
            return "unknown"

    return {
        "op": "environment",
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "ovseg_kernels": ok.__version__,
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
        "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def run(out: str, seconds: float, budget: float) -> int:
    """Measure until ``budget`` seconds are spent; returns 1 if one of our own rows failed."""
    began, bad = time.perf_counter(), 0
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w") as file:
        def write(rows):
            for row in rows:
                file.write(json.dumps(row) + "\n")
                print(json.dumps({k: v for k, v in row.items() if k not in ("shape", "options")}), flush=True)
            file.flush()

        write([environment()])
        roof = rooflines(seconds)
        write(roof)
        rates = {row["dtype"]: row["tflops"] for row in roof if "tflops" in row}
        for case in GPU_CASES:
            for dtype in ("float32",) if case.op in FLOAT32_ONLY else DTYPES:
                if time.perf_counter() - began > budget:
                    write([{"op": case.op, "case": case.name, "dtype": dtype, "failed": "not measured: the time was spent"}])
                    continue
                rows = measure(case, dtype, seconds)
                for row in rows:
                    if "tflops" in row:
                        row["percent_of_product"] = round(100 * row["tflops"] / rates[dtype], 1)
                    bad |= row["implementation"].startswith(FUSED) and "failed" in row
                write(rows)
    return int(bad)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", required=True)
    arguments.add_argument("--seconds", type=float, default=0.3, help="of samples for each row")
    arguments.add_argument("--budget", type=float, default=150, help="seconds in all; what is left over is written down as not measured")
    options = arguments.parse_args()
    raise SystemExit(run(options.out, options.seconds, options.budget))
