"""One operator on one backend against float64: every dtype, forward and backward, a small shape and
one of the paper.

    python scripts/gpu_smoke.py OPERATOR BACKEND --out FILE [--dtypes float32 bfloat16]

A line each, written at once; stops at nothing. The rule is that of ovseg_kernels/testing.py: the
error against the definition in float64, of the same rounded inputs, is at most twice that of the
definition in the dtype itself, plus a floor. Where the result depends on a choice among near ties
(centers, negatives), few of them may differ, and the rest is held to the norm of the error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_small import CALLS, DTYPES, Call, Draw, cast, outputs

import ovseg_kernels as ok

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import lines  # noqa: E402
from benchmarks.device import lost  # noqa: E402
from benchmarks.supervise import AGAIN  # noqa: E402
from ovseg_kernels.testing import FLOORS  # noqa: E402

MAY_DIFFER = 1e-3  # share of labels and indices, where two nearly tie
OUTPUT = tuple[list[torch.Tensor], list[torch.Tensor]]


def judge(
    found: OUTPUT, eager: OUTPUT, truth: OUTPUT, floor: float, chooses: bool = False
) -> dict[str, Any]:
    """The worst error of all tensors beside what it may be; "failed" if it is larger."""
    row: dict[str, Any] = {}
    changed = 0.0
    for a, b, c in zip(found[1], eager[1], truth[1], strict=True):
        share, allowed = (float((x != c).double().mean()) for x in (a, b))
        allowed = max(MAY_DIFFER, 1.5 / a.numel(), 2 * allowed)
        changed = max(changed, share)
        row |= {"labels_differ": share}
        if share > allowed:
            row["failed"] = f"{share:.3g} of the labels differ, {allowed:.3g} allowed"
    worst = -1.0
    for i, (a, b, c) in enumerate(zip(found[0], eager[0], truth[0], strict=True)):
        a, b, c = a.double(), b.double(), c.double()
        if not torch.equal(a.isfinite(), c.isfinite()):
            bad, expected = (int((~x.isfinite()).sum()) for x in (a, c))
            return {
                **row,
                "failed": f"tensor {i} holds {bad} numbers that are not finite, the truth "
                f"{expected}",
            }
        least = floor * (
            10 if c.numel() == 1 else 1
        )  # one number may be the difference of two large sums
        norm = float(c.norm().clamp_min(1e-12))
        measures = [
            (
                float((a - c).norm()) / norm,
                2 * float((b - c).norm()) / norm + least + 2 * changed**0.5 + 0.02 * chooses,
            )
        ]
        if not changed and not chooses:
            scale = max(1.0, float(c.abs().max()))
            measures.append(
                (float((a - c).abs().max()) / scale, 2 * float((b - c).abs().max()) / scale + least)
            )
        for error, allowed in measures:
            if error / allowed > worst:
                worst = error / allowed
                row |= {"tensor": i, "error": error, "allowed": allowed}
                if not error <= allowed:
                    row["failed"] = f"tensor {i}: error {error:.3g}, {allowed:.3g} allowed"
    return row


def check(call: Call, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """One call: first and second run in milliseconds (the first compiles), then the judgement."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = cast(call, dtype, wide)
    times = []
    with ok.backend(backend):
        for _ in range(2):
            began = time.perf_counter()
            found = outputs(call, tensors)
            if tensors[0].is_cuda:
                torch.cuda.synchronize()
            times.append(round(1e3 * (time.perf_counter() - began), 2))
    with ok.backend("reference"):
        eager = outputs(call, tensors)
        truth = outputs(call, [x.detach().double().requires_grad_() for x in tensors])
    floor = FLOORS[torch.float32 if call.rounded and dtype == torch.float64 else dtype]
    return {
        "first_ms": times[0],
        "ms_with_host": times[1],
        **judge(found, eager, truth, floor, call.chooses),
    }


def run(
    op: str,
    backend: str,
    out: str,
    dtypes: Sequence[str],
    device: str = "cuda",
    worker: str = "",
    paper: bool = True,
) -> int:
    file = lines.Lines(out, worker=worker or f"{op} {backend}")
    have, bad = lines.finished(lines.read(out)[0]), False
    for size in ("small", "paper") if paper else ("small",):
        for name in dtypes:
            if name == "float64" and size == "paper":
                continue  # for checking only
            for call in CALLS[op](Draw(device, size == "paper"), size == "paper"):
                key = f"{op} {backend} {name} {size} {call.name}"
                if key in have:
                    continue
                row: dict[str, Any] = {
                    "key": key,
                    "op": op,
                    "backend": backend,
                    "dtype": name,
                    "size": size,
                    "case": call.name,
                    "shapes": [list(x.shape) for x in call.tensors],
                }
                file.start(key, op=op, backend=backend)
                try:
                    row |= check(call, DTYPES[name], backend)
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                    if lost(error):
                        file.write(row)
                        return AGAIN
                bad |= "failed" in row
                file.write(row)
                print(key, row.get("failed", "passed"), flush=True)
    return int(bad)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("op", choices=list(CALLS))
    arguments.add_argument("backend", choices=("cuda", "triton"))
    arguments.add_argument("--out", required=True)
    arguments.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16", "float16"], choices=list(DTYPES)
    )
    arguments.add_argument("--worker", default="", help="the name under which its rows are written")
    given = arguments.parse_args()
    raise SystemExit(run(given.op, given.backend, given.out, given.dtypes, worker=given.worker))
