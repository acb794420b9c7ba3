"""What is special about upsample_argmax: equal to interpolate and argmax outside ties, any size,
infinities, thresholds, bad input.
"""

import pytest
import torch
from backends import device_of, exact, parameters, running_on
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels.reference.upsample_argmax import upsample

on = pytest.mark.parametrize("backend", parameters(of="upsample_argmax"))


def eager(logits, size, bias=None):
    maps = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return maps if bias is None else maps + bias[:, None, None]


def assert_same_outside_ties(labels, logits, size, bias=None):
    """Where the label differs from argmax, its value must equal the best one within the rounding of
    a mean of four corners.
    """
    maps = eager(logits, size, bias)
    largest = float(logits.abs().max()) + (0 if bias is None else float(bias.abs().max()))
    best = maps.max(1)
    wrong = labels != best.indices
    chosen = maps.gather(1, labels[:, None].long())[:, 0]
    slack = 8 * torch.finfo(maps.dtype).eps * max(1.0, largest)
    assert bool((best.values - chosen <= slack)[wrong].all()), f"{int(wrong.sum())} pixels differ"


SIZES = [
    ((1, 1, 1, 1), (1, 1)),
    ((2, 5, 7, 9), (33, 50)),
    ((1, 30, 13, 17), (13, 17)),
    ((1, 4, 20, 30), (7, 11)),
    ((1, 150, 5, 4), (61, 70)),
    ((3, 2, 1, 6), (9, 2)),
    ((1, 7, 6, 1), (5, 300)),
    ((1, 700, 2, 2), (3, 3)),
]


@on
@pytest.mark.parametrize("shape,size", SIZES)
def test_sizes(shape, size, backend):
    """Up and down, one sample, one class, tails of tiles, with and without a bias; the values too."""
    device = device_of(backend)
    for dtype in exact(backend):
        logits, bias = (
            torch.randn(shape, dtype=dtype).to(device),
            torch.randn(shape[1], dtype=dtype).to(device),
        )
        with running_on(backend):
            labels, value = ok.upsample_argmax(logits, size, bias=bias, return_value=True)
            plain = ok.upsample_argmax(logits, size)
        assert labels.shape == (shape[0], *size) and labels.dtype == torch.int64
        assert_same_outside_ties(labels, logits, size, bias)
        assert_same_outside_ties(plain, logits, size)
        torch.testing.assert_close(value, eager(logits, size, bias).amax(1))


@settings(max_examples=3000, deadline=None)
@given(
    *(st.integers(1, n) for n in (12, 12, 40, 40)),
    st.one_of(st.integers(1, 60), st.integers(1, 1000)),
    st.sampled_from(["noise", "ties", "off", "forced"]),
    st.integers(0, 2**31),
)
def test_any_size_classes_ties_and_infinities(h, w, H, W, C, kind, seed):
    """Up and down and odd; with few distinct logits most corners tie; samples at -infinity, or at
    +infinity in one class.
    """
    g = torch.Generator().manual_seed(seed)
    logits = (
        torch.randint(0, 3, (1, C, h, w), generator=g).float()
        if kind == "ties"
        else torch.randn(1, C, h, w, generator=g) * 3
    )
    hit = torch.rand(1, C, h, w, generator=g) < 0.3
    if kind in ("off", "forced"):
        logits = torch.where(
            hit & (torch.tensor(kind == "off") | (torch.arange(C) == C // 2)[:, None, None]),
            -torch.inf if kind == "off" else torch.inf,
            logits,
        )
    labels = ok.upsample_argmax(logits, (H, W))
    if kind in ("noise", "ties"):
        assert_same_outside_ties(labels, logits, (H, W))
        return
    maps = upsample(logits, (H, W))  # torch's own interpolation makes NaN of a weight of zero
    best, chosen = maps.amax(1), maps.gather(1, labels[:, None])[:, 0]
    assert bool(
        ((best == chosen) | (best - chosen <= 8 * torch.finfo(torch.float32).eps * 15)).all()
    )


@pytest.mark.parametrize("classes", [1, 1000])
def test_many_classes_and_smooth_maps(classes):
    logits = F.interpolate(
        4 * torch.randn(2, classes, 4, 4), (16, 20), mode="bicubic"
    ) + 0.1 * torch.randn(2, classes, 16, 20)
    assert_same_outside_ties(ok.upsample_argmax(logits, (100, 131)), logits, (100, 131))


@on
def test_equal_values_go_to_the_smaller_class(backend):
    with torch.device(device_of(backend)), running_on(backend):
        assert torch.equal(
            ok.upsample_argmax(torch.ones(1, 5, 3, 3), (7, 8)),
            torch.zeros(1, 7, 8, dtype=torch.int64),
        )


@on
def test_infinities(backend):
    """Classes switched off by -infinity never win, though torch's own interpolation makes NaN of
    them; +infinity always wins.
    """
    device = device_of(backend)
    logits = torch.randn(1, 6, 4, 5).to(device)
    off, forced = logits.clone(), logits.clone()
    off[:, [0, 3]] = -torch.inf
    off[0, 1, :2] = -torch.inf
    forced[0, 2, 1, 1] = torch.inf
    with running_on(backend):
        found, value = ok.upsample_argmax(off, (19, 23), return_value=True)
        alone = ok.upsample_argmax(torch.full((1, 3, 2, 2), -torch.inf, device=device), (5, 5))
        peak = ok.upsample_argmax(forced, (4, 5))
    kept = [1, 2, 4, 5]
    finite = off.clone()
    finite[finite == -torch.inf] = -1e30
    assert torch.equal(found, eager(finite, (19, 23)).argmax(1)) and bool(
        torch.isin(found, torch.tensor(kept, device=device)).all()
    )
    assert (
        bool(value.isfinite().all())
        and torch.equal(alone, torch.zeros_like(alone))
        and int(peak[0, 1, 1]) == 2
    )


@on
def test_threshold_class_labels_and_types(backend):
    device = device_of(backend)
    logits = torch.randn(2, 6, 5, 7).to(device)
    table = torch.tensor([4, 0, 4, 2, 9, 0]).to(device)
    maps = eager(logits, (31, 40))
    expected = torch.where(maps.amax(1) < 0.8, 200, table[maps.argmax(1)])
    for label_type in (torch.int64, torch.int16, torch.uint8):
        with running_on(backend):
            found = ok.upsample_argmax(
                logits,
                (31, 40),
                threshold=0.8,
                background=200,
                class_labels=table,
                label_type=label_type,
            )
        assert found.dtype == label_type and torch.equal(found.long(), expected)
    with running_on(backend):
        below = ok.upsample_argmax(logits, (31, 40), threshold=0.8) == -1
    assert torch.equal(below, maps.amax(1) < 0.8) and 0.05 < float(below.float().mean()) < 0.95


@on
def test_16_bits_and_strides(backend):
    device = device_of(backend)
    base = torch.randn(6, 7, 2, 5).to(device)
    view = base.permute(2, 3, 0, 1)
    with running_on(backend):
        assert torch.equal(
            ok.upsample_argmax(view, (20, 20)), ok.upsample_argmax(view.contiguous(), (20, 20))
        )
        low = view.to(torch.bfloat16)
        assert torch.equal(
            ok.upsample_argmax(low, (20, 20)), ok.upsample_argmax(low.float(), (20, 20))
        )


def test_one_thread_and_two():
    logits, threads = torch.randn(1, 40, 16, 16), torch.get_num_threads()
    try:
        found = [
            (torch.set_num_threads(n), ok.upsample_argmax(logits, (200, 200), return_value=True))[1]
            for n in (1, 2)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_images():
    assert ok.upsample_argmax(torch.randn(0, 3, 4, 4), (8, 9)).shape == (0, 8, 9)
