"""pytest plugin of scripts/gpu_check.sh: one JSON line a test, at once; shards; and going on after
a lost GPU context.

    PYTHONPATH=.:scripts OVSEG_LINES=FILE OVSEG_SHARD=0/14 python -m pytest -p gpu_pytest tests/ops
    -m gpu

A test that the file already holds is not run again. Needs no other plugin. Without hypothesis its
property tests are skipped, and the rest of their files runs.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import lines
from benchmarks.supervise import AGAIN

CHUNK = 4  # neighbours, which share compiled kernels, stay together
LOST = (
    "illegal memory access",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "CUDA error: an illegal",
)


class _Anything(types.ModuleType):
    """Stands for hypothesis.strategies: whatever is asked of it is itself."""

    def __getattr__(self, name: str):
        return self

    def __call__(self, *_, **__):
        return self


def stand_in_for_hypothesis() -> None:
    def given(*_, **__):
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(*_, **__):
        return lambda function: function

    module = types.ModuleType("hypothesis")
    anything = _Anything("hypothesis.strategies")
    for name, value in {
        "given": given,
        "settings": settings,
        "example": settings,
        "strategies": anything,
        "HealthCheck": anything,
        "assume": bool,
        "note": print,
        "__path__": [],
    }.items():
        setattr(module, name, value)
    sys.modules |= {"hypothesis": module, "hypothesis.strategies": anything}


if importlib.util.find_spec("hypothesis") is None:
    stand_in_for_hypothesis()


class Reporter:
    """Writes what pytest reports."""

    def __init__(self, path: str, shard: str, worker: str, group: str):
        self.index, self.count = map(int, shard.split("/"))
        self.file = lines.Lines(path, worker=worker, group=group)
        self.seconds, self.failed, self.state = 0.0, "", "passed"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        have = lines.finished(lines.read(self.file.path)[0])
        mine = [item for i, item in enumerate(items) if i // CHUNK % self.count == self.index]
        kept = [item for item in mine if item.nodeid not in have]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
        if len(kept) == len(mine):
            self.file.write({"planned": [item.nodeid for item in kept]})

    def pytest_collectreport(self, report):
        if report.failed:  # a file that does not import
            self.file.write(
                {
                    "key": f"collecting {report.nodeid}",
                    "state": "failed",
                    "failed": report.longreprtext.strip()[-500:],
                }
            )

    def pytest_sessionfinish(self, session, exitstatus):
        if (
            exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
        ):  # more shards than tests: that any ran at all, gpu_check.py holds
            session.exitstatus = pytest.ExitCode.OK

    def pytest_runtest_logstart(self, nodeid):
        self.seconds, self.failed, self.state = 0.0, "", "passed"
        self.file.start(nodeid)

    def pytest_runtest_logreport(self, report):
        self.seconds += report.duration
        if report.failed:
            text = report.longreprtext.splitlines()
            told = [line[1:].strip() for line in text if line.startswith("E ")]
            self.failed = self.failed or f"{report.when}: " + " / ".join(told or text[-3:])[:1000]
        elif report.skipped and not self.failed:
            self.state = "xfailed" if hasattr(report, "wasxfail") else "skipped"
        if report.when != "teardown":
            return
        row = {
            "key": report.nodeid,
            "seconds": round(self.seconds, 3),
            "state": "failed" if self.failed else self.state,
        }
        self.file.write(row | ({"failed": self.failed} if self.failed else {}))
        if any(
            word in self.failed for word in LOST
        ):  # every later test of this process would fail for it
            sys.stdout.flush()
            os._exit(AGAIN)


def pytest_configure(config):
    if path := os.environ.get("OVSEG_LINES"):
        worker = os.environ.get("OVSEG_WORKER", "pytest")
        config.pluginmanager.register(
            Reporter(
                path,
                os.environ.get("OVSEG_SHARD", "0/1"),
                worker,
                os.environ.get("OVSEG_GROUP", "tests"),
            ),
            "ovseg lines",
        )
