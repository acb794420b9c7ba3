"""The commands of scripts/gpu_check.py, and how their output is read."""

from __future__ import annotations

import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import lines, show  # noqa: E402
from benchmarks.supervise import Job, Outcome  # noqa: E402

QUIET = (sys.executable, "-W", "ignore")
CACHES = {
    "TRITON_CACHE_DIR": str(ROOT / "build" / "gpu" / "triton"),
    "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "gpu" / "inductor"),
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", **CACHES}  # for processes that run side by side
OPERATORS = (
    "patch_text_similarity",
    "similarity_contrastive_loss",
    "center_assignment",
    "folded_center_assignment",
    "segclip_center_assignment",
    "contrastive_loss",
    "dense_contrastive_loss",
    "upsample_argmax",
    "upsample_mask_loss",
    "window_argmax",
)
# Many kernels to compile: a process a dtype.
SPLIT = (
    "patch_text_similarity",
    "center_assignment",
    "folded_center_assignment",
    "segclip_center_assignment",
)
# What the Triton tests compile, and the most of one of 14 processes:
# tests/packaging/triton_count.py. Seconds each: docs/testing.md.
SPECIALISATIONS, FULLEST, COMPILE_SECONDS = 344, 167, 0.57
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Substrings of the mangled names: CUDA's are in a namespace, Triton's begin with their operator's
# or a part's of it.
CUDA_KERNELS = ("ovseg",)
TRITON_KERNELS = (
    "patch_text_similarity_",
    "contrastive_loss_",
    "center_assignment_",
    "philox_kernel",
    "row_norms_kernel",
)


def has(op: str, backend: str) -> bool:
    """Return whether the operator has a kernel there, told by the files without torch."""
    home = "center_assignment" if op.endswith("_center_assignment") else op
    if backend == "cuda":
        return (ROOT / "csrc" / home / f"{home}_cuda.cu").exists()
    return (ROOT / "ovseg_kernels" / "triton" / f"{home}.py").exists()


def build(capability: str, cores: int, limit: float) -> Job:
    """setup.py in place: it writes build_info.json, which the libraries are known by."""
    arch = capability + ("a" if capability.startswith("9.") else "")
    environment = {
        "FORCE_CUDA": "1",
        "OVSEG_BUILD_NATIVE": "1",
        "TORCH_CUDA_ARCH_LIST": arch,
        "MAX_JOBS": str(cores),
        "OVSEG_KEEP_BUILD": "1",
    }  # a build that its limit cut short goes on the next time
    return Job(
        "compile", [sys.executable, "setup.py", "build_ext", "--inplace"], limit, environment
    )


def smoke(out: Path, limit: float) -> list[Job]:
    """A process an operator and backend: what one kernel does to the context costs no other.

    Those that compile longest first.
    """
    jobs = []
    for backend in ("triton", "cuda"):
        for op in (op for op in OPERATORS if has(op, backend)):
            dtypes = ["float32", "bfloat16", "float16"] + (["float64"] if backend == "cuda" else [])
            for part in [[d] for d in dtypes] if backend == "triton" and op in SPLIT else [dtypes]:
                name = f"smoke {op} {backend} {'' if len(part) > 1 else part[0]}".strip()
                command = [
                    *QUIET,
                    "scripts/gpu_smoke.py",
                    op,
                    backend,
                    "--out",
                    str(out),
                    "--worker",
                    name,
                    "--dtypes",
                    *part,
                ]
                jobs.append(Job(name, command, limit, ONE_THREAD, resume=True, stall=15))
    return jobs


def warm(limit: float, cases: str = "all") -> list[Job]:
    """Compiles the Triton kernels of the bench side by side, for its one process to find them."""
    command = [*QUIET, "-m", "benchmarks.gpu", "--cases", cases, "--warm"]
    return [
        Job(f"compile {op}", [*command, op], limit, ONE_THREAD)
        for op in OPERATORS
        if has(op, "triton")
    ]


def measure(step: str, cases: str, out: Path, seconds: float, until: float, run_id: str) -> Job:
    """One process of benchmarks/gpu.py, which begins no row after ``until`` on the clock."""
    command = [
        *QUIET,
        "-m",
        "benchmarks.gpu",
        "--measure",
        "times" if step == "bench" else step,
        "--cases",
        cases,
        "--out",
        str(out),
        "--until",
        f"{until:.0f}",
        "--run",
        run_id,
    ]
    # Silent it is for as long as torch.compile takes, which only "all" asks for.
    stall = 75 if cases == "all" else 40
    return Job(step, command, seconds, CACHES, resume=True, stall=stall)


def tests(group: str, workers: int, out: Path, limit: float) -> list[Job]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/ops",
        "-m",
        "gpu",
        "-k",
        "cuda" if group == "cuda" else "not cuda",
        "-q",
        "-p",
        "gpu_pytest",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "--continue-on-collection-errors",
    ]
    return [
        Job(
            f"{group} tests {i}",
            command,
            limit,
            resume=True,
            stall=90,
            environment={
                **ONE_THREAD,
                "OVSEG_LINES": str(out),
                "OVSEG_SHARD": f"{i}/{workers}",
                "OVSEG_WORKER": f"{group} tests {i}",
                "OVSEG_GROUP": group,
            },
        )
        for i in range(workers)
    ]


def sanitize(
    sanitizer: str,
    no_triton: bool,
    limit: float = 75,
    operators: Sequence[str] = OPERATORS,
    tools: Sequence[str] = TOOLS,
) -> list[Job]:
    """One operator, backend and tool a process; memcheck for all before the next tool."""
    jobs = []
    pairs = [
        ("memcheck", "cuda"),
        ("memcheck", "triton"),
        ("racecheck", "cuda"),
        ("initcheck", "cuda"),
        ("synccheck", "cuda"),
        ("racecheck", "triton"),
        ("initcheck", "triton"),
        ("synccheck", "triton"),
    ]
    for tool, backend in pairs:
        if tool not in tools or (backend == "triton" and no_triton):
            continue
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--print-limit",
            "50",
            "--target-processes",
            "application-only",
        ]
        if tool != "initcheck":
            # initcheck must see torch's kernels too, or what they write would count as never
            # written; its report is sifted below.
            names = CUDA_KERNELS if backend == "cuda" else TRITON_KERNELS
            command += [word for name in names for word in ("--kernel-name", f"kns={name}")]
        if tool == "memcheck":
            command += [
                "--report-api-errors",
                "no",
            ]  # torch's probes of what the driver can do are no errors
        dtypes = (
            ["float32", "float16", "bfloat16"] if backend == "cuda" else ["float32", "bfloat16"]
        )
        for op in (op for op in operators if has(op, backend)):
            # Without the allocator's pool every tensor ends where its memory ends, and begins as
            # memory nobody wrote.
            environment = {**ONE_THREAD, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            watched = [*command, *QUIET, "scripts/gpu_small.py", op, backend, *dtypes]
            jobs.append(Job(f"{tool} {op} {backend}", watched, limit, environment, ended=(0, 1, 9)))
    return jobs


def ours(kernel: str) -> bool:
    return any(name in kernel for name in (*CUDA_KERNELS, *TRITON_KERNELS))


def sanitized(outcome: Outcome) -> dict[str, Any]:
    """One line a process: what the tool found in our kernels, and what the process itself said if
    it failed.
    """
    tool, op, backend = outcome.name.split()
    row: dict[str, Any] = {
        "key": outcome.name,
        "tool": tool,
        "op": op,
        "backend": backend,
        "seconds": outcome.seconds,
    }
    told = [
        line.lstrip("= ").strip()
        for line in outcome.output.splitlines()
        if line.startswith("=========")
    ]
    if summary := [line for line in told if "SUMMARY" in line]:
        row["summary"] = summary[-1]
    places = [line.removeprefix("at ").split("+0x")[0] for line in told if line.startswith("at ")]
    found = [place for place in places if ours(place)]
    if outcome.status is None:
        return {**row, "state": "not reached", "failed": outcome.reason}
    if outcome.reason:
        row["failed"] = ": ".join(
            [outcome.reason, *[line for line in told if not line.startswith("COMPUTE")][:1]]
        )[:600]
    elif outcome.status == 9 and tool == "initcheck" and not found and places:
        row["elsewhere"] = len(places)  # in torch's own kernels
    elif outcome.status != 0:
        said = [
            line
            for line in outcome.output.splitlines()
            if line.strip() and not line.startswith("=")
        ]
        first = (
            [line for line in told if not line.startswith("COMPUTE")][:1]
            if outcome.status == 9
            else said[-1:]
        )
        row["failed"] = (
            f"exit status {outcome.status}: {'; '.join([*first, *dict.fromkeys(found[:3])])[:600]}"
        )
    elif not summary:
        row["failed"] = "the tool gave no summary: it has not watched the process"
    return row


def beside_nvcc(name: str, nvcc: str | None) -> str | None:
    if nvcc is None:
        return None
    path = Path(os.path.realpath(nvcc)).with_name(name)
    return str(path) if path.exists() else None


def compiled(work: Path) -> int:
    """Kernels in Triton's cache."""
    return sum(1 for _ in (work / "triton").glob("*/*.cubin"))


def estimate(results: Path, workers: int) -> str:
    """How long the Triton tests compile, by the times that smoke measured on this machine, if it
    has run.
    """
    seconds, origin = COMPILE_SECONDS, "measured on another machine; smoke measures it here"
    for path in sorted(results.glob("*-smoke.jsonl")):
        for row in lines.read(path)[0]:
            if row.get("compiled"):
                seconds, origin = (
                    row["compile_seconds"] / row["compiled"],
                    "as smoke measured it here",
                )
    return (
        f"estimate: {SPECIALISATIONS} Triton kernels x {seconds:.2f} s ({origin}) in {workers} "
        "processes: "
        f"{SPECIALISATIONS * seconds / workers:.0f} s of compiling if no two compile the same, "
        f"{max(FULLEST, SPECIALISATIONS / workers) * seconds:.0f} s if the fullest finds none "
        "made by another; "
        "imports and tests come on top"
    )


def short(row: dict[str, Any]) -> str:
    """A row on the screen."""
    state = f"FAILED: {row['failed']}" if "failed" in row else row.get("state", "passed")
    numbers = (
        ("error", "error"),
        ("of", "allowed"),
        ("ms", "ms"),
        ("ms", "ms_with_host"),
        ("host us", "host_us"),
        ("wall us", "wall_us"),
        ("replayed us", "replay_us"),
        ("kernels us", "kernels_us"),
    )
    facts = [f"{name} {row[key]:.3g}" for name, key in numbers if key in row]
    facts += filter(None, [show.share(row)])
    for name in ("forward", "backward"):
        rates = [rate for rate in ("product", "copy") if f"{name}_percent_of_{rate}" in row]
        facts += [f"{name} {row[f'{name}_percent_of_{rate}']}% of {rate}" for rate in rates]
    return " | ".join([row["key"], state, *facts, *filter(None, [row.get("summary")])])


def junit(path: Path, group: str, out: Path) -> None:
    """The group's results in the form that CI systems read, from the lines: so that killed workers
    are in it too.
    """
    rows = [
        row for row in lines.finished(lines.read(path)[0]).values() if row.get("group") == group
    ]
    failed, skipped = (
        sum("failed" in row for row in rows),
        sum(row.get("state") == "skipped" for row in rows),
    )
    suite = ElementTree.Element(
        "testsuite",
        name=group,
        tests=str(len(rows)),
        failures=str(failed),
        skipped=str(skipped),
        errors="0",
        time=f"{sum(row.get('seconds', 0) for row in rows):.3f}",
    )
    for row in rows:
        file, _, name = row["key"].partition("::")
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=file.removesuffix(".py").replace("/", "."),
            name=name,
            time=str(row.get("seconds", 0)),
        )
        if "failed" in row:
            ElementTree.SubElement(case, "failure", message=_printable(row["failed"]))
        elif row.get("state") == "skipped":
            ElementTree.SubElement(case, "skipped")
    part = out.with_suffix(".part")
    ElementTree.ElementTree(suite).write(part, encoding="utf-8", xml_declaration=True)
    part.replace(out)


def _printable(text: str) -> str:
    return re.sub(r"[^\x09\x0a\x20-\ud7ff\ue000-\ufffd]", "?", text)
