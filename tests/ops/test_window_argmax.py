"""What is special about window_argmax: equal to whole maps outside ties, for every activation and
place of it, tables, overlaps.
"""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import device_of, exact, parameters, running_on
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import ovseg_kernels as ok

on = pytest.mark.parametrize("backend", parameters(of="window_argmax"))
ACTS = {None: lambda x: x, "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-3)}


def slide(canvas, crop, stride):
    """Corners as mmsegmentation cuts them: the last window is shifted back to the border."""

    def starts(size, window, step):
        return sorted(
            {
                min(at, size - window)
                for at in range(0, max(size - window + step - 1, 0) // step * step + 1, step)
            }
        )

    return torch.tensor(
        list(
            itertools.product(
                starts(canvas[0], crop[0], stride), starts(canvas[1], crop[1], stride)
            )
        )
    )


def maps_at_full_size(
    logits, origins, crop, canvas, size, tables=None, activation=None, stage="window", bias=None
):
    """z [C, H, W] by F.interpolate, padded accumulators and a count, as the published procedures do
    it.
    """
    act = ACTS[activation]
    maps = F.interpolate(logits, crop, mode="bilinear", align_corners=False)
    if tables is not None:
        maps = torch.einsum(
            "nghw,ngc->nchw",
            F.one_hot(maps.argmax(1), tables.shape[1]).permute(0, 3, 1, 2).to(tables),
            tables,
        )
    maps = act(maps) if stage == "window" else maps
    total, count = 0, 0
    for one, (y, x) in zip(maps, origins.tolist(), strict=True):
        pad = (x, canvas[1] - x - crop[1], y, canvas[0] - y - crop[0])
        total, count = total + F.pad(one, pad), count + F.pad(torch.ones_like(one[:1]), pad)
    merged = act(total / count) if stage == "merged" else total / count
    z = F.interpolate(merged[None], size, mode="bilinear", align_corners=False)[0]
    z = act(z) if stage == "output" else z
    return z if bias is None else z + bias[:, None, None]


def assert_same_outside_ties(labels, z):
    best = z.max(0)
    chosen = z.gather(0, labels[None].long())[0]
    slack = 64 * torch.finfo(z.dtype).eps * max(1.0, float(z.abs().max()))
    wrong = labels != best.indices
    assert bool((best.values - chosen <= slack)[wrong].all()), f"{int(wrong.sum())} pixels differ"
    assert float(wrong.float().mean()) < 0.01 or bool((best.values - chosen == 0).all())


GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "resolution.npz")
GRIDS = [
    ((8, 12), (6, 7), 3, (11, 9)),
    ((5, 5), (5, 5), 5, (9, 23)),
    ((17, 9), (7, 5), 4, (17, 9)),
    ((20, 30), (9, 8), 7, (5, 4)),
]


@on
@pytest.mark.parametrize("stage", ["window", "merged", "output"])
@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("grouped", [False, True])
def test_equal_to_whole_maps(grouped, activation, stage, backend):
    torch.manual_seed(3)
    device = device_of(backend)
    for dtype, (canvas, crop, stride, size) in itertools.product(exact(backend), GRIDS):
        origins = slide(canvas, crop, stride).to(device)
        logits, tables = (
            2 * torch.randn(len(origins), 5, 3, 4, dtype=dtype),
            2 * torch.randn(len(origins), 5, 6, dtype=dtype),
        )
        bias = torch.randn(6 if grouped else 5, dtype=dtype).to(device) / 10
        logits, tables = logits.to(device), tables.to(device) if grouped else None
        options = {"tables": tables, "activation": activation, "stage": stage}
        with running_on(backend):
            labels, value = ok.window_argmax(
                logits, origins, crop, canvas, size, bias=bias, return_value=True, **options
            )
            plain = ok.window_argmax(logits, origins, crop, canvas, size, **options)
        z = maps_at_full_size(logits, origins, crop, canvas, size, bias=bias, **options)
        assert labels.shape == size and labels.dtype == torch.int64
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(value, z.amax(0), rtol=tolerance, atol=tolerance)
        assert_same_outside_ties(labels, z)
        assert_same_outside_ties(plain, z - bias[:, None, None])


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_windows_classes_and_ties(data):
    """Crops smaller and larger than their samples, tiles with borders of windows in them, equal
    logits, one to 300 classes.
    """

    def draw(least, most):
        return data.draw(st.integers(least, most))

    canvas = draw(1, 70), draw(1, 70)
    crop = draw(max(1, canvas[0] // 5), canvas[0]), draw(max(1, canvas[1] // 5), canvas[1])
    size, samples = (draw(1, 60), draw(1, 60)), (draw(1, 9), draw(1, 9))
    origins = slide(canvas, crop, draw(max(1, min(crop) // 3), min(crop)))
    grouped, activation = data.draw(st.booleans()), data.draw(st.sampled_from(list(ACTS)))
    stage, coarse = (
        data.draw(st.sampled_from(["window", "merged", "output"])),
        data.draw(st.booleans()),
    )
    g = torch.Generator().manual_seed(draw(0, 2**31))
    C, groups, n = draw(1, 300) if draw(0, 3) == 0 else draw(1, 9), draw(1, 8), len(origins)

    def numbers(*shape):
        found = torch.randn(shape, generator=g, dtype=torch.float64)
        return found.round() if coarse else 3 * found

    logits, tables = (
        numbers(n, groups if grouped else C, *samples),
        numbers(n, groups, C) if grouped else None,
    )
    options = {"tables": tables, "activation": activation, "stage": stage}
    labels, value = ok.window_argmax(
        logits, origins, crop, canvas, size, return_value=True, **options
    )
    if grouped:  # which group wins a tie is upsample_argmax's affair
        with ok.backend("reference"):
            z = ok.window_argmax(logits, origins, crop, canvas, size, return_value=True, **options)[
                1
            ]
        near = (z - value).abs() < 1e-9
        assert coarse or bool(near.all())
        return
    z = maps_at_full_size(logits, origins, crop, canvas, size, **options)
    torch.testing.assert_close(value, z.amax(0), rtol=1e-11, atol=1e-11)
    chosen = z.gather(0, labels[None])[0]
    assert bool((z.amax(0) - chosen <= 1e-12 * max(1.0, float(z.abs().max()))).all())


@on
@pytest.mark.parametrize("activation,stage", [(None, "window"), ("softmax", "merged")])
@pytest.mark.parametrize("grouped", [False, True])
def test_more_windows_in_a_tile_than_it_keeps(grouped, activation, stage, backend):
    """A tile of the CUDA kernel keeps the positions of 16 at a time; here 49 lie over each."""
    origins = slide((12, 12), (6, 6), 1).to(device_of(backend))
    logits, tables = torch.randn(49, 5, 2, 2), torch.randn(49, 5, 6)
    options = {"tables": tables if grouped else None, "activation": activation, "stage": stage}
    arguments = origins, (6, 6), (12, 12), (13, 12)
    z = maps_at_full_size(
        logits, *(x if isinstance(x, tuple) else x.cpu() for x in arguments), **options
    )
    options["tables"] = tables.to(origins.device) if grouped else None
    with running_on(backend):
        found = ok.window_argmax(
            logits.to(origins.device), *arguments, return_value=True, **options
        )
    torch.testing.assert_close(found.value.cpu(), z.amax(0), rtol=1e-5, atol=1e-5)
    assert_same_outside_ties(found.labels.cpu(), z)


@on
def test_one_window_is_upsample_argmax(backend):
    logits, size = torch.randn(1, 6, 4, 5).to(device_of(backend)), (40, 50)
    origin = torch.zeros(1, 2, dtype=torch.int64, device=logits.device)
    with running_on(backend):
        assert torch.equal(
            ok.window_argmax(logits, origin, size, size, size), ok.upsample_argmax(logits, size)[0]
        )


@on
def test_classes_switched_off(backend):
    device = device_of(backend)
    origins = slide((10, 14), (8, 8), 5).to(device)
    logits = torch.randn(len(origins), 6, 3, 3).to(device)
    logits[:, [0, 3]] = -torch.inf
    kept = torch.tensor([1, 2, 4, 5], device=device)
    for activation in (None, "sigmoid"):
        with running_on(backend):
            labels, value = ok.window_argmax(
                logits, origins, (8, 8), (10, 14), (12, 9), activation=activation, return_value=True
            )
            few = ok.window_argmax(
                logits[:, kept], origins, (8, 8), (10, 14), (12, 9), activation=activation
            )
        assert (
            bool(torch.isin(labels, kept).all())
            and bool(value.isfinite().all())
            and torch.equal(labels, kept[few])
        )


@on
def test_threshold_class_labels_and_types(backend):
    device = device_of(backend)
    origins = slide((9, 12), (6, 8), 4).to(device)
    logits, table = (
        torch.randn(len(origins), 6, 3, 4).to(device),
        torch.tensor([4, 0, 4, 2, 9, 0]).to(device),
    )
    options = {
        "activation": "softmax",
        "stage": "output",
    }  # as SCLIP does: a pixel is background if its probability is small
    size = (15, 16)
    z = maps_at_full_size(logits, origins, (6, 8), (9, 12), size, **options)
    limit = float(z.amax(0).median())
    expected = torch.where(z.amax(0) < limit, 200, table[z.argmax(0)])
    sure = (z.amax(0) - limit).abs() > 1e-6
    for label_type in (torch.int64, torch.int16, torch.uint8):
        with running_on(backend):
            found = ok.window_argmax(
                logits,
                origins,
                (6, 8),
                (9, 12),
                size,
                threshold=limit,
                background=200,
                class_labels=table,
                label_type=label_type,
                **options,
            )
        assert found.dtype == label_type and torch.equal(found.long()[sure], expected[sure])


def test_protocol_of_zegclip():
    """Two windows of a 4:3 picture: sigmoid in the window, mean, resize, 0.1 off for seen classes,
    here subtracted in the window.
    """
    torch.manual_seed(5)
    origins, seen = torch.tensor([[0, 0], [0, 43]]), torch.arange(30) < 25
    logits = F.interpolate(2.5 * torch.randn(2, 30, 3, 3), (8, 8), mode="bicubic")
    maps = F.interpolate(logits, (128, 128), mode="bilinear").sigmoid() - 0.1 * seen[:, None, None]
    total, count = torch.zeros(30, 128, 171), torch.zeros(128, 171)
    for one, x in zip(maps, (0, 43), strict=True):
        total[:, :, x : x + 128] += one
        count[:, x : x + 128] += 1
    z = F.interpolate((total / count)[None], (120, 160), mode="bilinear")[0]
    labels = ok.window_argmax(
        logits, origins, (128, 128), (128, 171), (120, 160), activation="sigmoid", bias=-0.1 * seen
    )
    assert_same_outside_ties(labels, z)
    assert 1 < len(labels.unique()) <= 30


def test_protocol_of_group_maps():
    """GroupViT, SegCLIP and OVSegmentor: argmax of the upsampled groups, a class table with a
    background column for each window.
    """
    torch.manual_seed(6)
    origins = slide((28, 45), (28, 28), 14)
    soft, scores = (
        torch.randn(len(origins), 8, 7, 7).softmax(1),
        torch.randn(len(origins), 8, 12).mul(3).softmax(-1),
    )
    empty = (
        scores.amax(-1) < torch.minimum(torch.tensor(0.6), scores.amax((1, 2)))[:, None]
    ).float()
    tables = torch.cat([empty[..., None], scores], -1)
    labels = ok.window_argmax(soft, origins, (28, 28), (28, 45), (60, 91), tables=tables)
    assert_same_outside_ties(
        labels, maps_at_full_size(soft, origins, (28, 28), (28, 45), (60, 91), tables)
    )
    assert 0.05 < float((labels == 0).float().mean()) < 0.95


def golden(key):
    return torch.from_numpy(GOLDEN[key])


@on
@pytest.mark.parametrize("words", ["random", "mixed"])
def test_golden_group_map(words, backend):
    """SegCLIP's official segmentation of one crop: the group of each pixel, and its class by the
    table of the groups.
    """
    soft, maps = (
        golden("segclip/out/eval/soft_map_image0")[None],
        golden(f"segclip/out/seg_{words}/class_map"),
    )
    groups, stable = (
        golden(f"segclip/out/seg_{words}/group_of_pixel"),
        golden(f"segclip/out/seg_{words}/stable"),
    )
    tables = torch.zeros(1, 8, 21)
    for g in groups.unique().tolist():
        y, x = ((groups == g) & stable).nonzero()[0].tolist()
        tables[0, g] = maps[:, y, x]
    size = (64, 64)
    place = [x.to(device_of(backend)) for x in (soft, torch.zeros(1, 2, dtype=torch.int64), tables)]
    with running_on(backend):
        assert torch.equal(
            ok.upsample_argmax(place[0], size)[0].cpu()[stable], groups[stable].long()
        )
        labels = ok.window_argmax(*place[:2], size, size, size, tables=place[2]).cpu()
    assert torch.equal(labels[stable], golden(f"segclip/out/seg_{words}/labels")[stable].long())


def test_golden_resize_of_merged_windows():
    maps, stable = (
        golden("segclip/out/slide/class_map")[None],
        golden("segclip/out/slide/stable_ori"),
    )
    canvas, size = (80, 112), (100, 140)
    labels, value = ok.window_argmax(
        maps, torch.zeros(1, 2, dtype=torch.int64), canvas, canvas, size, return_value=True
    )
    assert torch.equal(labels[stable], golden("segclip/out/slide/labels_ori")[stable].long())
    at = golden("segclip/out/slide/ori_sample_index").long()
    torch.testing.assert_close(
        value.flatten()[at],
        golden("segclip/out/slide/ori_sample_values").amax(0),
        rtol=1e-5,
        atol=1e-6,
    )


def test_golden_sigmoid_maps():
    """ZegCLIP's official probabilities of one window, less 0.1 for seen classes: value and label of
    every eighth pixel.
    """
    expected, seen = (
        golden("zegclip/out/eval/prob_inductive_s8"),
        torch.isin(torch.arange(7), golden("zegclip/in/seen_ids")),
    )
    origin, side = torch.zeros(1, 2, dtype=torch.int64), (128, 128)
    for logits, maps in zip(golden("zegclip/out/eval/logits"), expected, strict=True):
        labels, value = ok.window_argmax(
            logits[None],
            origin,
            side,
            side,
            side,
            activation="sigmoid",
            bias=-0.1 * seen,
            return_value=True,
        )
        best = maps.topk(2, 0)
        sure = best.values[0] - best.values[1] > 1e-4
        assert (
            torch.equal(labels[1::8, 2::8][sure], best.indices[0][sure])
            and float(sure.float().mean()) > 0.9
        )
        torch.testing.assert_close(value[1::8, 2::8], best.values[0], rtol=1e-5, atol=1e-5)


def test_structured_maps_of_many_classes():
    """The case that the bounds are for: most classes never looked at, and yet no other label."""
    torch.manual_seed(7)
    origins = torch.tensor([[0, 0], [0, 86]])
    logits = F.interpolate(
        2.5 * torch.randn(2, 171, 5, 5), (16, 16), mode="bicubic"
    ) + 0.1 * torch.randn(2, 171, 16, 16)
    for activation, stage in itertools.product(ACTS, ("window", "merged", "output")):
        labels = ok.window_argmax(
            logits, origins, (256, 256), (256, 342), (240, 320), activation=activation, stage=stage
        )
        assert_same_outside_ties(
            labels,
            maps_at_full_size(
                logits, origins, (256, 256), (256, 342), (240, 320), None, activation, stage
            ),
        )


@on
def test_softmax_bounds_where_windows_disagree(backend):
    """Class 0 wins on the left, where the first window's sum is small; bounded by the sum on the
    right it would have no chance.
    """
    first = [[0.0, 0.0], [-10.0, -10.0], [-20.0, 20.0]]
    second = [[-20.0, -20.0], [-0.9, -0.9], [-0.5, -0.5]]
    logits = torch.tensor([first, second], dtype=torch.float64)[:, :, None].to(device_of(backend))
    origins, size = torch.zeros(2, 2, dtype=torch.int64, device=logits.device), (1, 16)
    with running_on(backend):
        labels = ok.window_argmax(logits, origins, size, size, size, activation="softmax")
    assert torch.equal(
        labels, maps_at_full_size(logits, origins, size, size, size, activation="softmax").argmax(0)
    )
    assert int(labels[0, 0]) == 0 and int(labels[0, -1]) == 2


@on
def test_16_bits_and_strides(backend):
    device = device_of(backend)
    origins = slide((9, 12), (6, 8), 4).to(device)
    view = torch.randn(3, 4, len(origins), 5).to(device).permute(2, 3, 0, 1)
    arguments = origins, (6, 8), (9, 12), (10, 10)
    with running_on(backend):
        assert torch.equal(
            ok.window_argmax(view, *arguments), ok.window_argmax(view.contiguous(), *arguments)
        )
        low = view.to(torch.bfloat16)
        assert torch.equal(
            ok.window_argmax(low, *arguments), ok.window_argmax(low.float(), *arguments)
        )


def test_one_thread_and_two():
    logits, threads = torch.randn(2, 40, 16, 16), torch.get_num_threads()
    arguments = logits, torch.tensor([[0, 0], [0, 50]]), (128, 128), (128, 178), (99, 200)

    def run(n):
        torch.set_num_threads(n)
        return ok.window_argmax(*arguments, activation="softmax", return_value=True)

    try:
        one, two = run(1), run(2)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def first_hole(corners, crop, canvas):
    """By a canvas of pixels."""
    covered = np.zeros(canvas, bool)
    for y, x in corners:
        covered[y : y + crop[0], x : x + crop[1]] = True
    return None if covered.all() else tuple(int(place) for place in np.argwhere(~covered)[0])


@pytest.mark.third_trial(14)
def test_the_first_pixel_without_a_window():
    random, seen = np.random.default_rng(0), [0, 0]
    for _ in range(300):
        crop = tuple(int(side) for side in random.integers(1, 6, 2))
        canvas = tuple(side + int(random.integers(0, 7)) for side in crop)
        corners = [
            tuple(int(random.integers(0, canvas[i] - crop[i] + 1)) for i in (0, 1))
            for _ in range(random.choice([1, 4, 20, 40]))
        ]
        hole = first_hole(corners, crop, canvas)
        seen[hole is None] += 1
        call = (torch.zeros(len(corners), 1, 1, 1), corners, crop, canvas, (2, 2))
        if hole is None:
            ok.window_argmax(*call)
        else:
            with pytest.raises(
                ValueError,
                match=f"origins leaves row {hole[0]}, column {hole[1]} of the canvas without a "
                "window",
            ):
                ok.window_argmax(*call)
    assert min(seen) > 30


@pytest.mark.third_trial(14)
def test_windows_of_distinct_borders_are_checked_in_little_time():
    """6 000 of them: a table of all cells between their borders took 75 s."""
    origins = torch.stack([torch.randperm(10_001)[:6000], torch.randperm(10_001)[:6000]], 1)
    corners = torch.tensor([(0, 0), (0, 10_000), (10_000, 0), (10_000, 10_000)])
    logits, origins = torch.zeros(6004, 1, 1, 1), torch.cat([origins, corners])
    began = time.process_time()
    ok.window_argmax(logits, origins, (10_000, 10_000), (20_000, 20_000), (2, 2))
    assert time.process_time() - began < 5
