"""The runner: values checked first, times alternating in one process, memory in its own.

Each memory is measured in a process of its own. Time is forward + backward, the median of many with
p20 and p80. Memory is the growth of the peak resident set during one forward + backward, less the
gradients of the inputs, which every implementation must produce; Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import ovseg_kernels as ok

from . import registry
from .registry import CASES, FUSED, Case

_DIFFERING = 1e-3  # of the labels, where two classes tie within rounding
_WRONG = 1e-3  # an implementation whose values differ by more is not timed


def step(function, tensors: dict[str, torch.Tensor], grad: torch.Tensor | None = None):
    """Run one forward and, where there is a gradient, backward."""
    out = function(**tensors)
    if not out.requires_grad:
        return out, []
    leaves = [x for x in tensors.values() if x.requires_grad]
    return out, torch.autograd.grad(out, leaves, torch.ones_like(out) if grad is None else grad)


def measure(
    case: Case,
    *,
    repeats: int = 7,
    seconds: float = 60.0,
    report: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Return one row an implementation.

    Args:
        case: what is measured.
        repeats: of each implementation; slow ones get fewer.
        seconds: that the case takes at most, about.
        report: called with the rows that are known so far, again and again: a run that is stopped
            leaves those.
    """
    from ovseg.progress import bar  # not in the processes that memory is measured in

    tensors, functions = registry.inputs(case), registry.implementations(case)
    rows: dict[str, dict[str, Any]] = {}

    def known() -> None:
        if report is not None:
            report([row for row in rows.values() if "ms" in row or "failed" in row])

    with bar(
        total=2 * len(functions) + repeats,
        unit="step",
        desc=f"bench {case.op} {case.name}",
        leave=False,
    ) as shown:
        truth = None
        for name, function in functions.items():
            row = {
                "op": case.op,
                "case": case.name,
                "shape": case.shape,
                "options": case.options,
                "dtype": "float32",
                "implementation": name,
                "backend": ok.explain(case.op).backend if name == FUSED else "torch",
            }
            rows[name] = row
            shown.set_postfix_str(f"first step of {name}")
            try:
                out, grads = step(function, tensors)  # warm-up; torch.compile compiles here
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            else:
                if truth is None:
                    truth = (out.detach(), grads)
                else:
                    _compare(row, out, grads, truth)
                del out, grads
            shown.update()
        times = _times(
            {name: functions[name] for name, row in rows.items() if "failed" not in row},
            tensors,
            repeats,
            seconds,
            shown,
        )
        for name, values in times.items():
            ordered = sorted(values)
            for key, share in (("ms_p20", 0.2), ("ms", 0.5), ("ms_p80", 0.8)):
                rows[name][key] = round(1e3 * ordered[round(share * (len(ordered) - 1))], 2)
            rows[name]["repeats"] = len(values)
        for row in rows.values():
            if "ms" in row and "ms" in rows[FUSED]:
                row["time_over_ovseg"] = round(row["ms"] / rows[FUSED]["ms"], 3)
        known()
        for name in times:
            shown.set_postfix_str(f"memory of {name}")
            rows[name]["extra_mib"] = _memory_in_subprocess(case, name)
            shown.update()
            known()
    return list(rows.values())


def _compare(
    row: dict[str, Any],
    out: torch.Tensor,
    grads: Sequence[torch.Tensor],
    truth: tuple[torch.Tensor, Sequence[torch.Tensor]],
) -> None:
    """Note in ``row`` how far the values are from ``truth``.

    And whether that is too far to be timed.
    """
    if not out.is_floating_point():  # labels: some pixels tie within rounding
        row["differing_labels"] = float((out != truth[0]).float().mean())
        if row["differing_labels"] > _DIFFERING:
            row["failed"] = f"{row['differing_labels']:.2g} of the labels differ"
        return
    errors = [float((out.detach() - truth[0]).abs().max())]
    errors += [
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
        for a, b in zip(grads, truth[1], strict=True)
    ]
    row["max_difference_from_ovseg"] = max(errors)
    if max(errors) > _WRONG:
        row["failed"] = f"values differ by {max(errors):.2g}"


def _times(
    functions: dict[str, Callable],
    tensors: dict[str, torch.Tensor],
    repeats: int,
    seconds: float,
    shown: Any,
) -> dict[str, list[float]]:
    """Return seconds of each step of each implementation, alternating."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    began = time.perf_counter()
    for turn in range(repeats):
        for name, function in functions.items():
            shown.set_postfix_str(f"times of {name}")
            start = time.perf_counter()
            step(function, tensors)
            times[name].append(time.perf_counter() - start)
        shown.update()
        if turn >= 2 and time.perf_counter() - began > seconds:
            shown.update(repeats - turn - 1)
            break
    return times


def _memory_in_subprocess(case: Case, name: str) -> float | None:
    if not Path("/proc/self/clear_refs").exists():
        return None
    request = json.dumps(
        {"case": CASES.index(case), "implementation": name, "threads": torch.get_num_threads()}
    )
    done = subprocess.run(
        [sys.executable, "-m", __name__, "--memory", request],
        capture_output=True,
        text=True,
        check=False,
    )
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def memory(request: dict[str, Any]) -> float:
    """Return MiB by which one forward + backward raises the peak resident set.

    Beyond inputs and their gradients.
    """
    torch.set_num_threads(request["threads"])
    case = CASES[request["case"]]
    function = registry.implementations(case)[request["implementation"]]
    small = Case(
        case.op, "warm-up", {key: min(value, 8) for key, value in case.shape.items()}, case.options
    )
    # Once before: libraries, thread pools, compiler.
    step(registry.implementations(small)[request["implementation"]], registry.inputs(small))
    if "compile" in request["implementation"]:
        step(function, registry.inputs(case))  # compiled for this shape before it is watched
    tensors = registry.inputs(case)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    kept = step(function, tensors)
    gradients = sum(x.numel() * x.element_size() for x in kept[1]) / 2**20
    return round((_status("VmHWM") - before) / 1024 - gradients, 1)


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1])


def environment() -> dict[str, Any]:
    """Return names and versions of what the figures were made with."""
    cpu = (
        next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "device": cpu,
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
        "torch": torch.__version__,
        "ovseg_kernels": ok.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown, losing rows included."""
    lines = [
        "| op | case | implementation | ms (p20-p80) | time / ovseg | extra MiB |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        spread = (
            f"{r['ms']:.1f} ({r['ms_p20']:.1f}-{r['ms_p80']:.1f})"
            if "ms" in r
            else r.get("failed", "")
        )
        cells = (
            r["op"],
            r["case"],
            r["implementation"],
            spread,
            r.get("time_over_ovseg", ""),
            r.get("extra_mib", ""),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def run(
    ops: Sequence[str] = (), cases: Sequence[str] = (), *, repeats: int = 7, out: str | None = None
) -> list[dict[str, Any]]:
    """Measure the chosen cases, print the table, and write JSON if ``out`` is given.

    Both as the rows come.
    """
    known = sorted({case.op for case in CASES})
    for op in ops:
        if op not in known:
            raise ValueError(f"op is {op!r}; expected one of {known}")
    for name in cases:
        if name not in {case.name for case in CASES}:
            raise ValueError(
                f"case is {name!r}; expected one of {sorted({case.name for case in CASES})}"
            )
    facts = environment()
    rows: list[dict[str, Any]] = []
    chosen = [
        case for case in CASES if (not ops or case.op in ops) and (not cases or case.name in cases)
    ]
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(table([]), flush=True)

    def keep(known: list[dict[str, Any]]) -> None:
        save(out, {"environment": facts, "rows": [*rows, *known]})

    for number, case in enumerate(chosen, 1):
        print(
            f"measuring {case.op} {case.name} {case.shape}, {number} of {len(chosen)} cases",
            file=sys.stderr,
            flush=True,
        )
        found = measure(case, repeats=repeats, report=keep)
        rows.extend(found)
        print("\n".join(table(found).splitlines()[2:]), flush=True)
    save(out, {"environment": facts, "rows": rows})
    return rows


def save(out: str | None, found: dict[str, Any]) -> None:
    """Write what has been found so far as JSON, if there is a name for it.

    By rename, so that the file is whole at any time.
    """
    from ovseg.replacing import write_text

    if out:
        write_text(Path(out), json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--memory", required=True)
    print(memory(json.loads(arguments.parse_args().memory)))
