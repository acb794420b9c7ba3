"""Measures of a device that a benchmark needs: time, memory, rates and names.

``Gpu`` is the real one; tests put another in its place.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

import ovseg_kernels as ok

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Device(Protocol):
    """A device where rows are measured."""

    torch_name: str

    def clock(self) -> float:
        """Return seconds, for budgets."""

    def milliseconds(self, function: Callable[[], Any], seconds: float) -> dict[str, float]:
        """Return p20, median and p80 of many runs, each with a cold cache."""

    def extra_bytes(self, function: Callable[[], Any]) -> int:
        """Return by how much one run raises the peak of allocated memory."""

    def settle(self) -> None:
        """Wait for the device, and give unused memory back.

        Raises where the device is lost.
        """

    def backends(self) -> Sequence[str]:
        """Return the backends of ours that run here."""

    def rates(self, seconds: float) -> list[dict[str, Any]]:
        """Return rows of what the device reaches now.

        A large product in each dtype ("tflops"), and a copy ("gb_per_s").
        """

    def environment(self) -> dict[str, Any]:
        """Return names and versions, for the first line of a file."""


class Gpu:
    """One NVIDIA GPU: CUDA events, the L2 flushed before every run, the allocator's own peak."""

    torch_name = "cuda"

    def __init__(self) -> None:
        self._flush: torch.Tensor | None = None

    def clock(self) -> float:
        """Return the seconds of the host's clock."""
        return time.monotonic()

    def milliseconds(self, function: Callable[[], Any], seconds: float) -> dict[str, float]:
        """Return p20, median and p80 of many runs, each after a flush of the L2."""
        if self._flush is None:
            # 256 MiB: more than any L2.
            self._flush = torch.empty(2**26, dtype=torch.int32, device="cuda")
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        once = max(time.perf_counter() - began, 1e-6)
        runs = max(5, min(200, int(seconds / once)))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for first, last in events:
            self._flush.zero_()
            first.record()
            function()
            last.record()
        torch.cuda.synchronize()
        times = sorted(first.elapsed_time(last) for first, last in events)
        return {
            name: round(times[round(share * (runs - 1))], 4)
            for name, share in (("p20", 0.2), ("median", 0.5), ("p80", 0.8))
        }

    def extra_bytes(self, function: Callable[[], Any]) -> int:
        """Return by how much one run raises the peak of torch's allocator."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def settle(self) -> None:
        """Wait for the GPU, and empty torch's cache of memory."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def backends(self) -> Sequence[str]:
        """Return those of the CUDA and Triton backends that are available."""
        return [name for name in ("cuda", "triton") if ok.available_backends()[name] == "yes"]

    def rates(self, seconds: float) -> list[dict[str, Any]]:
        """Return rows of a large product in each dtype, and of a copy."""
        rows = []
        for name, dtype in DTYPES.items():
            a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
            took = self.milliseconds(lambda a=a, b=b: a @ b, seconds)
            rows.append(
                {
                    "op": "roofline",
                    "case": "product 8192",
                    "dtype": name,
                    "implementation": "torch.matmul",
                    **tf32(name),
                    "ms": took["median"],
                    "tflops": round(2 * 8192**3 / took["median"] / 1e9, 1),
                }
            )
            del a, b
        x, y = (torch.randn(2**28, device="cuda") for _ in range(2))
        took = self.milliseconds(lambda: y.copy_(x), seconds)
        return [
            *rows,
            {
                "op": "roofline",
                "case": "copy 1 GiB",
                "dtype": "float32",
                "implementation": "Tensor.copy_",
                "ms": took["median"],
                "gb_per_s": round(2 * 4 * x.numel() / took["median"] / 1e6),
            },
        ]

    def environment(self) -> dict[str, Any]:
        """Return names of GPU and driver, and versions of the libraries."""
        from importlib.metadata import PackageNotFoundError, version

        def output(*command: str) -> str:
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    check=False,
                    cwd=Path(__file__).parent,
                    timeout=20,
                )
                return done.stdout.strip()
            except (OSError, subprocess.TimeoutExpired):
                return "unknown"

        try:
            triton = version("triton")
        except PackageNotFoundError:
            triton = "not installed"
        return {
            "op": "environment",
            "device": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "ovseg_kernels": ok.__version__,
            "commit": output("git", "rev-parse", "--short", "HEAD"),
            "date": time.strftime("%Y-%m-%d"),
            "time": time.strftime("%H:%M:%S"),
            "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
            "backends": ok.available_backends(),
        }


def tf32(dtype: str) -> dict[str, bool]:
    """Return torch's switch, stated where it has a say: products of float32."""
    return {"allow_tf32": torch.backends.cuda.matmul.allow_tf32} if dtype == "float32" else {}


def lost(error: BaseException) -> bool:
    """Return whether the GPU context of this process is gone: every later call would fail too."""
    words = (
        "CUDA error",
        "illegal memory access",
        "misaligned address",
        "device-side assert",
        "unspecified launch failure",
    )
    return any(word in str(error) for word in words) and "out of memory" not in str(error)
