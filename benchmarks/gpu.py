"""The runner on a GPU: forward and backward apart, cold L2, the allocator's peak.

Rows hold the share of the rates of the same run too.

    python -m benchmarks.gpu --out benchmarks/results/<device>/<date>-bench.jsonl --budget 300
    python -m benchmarks.gpu --cases first --measure kernels --out ...

Our own rows are measured first, for every case and dtype, then eager's, then torch.compile's where
the table needs it, then the rest. One JSON line a row, written at once; ``ovseg bench show`` reads
the file at any time. An implementation whose values differ from ours is not timed, and the exit
status is 1: which of the two is wrong, ``scripts/gpu_check.sh smoke`` says, against float64.
Started again on the same file with the same ``--run``, it goes on where it was.

``--measure rates`` is what the GPU reaches, and no row more; ``kernels`` the time of every kernel
of a step by torch's profiler, in a process that times nothing else; ``calls`` a step by the clock,
with the host's share, and replayed in a CUDA graph.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch import config as functorch_config

import ovseg_kernels as ok
from ovseg_kernels._backends import lacks, select

from . import lines, registry
from .contrastive_baselines import CannotRun
from .device import DTYPES, Device, Gpu, lost, tf32
from .registry import FIRST_CASES, FUSED, GPU_CASES, SMALL_CASES, Case
from .supervise import AGAIN

# Relative Frobenius norm of the difference, of values and gradients. In 16 bits eager rounds its
# similarities, and so takes other centers and other negatives than we do where two nearly tie: all
# that can be asked then is that the rest agrees.
TOLERANCE = {"bfloat16": 0.05, "float16": 0.02, "float32": 1e-3}
CHOOSING = {"bfloat16": 0.5, "float16": 0.3, "float32": 2e-2}
CHOOSES = (
    "center_assignment",
    "folded_center_assignment",
    "segclip_center_assignment",
    "dense_contrastive_loss",
)
LABELS_MAY_DIFFER = 1e-3  # share, where two classes tie within rounding
MOST_KERNELS = 24  # of a step, the longest: eager's blocks have thousands of a few names
CASES = {"all": GPU_CASES, "first": FIRST_CASES, "small": SMALL_CASES}
OUT_OF_TIME = "not measured: the time was spent"
WORKER = "bench"


@dataclass(frozen=True)
class Planned:
    """A row to come."""

    case: Case
    dtype: str
    implementation: str
    backend: str = ""  # of ours

    @property
    def label(self) -> str:
        """Return the name of the implementation, with the backend if it is ours."""
        return f"{self.implementation} ({self.backend})" if self.backend else self.implementation

    @property
    def at(self) -> str:
        """Return what its inputs depend on."""
        return f"{self.case.op} {self.case.name} {self.dtype}"

    @property
    def key(self) -> str:
        """Return the name under which its row is found again."""
        return f"{self.at} {self.label}"


def answers(op: str, device: str) -> dict[str, str]:
    """Return every pass of an operator with the backend that answers it there, as things are."""
    return {x.name: x.backend for x in select(op, torch.device(device)).passes}


def mixed(op: str, backends: Sequence[str]) -> bool:
    """Return whether what answers by itself on a GPU is none of the backends that are forced."""
    if not set(backends) <= {"cuda", "triton"}:
        return False
    forced = []
    for name in backends:
        if not lacks(op, name):
            with ok.backend(name):
                forced.append(answers(op, "cuda"))
    return answers(op, "cuda") not in forced


def plan(cases: Sequence[Case], backends: Sequence[str]) -> Iterator[Planned]:
    """Yield every row in the order in which it is measured."""
    pairs = [(case, dtype) for case in cases for dtype in case.dtypes]
    for backend in backends:
        yield from (
            Planned(case, dtype, FUSED, backend)
            for case, dtype in pairs
            if not lacks(case.op, backend)
        )
    yield from (
        Planned(case, dtype, FUSED, "auto") for case, dtype in pairs if mixed(case.op, backends)
    )
    others = [(case, list(registry.implementations(case))) for case in cases]
    yield from (
        Planned(case, dtype, "eager")
        for case, names in others
        for dtype in case.dtypes
        if "eager" in names
    )
    yield from (
        Planned(case, case.dtypes[0], "torch.compile")
        for case, names in others
        if case.compiled and "torch.compile" in names
    )
    for case, names in others:
        yield from (
            Planned(case, case.dtypes[0], name)
            for name in names
            if name not in (FUSED, "eager") and "compile" not in name
        )


def sample(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return at most 65536 elements of each tensor, evenly spaced, on the CPU.

    Two implementations are compared by them.
    """
    found = []
    for x in tensors:
        flat = x.detach().flatten()
        found.append(flat[:: max(1, -(-flat.numel() // 65536))].cpu())
    return found


def difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest relative Frobenius norm; of labels the share that differs."""
    if not found[0].is_floating_point():
        return float((found[0] != expected[0]).double().mean())
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


def allowed(case: Case, dtype: str, labels: bool) -> float:
    """Return how far the values of a case may differ."""
    return LABELS_MAY_DIFFER if labels else (CHOOSING if case.op in CHOOSES else TOLERANCE)[dtype]


class Bench:
    """Measures rows on a device.

    Keeps the inputs of the last case and a sample of our values of every case.
    """

    def __init__(self, device: Device, seconds: float, rates: dict[str, float]):
        self.device, self.seconds, self.rates = device, seconds, rates
        # Inputs to a backend of ours that has been measured on them, by whatever process.
        self.measured: dict[str, str] = {}
        self.samples: dict[str, tuple[str, list[torch.Tensor]]] = {}
        self._functions: dict[str, dict] = {}
        self._inputs: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def inputs(self, planned: Planned) -> dict[str, torch.Tensor]:
        """Return the inputs of a row, made anew where the last row had others."""
        if self._inputs[0] != planned.at:
            self.forget()
            self._inputs = (
                planned.at,
                registry.inputs(planned.case, DTYPES[planned.dtype], device=self.device.torch_name),
            )
        return self._inputs[1]

    def forget(self) -> None:
        """Let the inputs go, and give their memory back."""
        self._inputs = ("", {})
        self.device.settle()

    def function(self, planned: Planned):
        """Return the function of a row.

        Made once a case: what torch.compile has compiled belongs to it.
        """
        name = f"{planned.case.op} {planned.case.name}"
        if name not in self._functions:
            self._functions[name] = registry.implementations(planned.case)
        return self._functions[name][planned.implementation]

    def once(self, planned: Planned):
        """Run one forward and backward.

        Returns the function, its output, the gradient that goes in and those that come out.
        """
        tensors = self.inputs(planned)
        function = self.function(planned)
        out = function(**tensors)
        leaves = [x for x in tensors.values() if x.requires_grad]
        upstream = torch.ones_like(out) if out.requires_grad else None
        gradients = torch.autograd.grad(out, leaves, upstream) if out.requires_grad else ()
        return function, out.detach(), upstream, gradients

    def compare(self, planned: Planned, values: list[torch.Tensor]) -> dict[str, Any]:
        """Compare with our values, which are computed anew where an earlier process had them."""
        if planned.at not in self.samples:
            if planned.implementation == FUSED:
                self.samples[planned.at] = (planned.label, values)
                return {}
            if planned.at not in self.measured:  # it would fail, or lose the context, once more
                return {"compared_with": "nothing: no row of ours was measured"}
            with ok.backend(self.measured[planned.at]):
                _, out, _, gradients = self.once(Planned(planned.case, planned.dtype, FUSED))
            self.samples[planned.at] = (FUSED, sample([out, *gradients]))
        name, expected = self.samples[planned.at]
        found = difference(values, expected)
        facts: dict[str, Any] = {"compared_with": name, "difference": found}
        limit = allowed(planned.case, planned.dtype, not values[0].is_floating_point())
        return (
            facts
            if found <= limit
            else {**facts, "failed": f"values differ from {name} by {found:.2g}, {limit:g} allowed"}
        )

    def times(self, planned: Planned) -> dict[str, Any]:
        """Return the times of forward and backward, their shares, and the memory of a step."""
        # Entered once: choosing a backend registers kernels, which is no part of a call.
        with ok.backend(planned.backend or "auto"):
            function, out, upstream, gradients = self.once(planned)
            row = self.compare(planned, sample([out, *gradients]))
            if "failed" in row:
                return row
            tensors = self.inputs(planned)
            leaves = [x for x in tensors.values() if x.requires_grad]
            flops = registry.useful_flops(planned.case)
            size = moved(tensors.values(), out, gradients)
            del out, gradients
            row["extra_mib"] = round(
                (self.device.extra_bytes(lambda: self.once(planned)) - (size[1] - size[0])) / 2**20,
                1,
            )
            row |= self.part(planned, "forward", lambda: function(**tensors), flops[0], size[0])
            passes = 1
            ms = row["forward_ms"]
            if upstream is not None:
                kept = function(**tensors)
                row |= self.part(
                    planned,
                    "backward",
                    lambda: torch.autograd.grad(kept, leaves, upstream, retain_graph=True),
                    flops[1],
                    size[1],
                )
                passes = 2
                ms = round(ms + row["backward_ms"], 4)
        shares = self.shares(planned, sum(flops[:passes]), sum(size[:passes]), ms)
        return row | {"ms": ms} | shares

    def part(
        self, planned: Planned, name: str, function: Callable, flops: int, size: int
    ) -> dict[str, Any]:
        """Return the time of a pass, and its share of two rates."""
        took = self.device.milliseconds(function, self.seconds)
        row = {
            "ms": took["median"],
            "ms_p20": took["p20"],
            "ms_p80": took["p80"],
            **self.shares(planned, flops, size, took["median"]),
        }
        return {f"{name}_{key}": value for key, value in row.items()}

    def shares(self, planned: Planned, flops: int, size: int, ms: float) -> dict[str, float]:
        """Return the share of the rate of the product, where products bound it, and of the copy.

        ``size`` are the bytes that must move.
        """
        found = {"gb_per_s": round(size / ms / 1e6, 1)}
        if "copy" in self.rates:
            found["percent_of_copy"] = round(100 * found["gb_per_s"] / self.rates["copy"], 1)
        if flops:
            found["tflops"] = round(flops / ms / 1e9, 2)
        if flops and planned.dtype in self.rates:
            found["percent_of_product"] = round(
                100 * found["tflops"] / self.rates[planned.dtype], 1
            )
        return found

    def kernels(self, planned: Planned) -> dict[str, Any]:
        """Return the kernels of one step, the longest first."""
        with ok.backend(planned.backend or "auto"):
            self.once(planned)  # compiles, and chooses the library's kernels
            found = self.device.kernels(lambda: self.once(planned))
        return {
            "kernels_us": round(sum(kernel["us"] for kernel in found), 1),
            "launches": sum(kernel["count"] for kernel in found),
            "kernels": found[:MOST_KERNELS],
        }

    def calls(self, planned: Planned) -> dict[str, Any]:
        """Return a step by the clock, the host included, and replayed in a CUDA graph."""
        with ok.backend(planned.backend or "auto"):
            function, out, upstream, gradients = self.once(planned)
            row = self.compare(planned, sample([out, *gradients]))
            if "failed" in row:
                return row
            tensors = self.inputs(planned)
            leaves = [x for x in tensors.values() if x.requires_grad]
            size = moved(tensors.values(), out, gradients)

            def step():
                found = function(**tensors)
                if upstream is not None:
                    torch.autograd.grad(found, leaves, upstream)

            row |= self.device.calls(step, self.seconds)
            try:
                row["replay_us"] = self.device.replay_us(step, self.seconds)
            except Exception as error:  # it waits for the GPU, or allocates outside of torch
                row["replay_failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self.device.settle()
        flops = registry.useful_flops(planned.case)
        passes = 1 if upstream is None else 2
        ms = row.get("replay_us", row["wall_us"]) / 1000
        return row | self.shares(planned, sum(flops[:passes]), sum(size[:passes]), ms)


def moved(
    inputs: Iterable[torch.Tensor], out: torch.Tensor, gradients: Sequence[torch.Tensor]
) -> tuple[int, int]:
    """Return the bytes that a forward must read and write, and those of a backward."""

    def size(tensors):
        return sum(x.numel() * x.element_size() for x in tensors)

    forward = size([*inputs, out])
    return forward, forward + size(gradients)


MEASURES: dict[str, Callable[[Bench, Planned], dict[str, Any]]] = {
    "times": Bench.times,
    "kernels": Bench.kernels,
    "calls": Bench.calls,
}


def run(
    device: Device,
    out: str | os.PathLike,
    *,
    budget: float,
    seconds: float = 0.2,
    cases: Sequence[Case] = GPU_CASES,
    again: str = "",
    measure: str = "times",
) -> int:
    """Measure until ``budget`` seconds are spent.

    Returns 0, or 1 if a row of ours failed, or AGAIN if only a new process can go on.
    """
    functorch_config.donated_buffer = False  # a compiled backward is timed many times on one graph
    file = lines.Lines(out, worker=WORKER)
    earlier = _earlier(lines.read(out)[0], again)
    began = device.clock()
    if not earlier:
        file.write({**device.environment(), "run": again, "budget": budget})
    rates = {} if measure == "kernels" else _rates(device, file, earlier, seconds)
    if measure == "rates":
        return 0 if {"bfloat16", "copy"} <= set(rates) else 1
    planned = list(plan(cases, device.backends()))
    if not earlier:
        file.write({"planned": [p.key for p in planned]})
    bench = Bench(device, seconds, rates)
    have = {key: row for key, row in lines.finished(earlier).items() if not _out_of_time(row)}
    for p in planned:
        if p.key in have:
            if p.backend and "failed" not in have[p.key]:
                bench.measured[p.at] = p.backend
            continue
        row = {
            "key": p.key,
            "op": p.case.op,
            "case": p.case.name,
            "shape": p.case.shape,
            "options": p.case.options,
            "dtype": p.dtype,
            "implementation": p.label,
            **tf32(p.dtype),
        }
        if device.clock() - began > budget:
            have[p.key] = file.write({**row, "failed": OUT_OF_TIME})
            continue
        file.start(p.key, **{name: row[name] for name in ("op", "case", "dtype", "implementation")})
        print(p.key, flush=True)  # a sign of life for whoever watches
        try:
            if p.backend:
                with ok.backend(p.backend):
                    row["passes"] = answers(p.case.op, device.torch_name)
            row |= MEASURES[measure](bench, p)
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
            bench.forget()
        except CannotRun as reason:
            row["failed"] = str(reason)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if lost(error):
                file.write(row)
                return AGAIN
        if p.backend and "failed" not in row:
            bench.measured[p.at] = p.backend
        have[p.key] = file.write(row)
    return int(any(bad(row) for row in have.values()))


def _earlier(rows: list[lines.Row], run: str) -> list[lines.Row]:
    """Return what an earlier process has written of this run, from its line of beginning on.

    Whoever started the run may have written a line of beginning too, without a budget.
    """
    places = [
        i
        for i, row in enumerate(rows)
        if row.get("op") == "environment" and "budget" in row and run and row.get("run") == run
    ]
    return rows[places[-1] :] if places else []


def _rates(
    device: Device, file: lines.Lines, earlier: Iterable[lines.Row], seconds: float
) -> dict[str, float]:
    """Return what the device reaches by the name of the rate, measured if it has not been.

    A rate that cannot be measured is written down, and ends no other.
    """
    rows = [row for row in earlier if row.get("op") == "roofline"]
    if not any(row["rate"] == "copy" for row in rows):
        try:
            for row in device.rates(seconds):
                rows.append(file.write(row))
                print(f"rate {row['rate']}", flush=True)
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            file.write({"op": "roofline", "rate": "the next one", "failed": why})
            if lost(error):
                raise
    return {
        row["rate"]: row.get("tflops") or row["gb_per_s"]
        for row in rows
        if "tflops" in row or "gb_per_s" in row
    }


def warm(op: str, device: Device, cases: Sequence[Case] = GPU_CASES) -> None:
    """Compile the Triton kernels of an operator's cases into the cache, on few images.

    The kernels depend on the other sizes.
    """
    bench = Bench(device, 0.0, {})
    with ok.backend("triton"):
        for case in cases:
            for dtype in case.dtypes if case.op == op else ():
                pairs = op in (
                    "contrastive_loss",
                    "similarity_contrastive_loss",
                    "dense_contrastive_loss",
                )
                shape = {
                    k: min(v, 16) if k == "B" and not pairs else v for k, v in case.shape.items()
                }
                bench.once(
                    Planned(Case(op, f"{case.name} warm", shape, case.options), dtype, FUSED)
                )
                print(op, case.name, dtype, flush=True)


def _out_of_time(row: dict[str, Any]) -> bool:
    """Return whether a row was not begun: a later process of the run may."""
    return row.get("failed") == OUT_OF_TIME


def bad(row: dict[str, Any]) -> bool:
    """Return whether a row of ours failed, or a baseline has other values than ours."""
    ours = row["implementation"].startswith(FUSED)
    reason = row.get("failed", "")
    if _out_of_time(row):
        return False
    return "values differ" in reason or (ours and bool(reason or "replay_failed" in row))


def main() -> int:
    """Read the arguments, and measure; return the exit status."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--out")
    arguments.add_argument("--warm", metavar="OPERATOR", help="only compile its Triton kernels")
    arguments.add_argument("--seconds", type=float, default=0.2, help="of samples for each time")
    arguments.add_argument(
        "--budget",
        type=float,
        default=300,
        help="seconds in all; what is left over is written down as not measured",
    )
    arguments.add_argument(
        "--until", type=float, help="in place of --budget: when it ends, by the monotonic clock"
    )
    arguments.add_argument(
        "--run", default="", help="a name: started again with the same one, it goes on where it was"
    )
    arguments.add_argument("--cases", choices=list(CASES), default="all")
    arguments.add_argument("--measure", choices=[*MEASURES, "rates"], default="times")
    options = arguments.parse_args()
    cases = CASES[options.cases]
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs an NVIDIA GPU, and torch sees none")
    if options.warm:
        warm(options.warm, Gpu(), cases)
        return 0
    if not options.out:
        arguments.error("--out is missing; expected a file for the rows")
    device = Gpu()
    return run(
        device,
        options.out,
        budget=options.until - device.clock() if options.until else options.budget,
        seconds=options.seconds,
        cases=cases,
        again=options.run,
        measure=options.measure,
    )


if __name__ == "__main__":
    raise SystemExit(main())
