"""Nothing is missing: every operator has all its parts, under the names that the layout promises."""

import importlib
from pathlib import Path

import emulation
import pytest
import torch
from backends import has
from samples import MAKERS

import ovseg_kernels as ok
from ovseg_kernels import _library
from ovseg_kernels.triton import KERNELS as TRITON

BENCHMARKS = pytest.importorskip(
    "ovseg_benchmarks.registry"
)  # the distribution is installed, or this is a bare GPU check
CASES, GPU_CASES = BENCHMARKS.CASES, BENCHMARKS.GPU_CASES
ROOT = Path(__file__).parents[2]


def registered(schema: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ovseg::{schema}", key)


COMPOSED = set(_library.BUILT_ON)  # they have no kernel of their own, or none that they need

# Operators for which both are written, each good at something.
BOTH = {
    op: [name for name, owner in _library.OPERATOR_OF.items() if owner == op]
    for op in ("patch_text_similarity", "center_assignment", "dense_contrastive_loss")
}
FORWARD_ONLY = {"upsample_argmax", "window_argmax"}  # labels have no gradient


def missing(op: str) -> list[str]:
    """What the operator lacks."""
    found = []

    def want(what: str, there: bool) -> None:
        if not there:
            found.append(what)

    schemas = [name for name, owner in _library.OPERATOR_OF.items() if owner == op]
    want("schema", bool(schemas) or op in COMPOSED)
    want(
        "a backward schema",
        any(name.endswith("_backward") for name in schemas) or op in COMPOSED | FORWARD_ONLY,
    )
    emulation.load()
    for name in schemas:
        want(
            f"fake of {name}",
            torch._library.simple_registry.singleton.find(f"ovseg::{name}").fake_impl.kernel
            is not None,
        )
        want(f"autograd of {name}, be it one that refuses", registered(name, "Autograd"))
        if name in _library.COMPOSITES:
            continue
        want(f"closed form of {name}", name in _library.FALLBACKS)
        # What is composed may leave a pass to products of torch's own on the CPU.
        elsewhere = op in COMPOSED or name in _library.ON_GPUS
        want(f"CPU kernel of {name}", registered(name, "CPU") or elsewhere)
        want(
            f"CUDA kernel of {name}, or one of Triton",
            emulation.has_kernel(name) or name in TRITON,
        )
    for name, (module, function) in TRITON.items():
        if name in schemas:
            want(
                f"{function} in triton/{module}.py",
                hasattr(importlib.import_module(f"ovseg_kernels.triton.{module}"), function),
            )
    for name in BOTH.get(op, ()):
        want(f"CUDA kernel of {name}", emulation.has_kernel(name))
        want(f"Triton kernel of {name}", name in TRITON)
    for part in ("ops", "reference"):
        want(f"{part}/{op}.py", (ROOT / "ovseg_kernels" / part / f"{op}.py").exists())
    want(
        "a definition of its own name",
        hasattr(importlib.import_module(f"ovseg_kernels.reference.{op}"), op),
    )
    suffixes = () if op in COMPOSED else (".h", "_cpu.cpp", "_bind.cpp")
    if op not in COMPOSED and has(op, "cuda"):
        suffixes += ("_cuda.cu", "_bind_cuda.cpp")
    for suffix in suffixes:
        want(f"csrc/{op}/{op}{suffix}", (ROOT / "csrc" / op / f"{op}{suffix}").exists())
    want("a public function", callable(getattr(ok, op, None)))
    want("samples", op in MAKERS and bool(MAKERS[op]()))
    want("a test of its own", (ROOT / "tests" / "ops" / f"test_{op}.py").exists())
    want("a docs page", (ROOT / "docs" / "ops" / f"{op}.md").exists())
    want("a benchmark case", any(case.op == op for case in CASES))
    return found


@pytest.mark.parametrize("op", ok.OPERATORS)
def test_operator_is_complete(op):
    assert missing(op) == []


@pytest.mark.parametrize("op", ok.OPERATORS)
def test_benchmarks_for_a_gpu_know_the_operator(op):
    """What compute-sanitizer calls, scripts/gpu_small.py, does not import without one of them."""
    assert any(case.op == op for case in GPU_CASES)


def test_every_schema_belongs_to_a_public_operator():
    assert set(_library.OPERATOR_OF.values()) | COMPOSED == set(ok.OPERATORS)
    for name, owner in _library.OPERATOR_OF.items():
        assert owner not in COMPOSED or name in _library.COMPOSITES or name in TRITON, (
            f"{name} is no composite of torch calls: it needs kernels"
        )


def test_an_incomplete_operator_is_noticed(monkeypatch):
    """The check itself can fail."""
    monkeypatch.delitem(TRITON, "center_assignment_backward")
    monkeypatch.delitem(_library.FALLBACKS, "center_assignment_backward")
    assert missing("center_assignment") == [
        "closed form of center_assignment_backward",
        "Triton kernel of center_assignment_backward",
    ]
    monkeypatch.setattr(emulation, "has_kernel", lambda name: False)
    for name in ("similarity_contrastive_stats", "similarity_contrastive_loss_backward"):
        monkeypatch.delitem(TRITON, name)
    assert missing("similarity_contrastive_loss") == [
        "CUDA kernel of similarity_contrastive_stats, or one of Triton",
        "CUDA kernel of similarity_contrastive_loss_backward, or one of Triton",
    ]
