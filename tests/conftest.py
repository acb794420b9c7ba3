"""Shared by all tests: a fixed seed, few threads, no network."""

import logging
import os
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent / "ops")
)  # unreadable.py, for tests in other folders too
sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))  # emulation.py likewise
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # before torch: threads of two workers on two cores wait for each other a third of the time
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks for a download fails at once

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the first kernel is defined


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_is_left_as_it_was():
    """A level or handler that a test, or a fixture of its module, leaves at the log of the package
    is seen by all later tests.
    """
    log = logging.getLogger("ovseg")
    yield
    left = log.level, list(log.handlers), log.propagate
    log.setLevel(logging.NOTSET)
    log.handlers.clear()
    log.propagate = True
    assert left == (logging.NOTSET, [], True), (
        "level, handlers and propagation of the log 'ovseg' after the test"
    )


def pytest_addoption(parser):
    parser.addoption(
        "--every-gpu-case",
        action="store_true",
        help="keep what needs a GPU as it is where there is none, for a program that runs it in "
        "another way",
    )


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config, items):
    """Where torch sees no GPU one item of each test that needs one stays, and says how many it
    stands for.
    """
    items.sort(key=lambda item: item.path.parent.name != "packaging")  # long builds: not last
    if torch.cuda.is_available() or config.getoption("every_gpu_case"):
        return
    cases = defaultdict(list)
    for item in items:
        if "gpu" in item.keywords:
            cases[item.nodeid.partition("[")[0]].append(item)
    others = {id(item) for same in cases.values() for item in same[1:]}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in others])
    items[:] = [item for item in items if id(item) not in others]
    for first, *rest in cases.values():
        count = f"{1 + len(rest)} case{'s' * bool(rest)}"
        first.add_marker(
            pytest.mark.skip(reason=f"needs an NVIDIA GPU, and torch sees none: {count}")
        )
