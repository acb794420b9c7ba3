"""The verbs of scripts/gpu_check.sh: what each runs, in which order, and how long it may take.

Imports no torch itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import gpu_jobs
from gpu_jobs import ROOT

from benchmarks import lines, show
from benchmarks.supervise import Job, Outcome, run

# Part to step to seconds, in their order. What a step leaves over goes to the next; GRACE of
# supervise.py is part of a limit.
FACTS = 5
LIMITS: dict[str, dict[str, int]] = {
    "build": {"prebuilt": 45, "compile": 360, "info": 60},
    "smoke": {"smoke": 35},
    "bench": {"compile kernels": 70, "bench": 400},
    "test": {"cuda tests": 180, "triton tests": 290},
    "sanitize": {"sanitize": 470},
}
ALL: dict[str, dict[str, int]] = {
    "build": {"prebuilt": 20, "compile": 115, "info": 15},
    "smoke": {"smoke": 35},
    "bench": {"bench": 110},
    "test": {"cuda tests": 45, "triton tests": 70},
    "sanitize": {"sanitize": 60},
}
# What a GPU is asked that may never be had again: a row of everything, the most wanted first. There
# is no time to compile the libraries.
FIRST: dict[str, dict[str, int]] = {
    "build": {"prebuilt": 20},
    "rates": {"rates": 25},
    "smoke": {"smoke": 35},
    "bench": {"compile kernels": 30, "bench": 155},
    "kernels": {"kernels": 40},
    "calls": {"calls": 55},
    "test": {"cuda tests": 115},
    "sanitize": {"sanitize": 60},
}
VERBS = ["first", *LIMITS, "all"]
# Seconds that a verb may take: the sum of its limits and FACTS is not larger, which a test holds.
LONGEST = {"first": 540} | dict.fromkeys([*LIMITS, "all"], 480)
SANITIZED_FIRST = ("memcheck", "racecheck")
LOG_BYTES = 200_000  # of the output of each job


def limits(verb: str) -> dict[str, dict[str, int]]:
    """Part to step to seconds; "first" and "all" have many parts, shorter."""
    return {"first": FIRST, "all": ALL}.get(verb) or {verb: LIMITS[verb]}


def say(text: str) -> None:
    """A screen that has gone away, be it a closed pipe or a lost connection, ends nothing."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


@dataclass
class Place:
    """Where it runs, and by what: what a dry run replaces."""

    device: str
    capability: str  # "9.0"
    results: Path
    work: Path  # logs of running jobs, and caches
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    run: Callable[..., list[Outcome]] = run
    clock: Callable[[], float] = time.monotonic
    missing: Callable[[str], bool] = lambda name: find_spec(name) is None
    tool: Callable[[str], str | None] = shutil.which
    say: Callable[[str], None] = lambda text: say(text)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))
    run_id: str = field(default_factory=lambda: f"{time.time():.3f}")


class Part:
    """One part of a verb, with its result file: build, smoke, bench, test or sanitize.

    ``operators`` are those that the sanitizer watches.
    """

    def __init__(
        self,
        place: Place,
        verb: str,
        name: str,
        began: float,
        steps: dict[str, int],
        operators: Sequence[str] = gpu_jobs.OPERATORS,
    ):
        self.place = place
        self.name = name
        self.steps = steps
        self.operators = operators
        self.first = verb == "first"
        self.until, end = {}, began
        for step, seconds in steps.items():
            end += seconds
            self.until[step] = end
        self.file = lines.Lines(
            place.results / f"{place.date}-{'first-' if self.first else ''}{name}.jsonl"
        )
        self.run_id = f"{name} {place.run_id}"
        self.failed = False
        self._seen, self._looked, self._quiet = 0, 0.0, name == "test"

    def begin(self) -> None:
        """The line that begins a run, or none where a killed one of this name goes on."""
        rows = lines.read(self.file.path)[0]
        if any(row.get("op") == "environment" and row.get("run") == self.run_id for row in rows):
            return
        self.file.write(
            {
                "op": "environment",
                "device": self.place.device,
                "capability": self.place.capability,
                "date": self.place.date,
                "time": time.strftime("%H:%M:%S"),
                "run": self.run_id,
            }
        )

    def left(self, step: str) -> float:
        """Seconds that this step may take: its own, and what those before it left over."""
        return self.until[step] - self.place.clock()

    def results(self) -> list[lines.Row]:
        """Of this run."""
        return list(lines.finished(lines.read(self.file.path)[0]).values())

    def step(
        self,
        name: str,
        jobs: Sequence[Job],
        workers: int,
        resume: bool = False,
        bad: str = "FAILED",
    ) -> list[Outcome]:
        """Runs them, and writes how it ended, ``bad`` if not well.

        Rows appear on the screen while they run.
        """
        began = self.place.clock()
        outcomes = self.place.run(
            jobs,
            workers=workers,
            until=self.until[name],
            logs=self.place.work / "logs",
            results=self.file if resume else None,
            report=self._log,
            tick=self._show_new_rows,
        )
        self._show_new_rows(last=True)
        stopped = sorted({o.reason for o in outcomes if o.reason})
        unclean = [o for o in outcomes if o.status != 0]
        state = "passed" if not unclean else "ended early" if stopped else bad
        last = [line for o in unclean if not o.reason for line in o.output.splitlines()[-1:]]
        why = "; ".join([*stopped, *dict.fromkeys(last[:3])])[:300]
        self.note(name, state, round(self.place.clock() - began, 1), why)
        return outcomes

    def note(self, step: str, state: str, seconds: float, note: str = "") -> None:
        self.failed |= state != "passed"
        self.file.write(
            {"step": step, "state": state, "seconds": seconds, **({"note": note} if note else {})}
        )
        self.place.say(f"== {step}: {state}, {seconds} s{'; ' + note if note else ''}")

    def missing(self, names: Sequence[str], what: str) -> bool:
        """Says and writes which of these Python packages are not there."""
        if absent := [name for name in names if self.place.missing(name)]:
            self.file.write(
                {
                    "step": "needs",
                    "state": "missing",
                    "seconds": 0,
                    "note": f"{', '.join(absent)} not installed: {what}",
                }
            )
            self.place.say(f"== {', '.join(absent)} not installed: {what}")
        return bool(absent)

    def _log(self, outcome: Outcome) -> None:
        text = outcome.output.encode()[-LOG_BYTES:].decode(errors="replace")
        with open(self.place.results / f"{self.place.date}.log", "a") as log:
            log.write(
                f"==== {self.name}, {outcome.name}: exit status {outcome.status}, "
                f"{outcome.seconds} s {outcome.reason}\n{text}\n"
            )

    def _show_new_rows(self, last: bool = False) -> None:
        if not last and self.place.clock() - self._looked < 0.5:
            return
        self._looked = self.place.clock()
        rows = [row for row in lines.read(self.file.path)[0] if "key" in row]
        for row in rows[self._seen :]:
            if "failed" in row or not self._quiet:
                self.place.say(gpu_jobs.short(row))
        if self._quiet and len(rows) // 200 > self._seen // 200:
            self.place.say(f"{len(rows)} tests done")
        self._seen = len(rows)


def build(part: Part) -> None:
    ready = [*gpu_jobs.QUIET, "-m", "ovseg_kernels.info", "--ready"]
    (found,) = part.step(
        "prebuilt", [Job("prebuilt", ready, part.left("prebuilt"))], 1, bad="not accepted"
    )
    part.failed = False  # not being built yet is no failure
    part.place.say(found.output.strip()[-600:])
    if found.status != 0 and "compile" not in part.steps:
        part.note("libraries", "FAILED", 0, "`first` has no time to compile: `build` does")
    elif found.status != 0:
        tools = [name for name in ("cmake", "nvcc", "c++") if part.place.tool(name) is None]
        if tools or part.missing(["setuptools", "numpy"], "the build needs them"):
            part.note(
                "compile",
                "FAILED",
                0,
                f"needs {', '.join(tools) or 'setuptools, numpy'}; or libraries that "
                "`FORCE_CUDA=1 make gpu-build` made from these sources on another x86-64 machine, "
                "in ovseg_kernels/",
            )
        else:
            part.step(
                "compile",
                [gpu_jobs.build(part.place.capability, part.place.cores, part.left("compile"))],
                1,
            )
        part.step("info", [Job("info", ready, part.left("info"))], 1)


def smoke(part: Part) -> None:
    part.missing(["triton"], "its rows will fail")
    jobs = gpu_jobs.smoke(part.file.path, part.steps["smoke"])
    before = gpu_jobs.compiled(part.place.work)
    left = {row["key"] for row in part.results() if row["key"].startswith("the rest of ")}
    for outcome in part.step("smoke", jobs, len(jobs), resume=True):
        op, backend = outcome.name.split()[1:3]
        row = {"key": f"the rest of {outcome.name}", "op": op, "backend": backend}
        if outcome.reason:  # the rows that it had not begun
            part.file.write({**row, "failed": outcome.reason})
        elif row["key"] in left:  # of a killed run, which has gone on
            part.file.write(row)
    rows = [row for row in part.results() if row.get("backend") == "triton" and "first_ms" in row]
    spent = sum(max(0.0, row["first_ms"] - row["ms_with_host"]) for row in rows) / 1000
    if count := gpu_jobs.compiled(part.place.work) - before:
        part.file.write({"compiled": count, "compile_seconds": round(spent, 1)})
        part.place.say(f"{count} Triton kernels compiled, {spent / count:.2f} s each")


def rates(part: Part) -> None:
    measured(part, "rates", "all", rest=5)


def bench(part: Part) -> None:
    cases = "first" if part.first else "all"
    if "compile kernels" in part.steps:
        jobs = gpu_jobs.warm(part.left("compile kernels"), cases)
        part.step("compile kernels", jobs, min(14, part.place.cores))
        part.failed = False  # what does not run here, the bench says row by row
    measured(part, "bench", cases, rest=40)


def kernels(part: Part) -> None:
    measured(part, "kernels", "first", rest=12)


def calls(part: Part) -> None:
    measured(part, "calls", "small", rest=12)


def measured(part: Part, step: str, cases: str, rest: float) -> None:
    """Runs the one process of a step; ``rest`` is for imports and a row under way."""
    until = part.until[step] - rest
    job = gpu_jobs.measure(step, cases, part.file.path, part.left(step), until, part.run_id)
    part.step(step, [job], 1, resume=True)


def test(part: Part) -> None:
    if part.missing(["pytest"], "no test can run"):
        return part.note("tests", "FAILED", 0, "pytest is not installed")
    part.missing(["hypothesis"], "its property tests are skipped, and counted as skipped")
    for group, workers in (
        ("cuda", min(8, part.place.cores)),
        ("triton", min(14, part.place.cores)),
    ):
        step = f"{group} tests"
        if step not in part.steps:
            continue
        if group == "triton":
            part.place.say(gpu_jobs.estimate(part.place.results, workers))
        part.step(
            step,
            gpu_jobs.tests(group, workers, part.file.path, part.left(step)),
            workers,
            resume=True,
        )
        if not any(
            row.get("group") == group and row.get("state") != "skipped" for row in part.results()
        ):
            part.note(step, "FAILED", 0, "no test ran, or all were skipped")
        gpu_jobs.junit(
            part.file.path, group, part.place.results / f"{part.place.date}-test-{group}.xml"
        )


def sanitize(part: Part) -> None:
    sanitizer = part.place.tool("compute-sanitizer") or gpu_jobs.beside_nvcc(
        "compute-sanitizer", part.place.tool("nvcc")
    )
    if not sanitizer:
        return part.note(
            "sanitize", "FAILED", 0, "compute-sanitizer is neither on PATH nor beside nvcc"
        )
    tools = SANITIZED_FIRST if part.first else gpu_jobs.TOOLS
    no_triton = part.place.missing("triton")
    jobs = gpu_jobs.sanitize(sanitizer, no_triton, operators=part.operators, tools=tools)
    have = {row["key"] for row in part.results() if row.get("state") != "not reached"}
    jobs = [job for job in jobs if job.name not in have]
    part.file.write({"planned": [job.name for job in jobs]})
    log = part._log

    def judge(outcome: Outcome) -> None:
        log(outcome)
        part.file.write(gpu_jobs.sanitized(outcome))

    part._log = judge  # type: ignore[method-assign]
    part.step("sanitize", jobs, min(12, part.place.cores))


PARTS: dict[str, Callable[[Part], None]] = {
    "build": build,
    "rates": rates,
    "smoke": smoke,
    "bench": bench,
    "kernels": kernels,
    "calls": calls,
    "test": test,
    "sanitize": sanitize,
}


def main(verb: str, place: Place, operators: Sequence[str] = gpu_jobs.OPERATORS) -> int:
    """Runs a verb; 0 if nothing failed. The sanitizer watches ``operators``."""
    began = place.clock() - FACTS
    place.results.mkdir(parents=True, exist_ok=True)
    where = f"{place.device}, sm_{place.capability.replace('.', '')}, {place.cores} cores"
    place.say(f"gpu_check {verb} on {where}; writing to {place.results}")
    ended = {}
    start = began + FACTS
    for name, steps in limits(verb).items():
        part = Part(place, verb, name, start, steps, operators)
        part.begin()
        PARTS[name](part)
        part.place.say("\n" + show.tables(part.file.path)[-6000:])
        failed = part.failed or any("failed" in row for row in part.results())
        ended[name] = "NOT passed" if failed else "passed"
        place.say(f"{name}: {ended[name]}")
        start += sum(steps.values())
    passed = set(ended.values()) == {"passed"}
    each = "; ".join(f"{name} {state}" for name, state in ended.items())
    place.say(
        f"{'all passed' if passed else f'NOT passed: {each}'}, {place.clock() - began:.0f} s; see "
        f"{place.results}"
    )
    return int(not passed)


def facts() -> tuple[str, str]:
    """Return name and capability of the first GPU as the driver's own tool tells them."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(
            query, capture_output=True, text=True, check=True, timeout=FACTS
        ).stdout
        name, capability = told.splitlines()[0].rsplit(",", 1)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        sys.exit(f"gpu_check.sh needs an NVIDIA GPU, and nvidia-smi shows none: {error}")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), capability.strip()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    arguments.add_argument("verb", choices=VERBS)
    arguments.add_argument(
        "operators",
        nargs="*",
        help="what changed, for first and sanitize: the sanitizer watches it",
    )
    given = arguments.parse_args()
    if unknown := set(given.operators) - set(gpu_jobs.OPERATORS):
        arguments.error(f"{sorted(unknown)} is no operator; expected {list(gpu_jobs.OPERATORS)}")
    if given.operators and given.verb not in ("first", "sanitize"):
        arguments.error(f"{given.verb} takes no operators, first and sanitize do")
    signal.signal(
        signal.SIGHUP, signal.SIG_IGN
    )  # the remote shell is gone; the verb ends by itself
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # through the finally of supervise.py, which ends the workers
    device, capability = facts()
    results = Path(os.environ.get("RESULTS") or ROOT / "benchmarks" / "results" / device)
    place = Place(device, capability, results, ROOT / "build" / "gpu")
    place.run_id = os.environ.get("RUN") or place.run_id
    raise SystemExit(main(given.verb, place, given.operators or gpu_jobs.OPERATORS))
