"""Runs commands side by side, each with its own limit, and never waits for one that hangs.

A worker that dies, or that is silent for longer than ``stall`` seconds, is ended and started again;
it skips what the result file already holds. What it had begun is written down as failed, so that
one kernel that hangs costs its own row and no other. Needs nothing but Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from . import lines

GRACE = 3.0  # seconds between asking a process to end and killing it; part of every limit
AGAIN = 70  # of one whose GPU context is lost: its row is written, the others need a new process


@dataclass
class Job:
    """A command, and the most seconds it may take.

    ``resume``: started again after a death, while time is left.
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    resume: bool = False
    stall: float = float("inf")
    # Exit statuses of a command that came to its end, with or without failures.
    ended: tuple[int, ...] = (0, 1)


@dataclass
class Outcome:
    """The end of a job: exit status, or None if it was never started.

    And why it was ended, if it was.
    """

    name: str
    status: int | None
    seconds: float
    reason: str = ""
    output: str = ""


class _Running:
    def __init__(self, job: Job, limit: float, log: Path, now: float):
        self.job, self.began, self.until = job, now, now + limit - GRACE
        self.log, self.asked, self.reason = log, 0.0, ""
        self.output_began = log.stat().st_size if log.exists() else 0
        self.process = self._start()
        self.size, self.changed = self.output_began, now

    def _start(self) -> subprocess.Popen:
        with open(self.log, "ab") as file:
            return start(self.job.command, file, self.job.environment)

    def again(self, now: float) -> None:
        self.output_began = self.size = self.log.stat().st_size
        self.process, self.asked, self.reason, self.changed = self._start(), 0.0, "", now

    def silent(self, now: float) -> float:
        """Return the seconds since its output last grew.

        Before the first of it, while it imports, none.
        """
        if (size := self.log.stat().st_size) != self.size or size == self.output_began:
            self.size, self.changed = size, now
        return now - self.changed

    def end(self, reason: str, now: float) -> None:
        """Ask first; kill when asked GRACE seconds ago."""
        if not self.asked:
            self.asked, self.reason = now, reason
            stop(self.process, signal.SIGTERM)
        elif now - self.asked >= GRACE:
            stop(self.process, signal.SIGKILL)


def _die_with_parent() -> None:
    """End this worker, on Linux, when whoever supervises it is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def start(
    command: Sequence[str], output: IO[bytes], environment: dict[str, str]
) -> subprocess.Popen:
    """Start a command in a session of its own."""
    return subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_parent,
        env={**os.environ, **environment},
    )


def stop(process: subprocess.Popen, number: int) -> None:
    """Signal the whole session: compilers and workers that it started, too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def run(
    jobs: Sequence[Job],
    *,
    workers: int,
    until: float,
    logs: Path,
    results: lines.Lines | None = None,
    report: Callable[[Outcome], None] | None = None,
    tick: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Outcome]:
    """Run all jobs, at most ``workers`` at once, none beyond ``until`` on the clock.

    Args:
        jobs: started in this order.
        workers: how many at once.
        until: when the last must have ended.
        logs: folder for the output of each, a file a job.
        results: where a worker writes its rows; what it began and did not finish is written there
            as failed.
        report: called with each outcome at once.
        tick: called again and again while something runs.
        clock: the seconds that ``until`` is told in.
        sleep: waits for some seconds.

    Returns:
        The outcomes, in the order in which the jobs ended.
    """
    waiting, running, outcomes = list(jobs), list[_Running](), list[Outcome]()
    logs.mkdir(parents=True, exist_ok=True)

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if report:
            report(outcome)

    try:
        while waiting or running:
            now = clock()
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                limit = min(job.limit, until - now)
                if limit < 2 * GRACE:
                    done(Outcome(job.name, None, 0.0, "not reached: the time was spent"))
                else:
                    running.append(
                        _Running(job, limit, logs / f"{job.name.replace(' ', '-')}.log", now)
                    )
            for r in list(running):
                status = r.process.poll()
                if status is None and r.asked and now - r.asked > 2 * GRACE:
                    # It sits in the driver.
                    status, r.reason = (-signal.SIGKILL, f"{r.reason}, and cannot be killed")
                elif status is None:
                    if now >= r.until:
                        r.end(f"ended by its limit of {r.until + GRACE - r.began:.0f} s", now)
                    elif r.silent(now) > r.job.stall:
                        r.end(f"silent for {r.job.stall:.0f} s", now)
                    elif r.asked:
                        r.end(r.reason, now)
                    continue
                stop(r.process, signal.SIGKILL)  # what it left behind
                why = r.reason or ("" if status in r.job.ended else _cause(status))
                lost = settle(results, r.job.name, why) if why and results else 0
                # Without a row lost it died before it began one, and would again.
                if r.job.resume and (lost or status == AGAIN) and r.until - now > 3 * GRACE:
                    r.again(now)
                    continue
                running.remove(r)
                with open(r.log, "rb") as file:
                    file.seek(r.output_began)
                    output = file.read().decode(errors="replace")
                done(Outcome(r.job.name, status, round(now - r.began, 1), why, output))
            if tick:
                tick()
            if running:
                sleep(0.1)
    finally:
        for r in running:  # this process is being ended itself
            stop(r.process, signal.SIGKILL)
    return outcomes


def _cause(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}"


def settle(results: lines.Lines, worker: str, why: str) -> int:
    """Write down as failed what this worker began and did not finish; return how many that were."""
    lost = {
        key: row
        for key, row in lines.unfinished(lines.read(results.path)[0]).items()
        if row.get("worker") == worker
    }
    for key, row in lost.items():
        results.write(
            {
                **{k: v for k, v in row.items() if k != "started"},
                "key": key,
                "failed": f"did not come back: {why}",
            }
        )
    return len(lost)
