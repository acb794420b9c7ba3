"""Where the numeric tests run: every implementation, on the CPU by emulation or interpretation, on
a GPU where there is one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

import ovseg_kernels as ok
from ovseg_kernels import _library
from ovseg_kernels.triton import KERNELS as TRITON_KERNELS

ROOT = Path(__file__).parents[2]
GPU = ("cuda", "triton")
BACKENDS = ("reference", "cpu", "cuda-emulated", "triton-interpreted", *GPU)
# The interpreter's bfloat16 is wrong (it works on the bits as integers); on a GPU the same kernels
# are tested in it.
NO_BFLOAT16 = ("triton-interpreted",)
SLOW = ("triton-interpreted",)
# Compiled on first use, a second for every option and dtype: all options are tested in float32,
# other dtypes with a few of them. tests/packaging/triton_count.py counts, and
# tests/packaging/test_gpu_code.py holds the number.
COMPILED = ("triton",)


def has(op: str, name: str) -> bool:
    """Return whether the operator, or the one that it is built on, has a kernel there."""
    if name.startswith("triton"):
        return any(schema in TRITON_KERNELS for schema in _library.schemas_of(op))
    if name.startswith("cuda"):
        folder = _library.BUILT_ON.get(op, op)
        return (ROOT / "csrc" / folder / f"{folder}_cuda.cu").exists()
    return True


def parameters(names: tuple[str, ...] = BACKENDS, *, of: tuple[str, ...] | str = ()):
    """Return the names on which every operator of ``of`` has a kernel, as pytest parameters."""
    ops = (of,) if isinstance(of, str) else of
    return [
        pytest.param(name, marks=pytest.mark.gpu) if name in GPU else name
        for name in names
        if all(has(op, name) for op in ops)
    ]


def operators_on(ops: Iterable[str], names: tuple[str, ...] = BACKENDS):
    """Every operator on every one of the names where it has a kernel."""
    pairs = [
        pytest.param(op, name, marks=[pytest.mark.gpu] if name in GPU else [], id=f"{op}-{name}")
        for op in ops
        for name in names
        if has(op, name)
    ]
    return pytest.mark.parametrize("op,backend", pairs)


def device_of(name: str) -> str:
    return "cuda" if name in GPU else "cpu"


def dtypes(name: str) -> list[torch.dtype]:
    """What a numeric test runs in, with float64 as the truth."""
    found = [torch.float32, torch.float16, torch.bfloat16]
    return [
        d
        for d in found
        if not (d == torch.bfloat16 and name in NO_BFLOAT16)
        and not (d == torch.float16 and name in COMPILED)
    ]


def exact(name: str) -> list[torch.dtype]:
    """What a test runs in that is not about dtypes.

    On a GPU float64 is kept for the tests that cannot do without.
    """
    return [torch.float32] if name in GPU else [torch.float32, torch.float64]


@functools.cache
def patch_the_language_once_a_launch() -> None:
    """Triton's interpreter puts its own functions into ``triton.language`` at each launch, and again
    at each call of a device function inside, where all but the first find them there: that took
    two fifths of the time.
    """
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # a Triton that does it in another way
        return
    patched: set[str] = set()  # the modules of the language, for the launch under way

    @functools.cache
    def modules(function) -> frozenset[str]:
        seen = filter(inspect.ismodule, function.__globals__.values())
        return frozenset(x.__name__ for x in seen if x.__name__.startswith("triton.language"))

    def patch_once(function):
        if patched and modules(function) <= patched:
            return interpreter._LangPatchScope()
        scope, outermost = patch(function), not patched
        patched.update(modules(function))
        if outermost:
            restore = scope.restore

            def restore_and_forget():
                restore()
                patched.clear()

            scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_once


@contextlib.contextmanager
def running_on(name: str, seed: int = 0) -> Iterator[None]:
    """The named implementation answers inside; ``reference`` is the closed form that answers where
    no kernel is built.
    """
    if name == "reference":
        with _library.overriding(_library.FALLBACKS, ("CPU",)):
            yield
    elif name == "cuda-emulated":
        import emulation

        with emulation.emulated_cuda(seed):
            yield
    else:
        if name == "triton-interpreted":
            patch_the_language_once_a_launch()
        with ok.backend("triton" if name == "triton-interpreted" else name):
            yield
