"""Shared by all tests: a fixed seed, few threads, no network."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "ops"))  # unreadable.py, for tests in other folders too
sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))  # emulation.py likewise
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: threads of two workers on two cores wait for each other a third of the time
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks for a download fails at once

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the first kernel is defined


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name != "packaging")  # long builds: not last
    missing = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(missing)
