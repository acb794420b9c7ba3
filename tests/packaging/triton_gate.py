"""Compiles every Triton kernel, as the launchers call it, for real GPUs on a machine without one;
prints JSON lines.

A script and not a test: the interpreter, which the tests switch on, replaces the kernels when they
are defined. The launchers run on CPU tensors; in place of a launch, the kernel is compiled for each
target as Triton would compile it for these arguments.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = [int(x) for x in sys.argv[1:]] or [80, 90]
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
seen: set[str] = set()
label = ""


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


def measure(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [BIN / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack)}


def memory(ttgir: str, ptx: str) -> dict:
    """Global loads by the bytes of one, asynchronous copies by theirs, and the stages of every loop
    that holds a product.
    """
    loads, copies = Counter(), Counter()
    for vector, bits in re.findall(r"ld\.global(?:\.(?!v\d)\w+)*?(?:\.v(\d))?\.[bfsu](\d+)", ptx):
        loads[int(vector or 1) * int(bits) // 8] += 1
    for size in re.findall(
        r"cp\.async\.c[ag]\.shared\.global[^;]*?\], \[[^;]*?\], (0x[0-9a-f]+|\d+)", ptx
    ):
        copies[int(size, 0)] += 1
    return {"loads": loads, "copies": copies, "stages": stages(ttgir)}


def stages(ttgir: str) -> list[int]:
    """1 + the iterations whose copies are started before the loop; 1 where a product waits for
    loads of its own iteration.
    """
    found, loops, depth, before = [], [], 0, 0
    for line in ttgir.splitlines():
        if "scf.for" in line:
            loops.append({"depth": depth, "before": before, "copies": 0, "products": 0})
            before = 0
        depth += line.count("{") - line.count("}")
        if "ttg.async_copy_global_to_local" in line:
            before += 1
            if loops:
                loops[-1]["copies"] += 1
        if loops and ("tt.dot " in line or "warp_group_dot " in line):
            loops[-1]["products"] += 1
        if loops and depth <= loops[-1]["depth"]:
            loop = loops.pop()
            if loop["products"]:
                found.append(1 + loop["before"] // loop["copies"] if loop["copies"] else 1)
            before = 0
    return found


def seconds() -> float:
    """Of this process and of those it started: ptxas takes its share of a compilation."""
    return sum(os.times()[:4])


def compile_instead(kernel, *args, grid, warmup, **kwargs):
    for arch in TARGETS:
        # float16 compiles as bfloat16 does: one operator, for the newer chip. float64 is for
        # checking: for that one too.
        if arch != TARGETS[-1] and label.startswith(("float16", "float64")):
            continue
        target = GPUTarget("cuda", arch, 32)
        src, options = specialised(kernel, target, args, kwargs)
        key = f"{arch} {kernel.__name__} {src.signature} {src.constants} {src.attrs} {options}"
        if key in seen:
            continue
        seen.add(key)
        began = seconds()
        compiled = triton.compile(src, target=target, options=options)
        ptx = compiled.asm["ptx"]
        print(
            json.dumps(
                {
                    "kernel": kernel.__name__,
                    "case": label,
                    "arch": arch,
                    "shared": compiled.metadata.shared,
                    "tensor_core": "wgmma"
                    if "wgmma" in ptx
                    else "mma"
                    if "mma.sync" in ptx
                    else "",
                    "tf32": "tf32" in ptx,
                    "global_int64": "mul.wide" in ptx or "mul.lo.s64" in ptx or "mad.lo.s64" in ptx,
                    **memory(compiled.asm["ttgir"], ptx),
                    **measure(compiled.asm["cubin"]),
                    "seconds": round(seconds() - began, 2),
                }
            ),
            flush=True,
        )


def patch_text(dtype, pool, weight, masked, N=196):
    from ovseg_kernels.triton import patch_text_similarity as op

    B, T, D = 2, 128, 512
    patches, texts = torch.randn(B, N, D).to(dtype), torch.randn(T, D).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    mask = torch.ones(B, N, dtype=torch.bool) if masked else None
    shared = (patches, texts, mask, torch.ones((), dtype=acc), torch.ones((), dtype=acc))
    saved = op.forward(*shared, pool, weight, False)
    op.backward(torch.ones(B, T, dtype=acc), *shared, *saved, pool, weight, False, True, True)


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

    B, D, one = 256, 512, torch.ones((), dtype=dtype)
    for tf32 in (False, True) if dtype == torch.float32 else (False,):
        inputs = (torch.randn(B, D, dtype=dtype), torch.randn(B, D, dtype=dtype), one, one)
        listed = torch.arange(2 * B + 1), torch.arange(2 * B + 1), torch.ones(2, B, dtype=dtype)
        inputs += {
            "": (None, None, None),
            "ids": (torch.arange(B), torch.arange(B), None),
            "list": listed,
        }[positives]
        rows, columns = op.stats(*inputs, 0, sigmoid, tf32)
        op.backward(one, *inputs, rows, columns, rows[0], columns[0], 0, sigmoid, tf32, True, True)


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


def upsampling(dtype, whole):
    from ovseg_kernels.triton import upsample_argmax as op

    logits, table = torch.randn(1, 150, 32, 32, dtype=dtype), torch.arange(150)
    bias = logits[0, :, 0, 0].contiguous()
    op.forward(
        logits,
        *(
            (bias, table, 512, 512, 0.5, 255, 2, True)
            if whole
            else (None, None, 512, 512, None, 255, 0, False)
        ),
    )


def window_labels(dtype, activation, stage, tables):
    from ovseg_kernels.triton import window_argmax as op

    values, origins = (
        torch.randn(*((2, 8, 171) if tables else (2, 171, 32, 32)), dtype=dtype),
        torch.zeros(2, 2, dtype=torch.int64),
    )
    index, bias = (
        torch.zeros(2, 512, 512, dtype=torch.int16) if tables else None,
        torch.zeros(171, dtype=dtype),
    )
    some = (bias, torch.arange(171)) if stage == 1 else (None, None)
    op.forward(
        values,
        index,
        origins,
        *some,
        512,
        512,
        512,
        683,
        480,
        640,
        activation,
        stage,
        0.5 if stage else None,
        255,
        2,
        stage == 1,
    )


def mask_loss(dtype, gamma):
    from ovseg_kernels.triton import upsample_mask_loss as op

    logits, codes = (
        torch.randn(2, 156, 32, 32, dtype=dtype),
        torch.zeros(2, 512, 512, dtype=torch.int32),
    )
    _, dice, _, sums = op.forward(logits, codes, 0.25, gamma)
    op.backward(dice, dice, logits, codes, sums, 0.25, gamma)


def philox():
    from ovseg_kernels.triton.philox import philox_kernel

    out = torch.empty(256, dtype=torch.int64), torch.empty(256), torch.empty(256)
    philox_kernel[(2,)](torch.zeros(2, dtype=torch.int64), *out, 256, BLOCK=128)


def main() -> None:
    global label
    JITFunction.run = compile_instead
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for pool, weight, masked in (
            (0, 0, False),
            (0, 1, True),
            (1, 0, True),
            (1, 1, False),
            (2, 0, True),
        ):
            if dtype in (torch.float16, torch.float64) and (pool, weight) != (0, 0):
                # one form proves that they compile, and that float16's products are on tensor cores
                continue
            label = f"{name} pool {pool} weight {weight}{' masked' if masked else ''}"
            patch_text(dtype, pool, weight, masked)
    true = torch.ones(256, 512, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        for name, positives in (
            ("pairs", true),
            ("pairs across", true.T.contiguous().T),
            ("weighted pairs", true.to(dtype)),
        ):
            label = f"{str(dtype).removeprefix('torch.')} {name}"
            contrastive(dtype, positives)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for hard, noise, masked in ((True, "rng", False), (False, "given", True))[
            : 1 if dtype == torch.float64 else 2
        ]:
            label = f"{str(dtype).removeprefix('torch.')} assignment, noise {noise}{' masked' if masked else ''}"
            assignment(dtype, hard, noise, masked)
        label = f"{str(dtype).removeprefix('torch.')} inverse standard deviation"
        inverse_std(dtype)
    for dtype in (torch.float32, torch.float64):
        for sigmoid, positives in ((False, ""), (True, "ids"), (False, "list"), (True, "list")):
            kind = f"{' sigmoid' if sigmoid else ''}{positives and ' '}{positives}"
            label = f"{str(dtype).removeprefix('torch.')} contrastive{kind}"
            features_loss(dtype, sigmoid, positives)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for sampling, ids in ((0, False), (1, True), (2, False), (3, False))[
            : 1 if dtype == torch.float64 else 4
        ]:
            label = f"{str(dtype).removeprefix('torch.')} dense, sampling {sampling}{' ids' if ids else ''}"
            dense(dtype, sampling, ids)
    for dtype in (torch.float32, torch.float64):
        for whole in (False, True):
            label = f"{str(dtype).removeprefix('torch.')} upsampling{' with all options' if whole else ''}"
            upsampling(dtype, whole)
    for dtype in (torch.float32, torch.float64):
        for activation, stage, tables in (
            (0, 0, True),
            (1, 0, False),
            (2, 0, False),
            (2, 1, True),
            (2, 2, False),
        ):
            label = f"{str(dtype).removeprefix('torch.')} windows, activation {activation} at {stage}{' tables' if tables else ''}"
            window_labels(dtype, activation, stage, tables)
        for gamma in (2.0, 1.5):
            label = f"{str(dtype).removeprefix('torch.')} mask loss, gamma {gamma}"
            mask_loss(dtype, gamma)
    label = "philox"
    philox()


if __name__ == "__main__":
    main()
