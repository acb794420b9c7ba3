"""The CPU rows as pytest-benchmark tests.

Forward and backward of every implementation of every case:

    pytest benchmarks --benchmark-only -k "pacl and not chunks"
    pytest benchmarks --benchmark-only --benchmark-autosave        then, after a change:
    pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=median:10%
"""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

from . import registry
from .contrastive_baselines import CannotRun
from .run import step

ROWS = [(case, name) for case in registry.CASES for name in registry.implementations(case)]


@functools.lru_cache(maxsize=1)
def tensors(index: int):
    """Return the inputs of one case at a time: the largest take GiB."""
    return registry.inputs(registry.CASES[index])


@pytest.mark.parametrize(
    "case,name", ROWS, ids=[f"{case.op}-{case.name}-{name}" for case, name in ROWS]
)
def test_step(case, name, benchmark):
    """Time one step of one implementation."""
    benchmark.group = f"{case.op} {case.name}"
    benchmark.extra_info.update(
        op=case.op, case=case.name, implementation=name, shape=case.shape, options=case.options
    )
    function, given = registry.implementations(case)[name], tensors(registry.CASES.index(case))
    try:
        benchmark.pedantic(step, args=(function, given), rounds=5, warmup_rounds=1)
    except CannotRun as reason:
        pytest.skip(str(reason))
