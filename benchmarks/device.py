"""Measures of a device that a benchmark needs: time, memory, rates and names.

``Gpu`` is the real one; tests put another in its place.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

import ovseg_kernels as ok

NAME = 160  # characters of a kernel's name: those of templates have thousands
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

    def rates(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Yield rows of what the device reaches now, each under the name of its ``rate``.

        A large product in each dtype and in tf32 ("tflops"), a copy and reads from L2 ("gb_per_s"),
        an empty launch ("us").
        """

    def calls(self, function: Callable[[], Any], seconds: float) -> dict[str, float]:
        """Return microseconds of one call of many: the host's share, and all by the clock."""

    def replay_us(self, function: Callable[[], Any], seconds: float) -> float:
        """Return microseconds of one call of many in a CUDA graph, where the host has no share."""

    def kernels(self, function: Callable[[], Any]) -> list[dict[str, Any]]:
        """Return name, count and microseconds of the kernels of one call, the longest first."""

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

    def calls(self, function: Callable[[], Any], seconds: float) -> dict[str, float]:
        """Return microseconds of one call of many, none of which is waited for.

        ``host_us`` is until the last is under way, ``wall_us`` until it has ended.
        """
        runs = self._runs(function, seconds)
        began = time.perf_counter()
        for _ in range(runs):
            function()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        ended = time.perf_counter()
        return {
            "host_us": round(1e6 * (queued - began) / runs, 2),
            "wall_us": round(1e6 * (ended - began) / runs, 2),
        }

    def replay_us(self, function: Callable[[], Any], seconds: float) -> float:
        """Return microseconds of one call of ten in a graph that is replayed many times."""
        in_graph = 10
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at a first call is none of a capture
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(in_graph):
                function()
        runs = self._runs(graph.replay, seconds)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(runs):
            graph.replay()
        last.record()
        torch.cuda.synchronize()
        return round(1e3 * first.elapsed_time(last) / (runs * in_graph), 2)

    def _runs(self, function: Callable[[], Any], seconds: float) -> int:
        """Return how many calls take about that many seconds, after some that warm it up."""
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return max(5, min(500, int(seconds / max(time.perf_counter() - began, 1e-6))))

    def kernels(self, function: Callable[[], Any]) -> list[dict[str, Any]]:
        """Return the kernels of one call, as torch's profiler saw them."""
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            function()
            torch.cuda.synchronize()
        found = [
            {
                "name": event.key[:NAME],
                "count": event.count,
                "us": round(event.self_device_time_total, 1),
            }
            for event in seen.key_averages()
            if event.self_device_time_total > 0
        ]
        return sorted(found, key=lambda kernel: -kernel["us"])

    def rates(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Yield rows of products, a copy, reads from L2 and an empty launch."""
        for name, dtype in DTYPES.items():
            yield self._product(name, dtype, seconds)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield self._product("tf32", torch.float32, seconds)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        yield self._copy(seconds)
        yield self._l2(seconds)
        yield {
            "op": "roofline",
            "rate": "launch",
            "case": "a kernel that does nothing",
            "implementation": "torch.cuda._sleep(0)",
            **self.calls(lambda: torch.cuda._sleep(0), seconds),
            "replay_us": self.replay_us(lambda: torch.cuda._sleep(0), seconds),
        }

    def _product(self, name: str, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
        """Return the row of a product of 8192 x 8192 matrices."""
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        a @ b  # the library starts, and chooses its kernel
        took = self.milliseconds(lambda: a @ b, seconds)
        return {
            "op": "roofline",
            "rate": name,
            "case": "product 8192",
            "implementation": "torch.matmul",
            **tf32(name),
            "ms": took["median"],
            "tflops": round(2 * 8192**3 / took["median"] / 1e9, 1),
        }

    def _copy(self, seconds: float) -> dict[str, Any]:
        """Return the row of a copy of 1 GiB."""
        x, y = (torch.randn(2**28, device="cuda") for _ in range(2))
        took = self.milliseconds(lambda: y.copy_(x), seconds)
        return {
            "op": "roofline",
            "rate": "copy",
            "case": "copy 1 GiB",
            "implementation": "Tensor.copy_",
            "ms": took["median"],
            "gb_per_s": round(2 * 4 * x.numel() / took["median"] / 1e6),
        }

    def _l2(self, seconds: float) -> dict[str, Any]:
        """Return the row of reads from 16 MiB, which are in L2 after the first of 256."""
        row = {"op": "roofline", "rate": "L2 read", "case": "read 16 MiB, 256 times"}
        try:
            from .l2_read import BLOCK, read
        except ImportError as error:
            return {**row, "failed": f"triton is not installed: {error}"}
        x = torch.randn(2**22, device="cuda")
        programs = 8 * torch.cuda.get_device_properties(0).multi_processor_count
        steps = 256 * x.numel() // (programs * BLOCK)
        read(x, programs, steps)  # it is compiled
        took = self.milliseconds(lambda: read(x, programs, steps), seconds)
        moved = 4 * BLOCK * programs * steps
        return {
            **row,
            "implementation": "l2_read_kernel",
            "ms": took["median"],
            "gb_per_s": round(moved / took["median"] / 1e6),
        }

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
