"""Compiles every Triton kernel, as the launchers call it, for real GPUs on a machine without one;
prints JSON lines.

    python tests/packaging/triton_gate.py 80 90 120             # what the tests ask for
    python tests/packaging/triton_gate.py 90 --only patch_text  # the cases of one operator
    python tests/packaging/triton_gate.py 90 --counts benchmarks/gpu_counts.json
    python tests/packaging/triton_gate.py --shapes              # programs of every launch

A script and not a test: the interpreter, which the tests switch on, replaces the kernels when they
are defined. The launchers run on CPU tensors; in place of a launch, the kernel is compiled for the
target as Triton would compile it for these arguments. With ``--shapes`` they run on tensors without
numbers, of the sizes at which the operators are judged, and nothing is compiled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import pkgutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import compiled_code
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import ovseg_kernels.triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Bytes of shared memory that a program may have: sm_80 code serves 8.6 and 8.9, which have less.
SHARED = {80: 99 << 10, 90: 227 << 10, 120: 99 << 10}
SMS = 132  # of an H100 and of an H200
FULL = 90  # compiles everything
FORMS = 2  # of a kernel that the other targets compile, the hot ones first
seen: set[str] = set()
forms: Counter[tuple[int, str]] = Counter()


class Case(NamedTuple):
    """A call of a launcher."""

    label: str
    hot: bool  # in the dtype that the operator is used in
    launch: Callable
    arguments: tuple


def specialised(
    kernel: JITFunction, target: GPUTarget, args: tuple, kwargs: dict
) -> tuple[ASTSource, dict]:
    """What Triton would compile for these arguments: their types, ones, and what is divisible by
    16.
    """
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    return ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=attributes
    ), options.__dict__


def seconds() -> float:
    """Of this process and of those it started: ptxas takes its share of a compilation."""
    return sum(os.times()[:4])


def facts(compiled) -> dict:
    """What the tests ask of a compiled kernel."""
    ttgir, ptx, cubin = (compiled.asm[name] for name in ("ttgir", "ptx", "cubin"))
    loops = compiled_code.product_loops(ttgir)
    return {
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "tensor_core": compiled_code.tensor_core(ptx),
        "wgmma": compiled_code.wgmma(ptx),
        "tma": compiled_code.bulk_copies(ptx),
        "tf32": "tf32" in ptx,
        "global_int64": any(name in ptx for name in ("mul.wide", "mul.lo.s64", "mad.lo.s64")),
        "loads": compiled_code.global_loads(ptx),
        "copies": compiled_code.asynchronous_copies(ptx),
        "stages": [loop["stages"] for loop in loops if loop["inner"]],
        "loops": loops,
        "size": compiled_code.code_size(cubin),
        **compiled_code.resources(cubin, CUOBJDUMP),
    }


class Compiler:
    """Stands in for Triton's launch: compiles for one target, and prints what came of it."""

    def __init__(self, arch: int, only: str):
        self.arch = arch
        self.only = only
        self.counts: list[dict] | None = None  # of the kernels in their hot dtypes, if asked for
        self.case = Case("", True, print, ())

    def __call__(self, kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        if self.only not in kernel.__name__:
            return
        target = GPUTarget("cuda", self.arch, 32)
        src, options = specialised(kernel, target, args, kwargs)
        key = f"{self.arch} {kernel.__name__} {src.signature} {src.constants} {src.attrs} {options}"
        form = self.arch, kernel.__name__
        if key in seen or (self.arch != FULL and forms[form] == FORMS):
            return
        seen.add(key)
        forms[form] += 1
        began = seconds()
        compiled = triton.compile(src, target=target, options=options)
        row = {"kernel": kernel.__name__, "case": self.case.label, "arch": self.arch}
        row |= facts(compiled)
        if self.counts is not None and self.case.hot:
            self.counts.append(self.counted(row, compiled))
        print(json.dumps({**row, "seconds": round(seconds() - began, 2)}), flush=True)

    def counted(self, row: dict, compiled) -> dict:
        """What benchmarks/gpu_model.py reads of a kernel: instructions by the loops of its code."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            (sass,) = compiled_code.machine_code(file.name, CUOBJDUMP).values()
        kept = ("kernel", "case", "arch", "warps", "registers", "shared", "size")
        return {name: row[name] for name in kept} | compiled_code.counts(sass)


class Notebook:
    """Stands in for Triton's launch: prints how many programs it would start."""

    def __init__(self) -> None:
        self.case = Case("", True, print, ())

    def __call__(self, kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        row = {"kernel": kernel.__name__, "case": self.case.label, "programs": math.prod(grid)}
        print(json.dumps(row), flush=True)


def device_has(arch: int) -> None:
    """Lets every launcher see a device of this capability."""
    known = {"capability": arch, "shared_memory": SHARED[arch], "multiprocessors": SMS}
    for module in pkgutil.iter_modules(ovseg_kernels.triton.__path__):
        launcher = importlib.import_module(f"ovseg_kernels.triton.{module.name}")
        for name, value in known.items():
            if hasattr(launcher, name):
                setattr(launcher, name, lambda _, value=value: value)


def in_place_of_launches(stand_in: Compiler | Notebook) -> None:
    """Lets Triton call ``stand_in`` with the kernel, its arguments and its grid."""
    JITFunction.run = lambda kernel, *args, **kwargs: stand_in(kernel, *args, **kwargs)


def patch_text(dtype, pool, weight, masked, N=196):
    from ovseg_kernels.triton import patch_text_similarity as op

    B, T, D = 2, 128, 512
    patches, texts = torch.randn(B, N, D).to(dtype), torch.randn(T, D).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    mask = torch.ones(B, N, dtype=torch.bool) if masked else None
    shared = (patches, texts, mask, torch.ones((), dtype=acc), torch.ones((), dtype=acc))
    saved = op.forward(*shared, pool, weight, False)
    op.backward(torch.ones(B, T, dtype=acc), *shared, *saved, pool, weight, False, True, True)


def patch_text_at(B, N, D):
    from ovseg_kernels.triton import patch_text_similarity as op

    patches = torch.empty(B, N, D, dtype=torch.bfloat16, device="meta")
    texts = torch.empty(B, D, dtype=torch.bfloat16, device="meta")
    number = torch.empty((), device="meta")
    shared = (patches, texts, None, number, number)
    saved = op.forward(*shared, 0, 0, False)
    grad = torch.empty(B, B, device="meta")
    op.backward(grad, *shared, *saved, 0, 0, False, True, True)


def contrastive(dtype, positives):
    from ovseg_kernels.triton import similarity_contrastive_loss as op

    B, T = positives.shape
    similarity, scale = torch.randn(B, T, dtype=dtype), torch.ones((), dtype=dtype)
    optional = (None, None, torch.ones(B, T, dtype=torch.bool), positives)
    rows, columns = op.stats(similarity, scale, *optional, 0)
    op.backward(
        scale,
        similarity,
        scale,
        *optional,
        rows,
        columns,
        torch.ones(B, dtype=dtype),
        torch.ones(T, dtype=dtype),
        0,
    )


def assignment(dtype, hard, noise, masked):
    from ovseg_kernels.triton import center_assignment as op

    B, G, L, D = 2, 8, 196, 768
    queries, keys, values = (
        torch.randn(B, G, D).to(dtype),
        torch.randn(B, L, D).to(dtype),
        torch.randn(B, L, D).to(dtype),
    )
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    extras = (torch.zeros(B, G, dtype=acc), torch.ones(B, L, dtype=acc)) if masked else (None, None)
    optional = (
        *extras,
        torch.ones(B, L, dtype=torch.bool) if masked else None,
        torch.zeros(B, G, L, dtype=acc) if noise == "given" else None,
        torch.zeros(2, dtype=torch.int64) if noise == "rng" else None,
    )
    soft = noise == "given"
    saved = op.forward(queries, keys, values, *optional, 0.1, 0.9, hard, 0 if hard else 1, soft)
    grad_soft = torch.zeros(B, G, L, dtype=acc) if soft else None
    upstream = (
        torch.zeros(B, G, D, dtype=acc),
        torch.zeros(B, G, dtype=acc) if masked else None,
        grad_soft,
    )
    inputs = (*upstream, queries, keys, values, *optional, *saved[:3])
    op.backward(*inputs, 0.1, 0.9, hard, 1, True, True, True, False)
    op.backward(*inputs, 0.1, 0.9, hard, 1, True, True, False, True)


def inverse_std(dtype):
    from ovseg_kernels.triton import segclip_center_assignment as op

    tokens = torch.randn(2, 196, 768).to(dtype)
    weight = torch.randn(768, 16 if dtype == torch.float64 else 64).to(dtype)
    found = op.forward(tokens, weight, 1e-5)
    op.backward(found, tokens, weight, found)


def features_loss(dtype, sigmoid, positives):
    from ovseg_kernels.triton import contrastive_loss as op

    B, D = 256, 512
    acc = torch.float32 if dtype.itemsize == 2 else dtype
    one = torch.ones((), dtype=acc)
    for tf32 in (False, True) if dtype == torch.float32 else (False,):
        inputs = (torch.randn(B, D).to(dtype), torch.randn(B, D).to(dtype), one, one)
        listed = torch.arange(2 * B + 1), torch.arange(2 * B + 1), torch.ones(2, B, dtype=acc)
        inputs += {
            "": (None, None, None),
            "ids": (torch.arange(B), torch.arange(B), None),
            "list": listed,
        }[positives]
        options = (0, sigmoid, tf32, dtype.itemsize == 2)
        rows, columns = op.stats(*inputs, *options)
        op.backward(one, *inputs, rows, columns, rows[0], columns[0], *options, True, True)


def features_loss_at(B, D):
    from ovseg_kernels.triton import contrastive_loss as op

    features = torch.empty(B, D, dtype=torch.bfloat16, device="meta")
    one = torch.empty((), device="meta")
    inputs = (features, features, one, one, None, None, None)
    options = (0, False, False, True)
    rows, columns = op.stats(*inputs, *options)
    op.backward(one, *inputs, rows, columns, rows[0], columns[0], *options, True, True)


def dense(dtype, sampling, ids):
    from ovseg_kernels.triton import dense_contrastive_loss as op

    B, N, D = 32, 784, 512
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    pixels, texts = torch.randn(B, N, D).to(dtype), torch.randn(B, D, dtype=acc)
    optional = (torch.arange(B), torch.arange(B)) if ids else (None, None)
    op.select(
        pixels, texts, *optional, torch.zeros(2, dtype=torch.int64), 32, 64, 0, sampling, 0.1, 0.1
    )
    index = torch.zeros(B, 96, dtype=torch.int64)
    similarity, unit = op.gather(pixels, texts, index, 32)
    op.backward(similarity, unit, pixels, texts, index, index.flatten(), 32, True, True)


def philox():
    from ovseg_kernels.triton.philox import philox_kernel

    out = torch.empty(256, dtype=torch.int64), torch.empty(256), torch.empty(256)
    philox_kernel[(2,)](torch.zeros(2, dtype=torch.int64), *out, 256, BLOCK=128)


def dtypes(*names: str) -> Iterator[tuple[str, torch.dtype, bool]]:
    """Names, dtypes, and whether it is the first, which is the one that the operator is used in."""
    for name in names:
        yield name, getattr(torch, name), name == names[0]


def cases() -> Iterator[Case]:
    """Every form of every kernel; float16 compiles as bfloat16 does, and float64 is for checking:
    one form of each proves that they do.
    """
    for name, dtype, hot in dtypes("bfloat16", "float16", "float32", "float64"):
        for pool, weight, masked in (
            (0, 0, False),
            (0, 1, True),
            (1, 0, True),
            (1, 1, False),
            (2, 0, True),
        ):
            if name in ("bfloat16", "float32") or (pool, weight) == (0, 0):
                label = f"{name} pool {pool} weight {weight}{' masked' if masked else ''}"
                yield Case(label, hot, patch_text, (dtype, pool, weight, masked))
    true = torch.ones(256, 512, dtype=torch.bool)
    for name, dtype, hot in dtypes("float32", "float64"):
        for kind, positives in (
            ("pairs", true),
            ("pairs across", true.T.contiguous().T),
            ("weighted pairs", true.to(dtype)),
        ):
            yield Case(f"{name} {kind}", hot, contrastive, (dtype, positives))
    for name, dtype, hot in dtypes("bfloat16", "float32", "float64"):
        for hard, noise, masked in ((True, "rng", False), (False, "given", True)):
            if name != "float64" or hard:
                label = f"{name} assignment, noise {noise}{' masked' if masked else ''}"
                yield Case(label, hot, assignment, (dtype, hard, noise, masked))
        yield Case(f"{name} inverse standard deviation", hot, inverse_std, (dtype,))
    for name, dtype, hot in dtypes("bfloat16", "float16", "float32", "float64"):
        for sigmoid, positives in ((False, ""), (True, ""), (False, "list"), (True, "list")):
            kind = f"{' sigmoid' if sigmoid else ''}{positives and ' '}{positives}"
            yield Case(f"{name} contrastive{kind}", hot, features_loss, (dtype, sigmoid, positives))
    for name, dtype, hot in dtypes("bfloat16", "float32", "float64"):
        for sampling, ids in ((0, False), (1, True), (2, False), (3, False)):
            if name != "float64" or sampling == 0:
                label = f"{name} dense, sampling {sampling}{' ids' if ids else ''}"
                yield Case(label, hot, dense, (dtype, sampling, ids))
    yield Case("philox", True, philox, ())


def stated_shapes() -> Iterator[Case]:
    """The sizes at which the product operators are judged."""
    yield Case("contrastive_loss 32768 x 512", True, features_loss_at, (32768, 512))
    yield Case("patch_text_similarity 4096 x 196 x 512", True, patch_text_at, (4096, 196, 512))


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("targets", type=int, nargs="*", default=[80, 90, 120])
    options.add_argument("--only", default="", help="kernels whose name holds this")
    options.add_argument("--counts", help="a file for the instructions of hot kernels: slower")
    options.add_argument("--shapes", action="store_true", help="programs at the stated shapes")
    asked = options.parse_args()
    if asked.shapes:
        device_has(FULL)
        in_place_of_launches(notebook := Notebook())
        for case in stated_shapes():
            notebook.case = case
            case.launch(*case.arguments)
        return
    for arch in asked.targets:
        device_has(arch)
        in_place_of_launches(compiler := Compiler(arch, asked.only))
        compiler.counts = [] if asked.counts else None
        for case in cases():
            checking = case.label.startswith(("float16", "float64"))
            if case.hot or not (asked.counts or (checking and arch != FULL)):
                compiler.case = case
                case.launch(*case.arguments)
        if compiler.counts is not None:
            compiled_code.write_counts(Path(asked.counts), compiler.counts)


if __name__ == "__main__":
    main()
