"""The process of a command: its threads, decided before torch is imported, and how it ends.

OpenMP's threads wait for their next piece of work by spinning. Where another process wants the same
cores, the one that works waits for the one that spins, and two threads are several times slower
than one. Sleeping threads cost next to nothing on a quiet machine. The figures are in
docs/benchmarks.md.

Signals, and a reader of stdout that has left, change the exit code and leave no traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from pathlib import Path
from typing import NoReturn

from .. import stop_signals

INTERRUPTED = 130  # Ctrl-C
STOPPED = 143  # a signal, once the state is saved
NO_READER = 141  # as a program that SIGPIPE ends
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_CGROUPS = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


def set_up() -> None:
    """Set how threads wait and how many there are, for this process and its children.

    That is OMP_WAIT_POLICY and OMP_NUM_THREADS, each unless the user has set it. Nothing is done
    once torch is imported: it has read them, and the process is not the command line's own.
    """
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if not any(name in os.environ for name in _COUNTS):
        os.environ["OMP_NUM_THREADS"] = str(granted_cores())


def granted_cores() -> int:
    """Return how many cores this process may keep busy, at least 1.

    Those of its affinity, hyperthreads of one core counted once as torch does, and no more than the
    container's quota.
    """
    everyone = range(os.cpu_count() or 1)
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else everyone
    cores = len({_siblings(cpu) for cpu in cpus})
    quota = cpu_quota(_own_groups(), _CGROUPS)
    return max(1, cores if quota is None else min(cores, int(quota)))


def _siblings(cpu: int) -> str:
    """Return the hyperthreads of a core, its ``cpu`` alone where the system does not say."""
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _own_groups() -> str:
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:  # no Linux
        return ""


def cpu_quota(groups: str, root: Path) -> float | None:
    """Return how many processors' time the control groups grant; None for no limit.

    It is the smallest of all levels.

    Args:
        groups: the text of /proc/self/cgroup: "0::/path" of version 2, "4:cpu,cpuacct:/path" of
            version 1.
        root: where the groups are mounted.
    """
    found = []
    for line in groups.splitlines():
        _, kinds, path = line.split(":", 2)
        if not kinds:
            tops = [root, root / "unified"]
        elif "cpu" in kinds.split(","):
            tops = [root / kinds, root / "cpu"]
        else:
            continue
        # Inside a container its own group is often the mounted root, whatever the path says.
        inner = Path(path.strip("/"))
        found += [_quota(top / part) for top in tops for part in (inner, *inner.parents)]
    return min((quota for quota in found if quota is not None), default=None)


def _quota(group: Path) -> float | None:
    """Return the quota of one group.

    cpu.max holds "150000 100000" or "max 100000"; version 1 has a file for each.
    """
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        share = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None
    return share if share > 0 else None  # -1 is no limit


def program() -> NoReturn:
    """Run the command line as a process: ``ovseg`` and ``python -m ovseg``."""
    training = sys.argv[1:2] == ["train"]
    # From the start, as whoever sends a signal does not know how far the run is.
    with stop_signals.noted() if training else contextlib.nullcontext():
        try:
            from .main import main

            code: str | int | None = main()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except SystemExit as ended:  # argparse, after --help or a mistake
            code = ended.code
    if reader_left():
        code = NO_READER
    if training or code in (INTERRUPTED, STOPPED):
        stop_signals.ignore()
    sys.exit(code)


def say(text: str) -> None:
    """Print a line on stderr; where the terminal is closed, the command ends as if it were not."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def reader_left(*, failed: bool = False) -> bool:
    """Return whether a program that read stdout or stderr has ended.

    What leads to it, or to a closed terminal, leads nowhere from then on: Python flushes once more
    at its end.

    Args:
        failed: whether something could not be written already; Python has then forgotten it, and
            no flush fails again.
    """
    left = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            if failed and _unread(stream.fileno()):
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a full disk is said by Python itself
                continue
            left |= error.errno == errno.EPIPE
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        except (ValueError, AttributeError):  # closed, or none at all
            continue
    return left


def _unread(descriptor: int) -> bool:
    """Return whether nobody can read any more what is written there."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are told unasked
    return any(event & select.POLLERR for _, event in poll.poll(0))
