"""Triton's launchers on tensors that hold nothing: the grids of sizes that no test can run."""

import re

import pytest
import torch
from native_build import ROOT

pytest.importorskip("triton")
LIMITS = (2**31 - 1, 65535, 65535)  # programs along x, y and z
MANY = 5_000_000  # more than 65535 tiles of 64


def nothing(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def launches(monkeypatch):
    """[(kernel, grid)] in place of running anything."""
    from ovseg_kernels.triton.philox import philox_kernel

    found = []
    monkeypatch.setattr(
        type(philox_kernel),
        "run",
        lambda kernel, *_, grid, **__: found.append((kernel.fn.__name__, grid)),
    )
    return found


def patch_text(B, T, N, dtype=torch.float32, D=16):
    from ovseg_kernels.triton import patch_text_similarity as op

    shared = (
        nothing(B, N, D, dtype=dtype),
        nothing(T, D, dtype=dtype),
        nothing(B, N, dtype=torch.bool),
        nothing(),
        nothing(),
    )
    for pool in (0, 2):
        saved = op.forward(*shared, pool, 0, False)
        op.backward(nothing(B, T), *shared, *saved, pool, 0, False, True, True)


def matrix(B, T):
    from ovseg_kernels.triton import similarity_contrastive_loss as op

    inputs = (
        nothing(B, T),
        nothing(),
        nothing(B, dtype=torch.int64),
        nothing(T, dtype=torch.int64),
        nothing(B, T, dtype=torch.bool),
        None,
    )
    rows, columns = op.stats(*inputs, 0)
    op.backward(nothing(), *inputs, rows, columns, rows[0], columns[0], 0)


def features(B, T, listed, D=16):
    from ovseg_kernels.triton import contrastive_loss as op

    dtype, pairs = (torch.bfloat16, 5) if listed else (torch.float32, 0)
    more = 1 + pairs if listed else 0
    inputs = (
        nothing(B, D, dtype=dtype),
        nothing(T, D, dtype=dtype),
        nothing(),
        nothing(),
        nothing(B + more, dtype=torch.int64),
        nothing(T + more, dtype=torch.int64),
        nothing(2, pairs) if listed else None,
    )
    options = (0, False, False, listed)
    rows, columns = op.stats(*inputs, *options)
    op.backward(nothing(), *inputs, rows, columns, rows[0], columns[0], *options, True, True)


def assignment(B, L, D=16, G=8):
    from ovseg_kernels.triton import center_assignment as op

    inputs = (
        nothing(B, G, D),
        nothing(B, L, D),
        nothing(B, L, D),
        None,
        None,
        None,
        None,
        nothing(2, dtype=torch.int64),
    )
    pooled, index, count, _ = op.forward(*inputs, 0.1, 0.9, True, 0, False)
    op.backward(
        pooled,
        None,
        None,
        *inputs,
        pooled,
        index,
        count,
        0.1,
        0.9,
        True,
        0,
        True,
        True,
        True,
        False,
    )


def grouped(B, L, D=32, S=16):
    from ovseg_kernels.triton import segclip_center_assignment as op

    inputs = nothing(B, L, D), nothing(D, S)
    found = op.forward(*inputs, 1e-5)
    op.backward(found, *inputs, found)


def pixels(B, N, T, D=16):
    from ovseg_kernels.triton import dense_contrastive_loss as op

    inputs = nothing(B, N, D), nothing(T, D)
    ids = nothing(B, dtype=torch.int64), nothing(T, dtype=torch.int64)
    found = op.select(*inputs, *ids, nothing(2, dtype=torch.int64), 3, 4, 0, 2, 0.3, 0.1)
    index = torch.cat(found, 1)
    similarity, unit = op.gather(*inputs, index, 3)
    op.backward(
        similarity, unit, *inputs, index, nothing(index.numel(), dtype=torch.int64), 3, True, True
    )


SHAPES = {
    patch_text: [
        (70_000, 3, 5),
        (1, 3, MANY),
        (1, MANY, 3),
        (70_000, 3, 5, torch.float16),
        (1, 3, MANY, torch.float16),
        (1, MANY, 3, torch.float16),
    ],
    matrix: [(3, MANY), (MANY, 3)],
    features: [(3, MANY, False), (MANY, 3, True)],
    assignment: [(70_000, 5), (2, MANY), (1, 5, 2 * MANY)],
    grouped: [(MANY, 1), (1, MANY)],
    pixels: [(70_000, 100, 2), (2, 5, MANY)],
}
written = {
    name
    for path in ROOT.glob("ovseg_kernels/triton/*.py")
    for name in re.findall(r"def (\w+_kernel)\(", path.read_text())
}


def test_grids_fit(launches):
    before = 0
    for call, shape in ((call, shape) for call, shapes in SHAPES.items() for shape in shapes):
        call(*shape)
        for kernel, grid in launches[before:]:
            fits = all(1 <= count <= limit for count, limit in zip(grid, LIMITS, strict=False))
            assert fits, f"{kernel}: {grid} for {call.__name__}{shape}"
        assert max(max(grid) for _, grid in launches[before:]) >= 65535, (
            f"{call.__name__}{shape} is no test"
        )
        before = len(launches)
    assert {kernel for kernel, _ in launches} == written - {"philox_kernel"}
