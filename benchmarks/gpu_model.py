"""A model of the time of every operator and pass on a GPU: a lower bound, not a measurement.

    python -m benchmarks.gpu_model                       # H100 and H200, Markdown
    python -m benchmarks.gpu_model --rates FILE.jsonl    # with the rates that a GPU has shown

A kernel takes as long as the slowest of what it asks for: products of tensor cores, bytes from L2,
bytes of memory, exponentials and the like, and the issue of its instructions. Kernels of a pass
follow each other. Operations and bytes are formulas of the shape (``gpu_passes``), instructions
are counted in the compiled code (``gpu_counts.json``). Nothing here has run on a GPU: rates are
assumptions until a result file of ``scripts/gpu_check.sh first`` takes their place.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

# A product of the library that is not large, such as 4096 x 512 x 4096, as a share of the rate of
# one of 8192 x 8192: an assumption.
LIBRARY = 0.75


@dataclass(frozen=True)
class Device:
    """Rates of a GPU: those that large regular work reaches, not those of its data sheet."""

    name: str
    tflops: dict[str, float]  # of products, by dtype
    copy: float  # TB/s, read and written bytes together
    l2: float  # TB/s from L2 to the multiprocessors
    multiprocessors: int = 132
    ghz: float = 1.7
    mufu: int = 16  # exponentials, reciprocals, roots: a clock and multiprocessor
    issue: int = 4  # instructions of a warp: a clock and multiprocessor
    gap_us: float = 1.0  # from a kernel to the next
    launch_us: float = 5.0  # of the host
    assumed: bool = True

    def measured(self, rows: Iterable[dict]) -> Device:
        """Return the device with the rates that the rows of a result file have."""
        tflops = dict(self.tflops)
        found: dict[str, float] = {}
        for row in rows:
            rate = row.get("rate")
            if row.get("op") != "roofline" or "failed" in row:
                continue
            if rate in tflops and "tflops" in row:
                tflops[rate] = row["tflops"]
            elif rate == "copy":
                found["copy"] = row["gb_per_s"] / 1000
            elif rate == "L2 read":
                found["l2"] = row["gb_per_s"] / 1000
            elif rate == "launch":
                found["gap_us"] = row["replay_us"]
                found["launch_us"] = row["host_us"]
        if not found and tflops == self.tflops:
            raise ValueError("no row of a rate: expected a file of `scripts/gpu_check.sh first`")
        return replace(self, tflops=tflops, assumed=False, **found)


_TFLOPS = {"bfloat16": 790.0, "float16": 790.0, "tf32": 395.0, "float32": 52.0}
H200 = Device("H200", _TFLOPS, copy=4.1, l2=6.2)
H100 = Device("H100", _TFLOPS, copy=2.9, l2=6.2)


@dataclass(frozen=True)
class Work:
    """Operations, bytes and instructions that the launches of one kernel in a pass need."""

    kernel: str
    flops: float = 0.0
    dtype: str = "bfloat16"  # of the products
    l2: float = 0.0  # bytes
    memory: float = 0.0  # bytes
    mufu: float = 0.0  # of threads
    instructions: float = 0.0  # of warps; 0 where they are not counted
    launches: int = 1
    library: bool = False

    def bounds(self, device: Device) -> dict[str, float]:
        """Return the milliseconds that each resource takes by itself."""
        clocks = device.multiprocessors * device.ghz * 1e9
        rate = device.tflops[self.dtype] * 1e12 * (LIBRARY if self.library else 1.0)
        return {
            "tensor": 1e3 * self.flops / rate,
            "L2": 1e3 * self.l2 / (device.l2 * 1e12),
            "memory": 1e3 * self.memory / (device.copy * 1e12),
            "MUFU": 1e3 * self.mufu / (device.mufu * clocks),
            "issue": 1e3 * self.instructions / (device.issue * clocks),
        }

    def milliseconds(self, device: Device) -> float:
        """Return the time of the slowest."""
        return max(self.bounds(device).values())


@dataclass(frozen=True)
class Before:
    """The estimate of a backend's time at commit c002b1a, on an H200: fastest and slowest."""

    backend: str
    least: float  # ms
    most: float


@dataclass(frozen=True)
class Pass:
    """One pass of an operator at one shape."""

    operator: str
    name: str  # forward or backward
    backend: str
    shape: str
    work: tuple[Work, ...]
    flops: float = 0.0  # that any form must do, where products bound it
    bytes: float = 0.0  # that any form must move, where memory bounds it
    before: tuple[Before, ...] = ()

    def milliseconds(self, device: Device) -> float:
        """Return the time of all kernels; never less than the host needs to launch them."""
        launches = sum(work.launches for work in self.work)
        on_device = sum(work.milliseconds(device) for work in self.work)
        return max(on_device + 1e-3 * device.gap_us * launches, 1e-3 * device.launch_us * launches)

    def slowest(self, device: Device) -> str:
        """Return what bounds most of the time: a resource, or the host."""
        launches = sum(work.launches for work in self.work)
        if self.milliseconds(device) <= 1e-3 * device.launch_us * launches:
            return "launches"
        spent: dict[str, float] = {}
        for work in self.work:
            bounds = work.bounds(device)
            name = max(bounds, key=bounds.__getitem__)
            spent[name] = spent.get(name, 0.0) + bounds[name]
        return max(spent, key=spent.__getitem__)

    def ideal(self, device: Device) -> float:
        """Return the milliseconds of the work that any form must do, at the device's rates."""
        if self.flops:
            return 1e3 * self.flops / (device.tflops["bfloat16"] * 1e12)
        return 1e3 * self.bytes / (device.copy * 1e12)

    def counted(self, device: Device) -> bool:
        """Return whether the instructions of our kernels are known, but for a fifth of the time."""
        ours = [work for work in self.work if work.kernel.endswith("_kernel")]
        unknown = sum(work.milliseconds(device) for work in ours if not work.instructions)
        return 5 * unknown <= sum(work.milliseconds(device) for work in self.work)

    def share(self, device: Device) -> str:
        """Return the ideal as a share of the time, and of which rate."""
        percent = 100 * self.ideal(device) / self.milliseconds(device)
        return f"{percent:.0f} % of {'product' if self.flops else 'copy'}"


def counts() -> dict[tuple[str, str], dict]:
    """Return the counted instructions of every kernel, by kernel and form."""
    path = Path(__file__).with_name("gpu_counts.json")
    return {(row["kernel"], row["case"]): row for row in json.loads(path.read_text())}


def _time(milliseconds: float) -> str:
    """Return a time with two or three digits."""
    if milliseconds < 0.9995:
        us = 1000 * milliseconds
        return f"{us:.0f} us" if us >= 9.95 else f"{us:.1f} us"
    return f"{milliseconds:.1f} ms" if milliseconds < 9.95 else f"{milliseconds:.0f} ms"


def _before(before: Before) -> str:
    """Return a backend and its range."""
    if before.least == before.most:
        return f"{before.backend} {_time(before.least)}"
    return f"{before.backend} {_time(before.least)} to {_time(before.most)}"


def table(passes: Iterable[Pass], devices: Iterable[Device]) -> str:
    """Return the passes as a Markdown table, one row each."""
    devices = list(devices)
    names = [f"after, {device.name}" for device in devices]
    head = ["operator", "pass", "shape", "on", "before, H200", *names, "bound by", "share"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for one in passes:
        last = devices[-1]
        cells = [one.operator, one.name, one.shape, one.backend]
        cells.append(", ".join(map(_before, one.before)) or "-")
        for device in devices:
            least = "" if one.counted(device) else "≥ "
            cells.append(least + _time(one.milliseconds(device)))
        cells += [one.slowest(last), one.share(last)]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def kernels(passes: Iterable[Pass], device: Device) -> str:
    """Return the bounds of every kernel as a Markdown table."""
    names = ["tensor", "L2", "memory", "MUFU", "issue"]
    head = ["operator", "pass", "kernel", "launches", *names]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for one in passes:
        for work in one.work:
            bounds = work.bounds(device)
            cells = [one.operator, one.name, work.kernel, str(work.launches)]
            cells += [_time(bounds[name]) if bounds[name] else "-" for name in names]
            lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Print the model."""
    from . import gpu_passes

    options = argparse.ArgumentParser(description="A model of the time of every operator and pass.")
    options.add_argument("--rates", type=Path, help="a result file with the rates of a GPU")
    options.add_argument("--kernels", action="store_true", help="the bounds of every kernel too")
    asked = options.parse_args()
    devices = [H100, H200]
    if asked.rates:
        rows = [json.loads(line) for line in asked.rates.read_text().splitlines()]
        devices = [replace(H200.measured(rows), name=f"rates of {asked.rates.name}")]
    print("A model. Every time below is computed, none was measured.")
    if all(device.assumed for device in devices):
        print("The rates are assumptions: no GPU has run this.")
    passes = gpu_passes.passes()
    print(f"\n{table(passes, devices)}")
    if asked.kernels:
        print(f"\n{kernels(passes, devices[-1])}")


if __name__ == "__main__":
    main()
