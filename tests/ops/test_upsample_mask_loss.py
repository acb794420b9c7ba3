"""What is special about upsample_mask_loss: ZegCLIP's loss from its words, every size, ignored
pixels, extremes, nothing at full size.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from backends import device_of, parameters, running_on
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels.testing import assert_close_to_truth

on = pytest.mark.parametrize("backend", parameters(of="upsample_mask_loss"))


def zegclip(logits, labels):
    """100 focal + 1 dice over max(1, distinct valid labels of the images), written from
    arXiv:2212.03588 map by map.
    """
    maps = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    masks = sum(
        len([c for c in image.unique().tolist() if 0 <= c < logits.shape[1]]) for image in labels
    )
    focal, dice = 0, 0
    for x, image in zip(maps, labels, strict=True):
        for c, one in enumerate(x):
            y, q = (image == c).to(x), one.sigmoid()
            log_q, log_rest = F.logsigmoid(one), F.logsigmoid(-one)
            focal = (
                focal + (-0.25 * y * (1 - q) ** 2 * log_q - 0.75 * (1 - y) * q**2 * log_rest).mean()
            )
            if y.any():
                dice = dice + 1 - (2 * (q * y).sum() + 1) / (q.sum() + y.sum() + 1)
    return (100 * focal + dice) / max(1, masks)


def composed(logits, labels, **options):
    focal, dice, present = ok.upsample_mask_loss(logits, labels, **options)
    return (100 * focal.sum() + (dice * present).sum()) / present.sum().clamp(min=1)


def labels_of(B, H, W, C, seed=0):
    """Patches of labels, some outside [0, C) on either side."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(-1, C + 1, (B, 1, -(-H // 3), -(-W // 3)), generator=g)
    labels = coarse.repeat_interleave(3, 2).repeat_interleave(3, 3)[:, 0, :H, :W]
    return torch.where(labels == C, 255, labels)


GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "resolution.npz")


def golden(key):
    return torch.from_numpy(GOLDEN[f"zegclip/{key}"])


def close(found, expected, relative):
    assert float((found.cpu() - expected).norm()) <= relative * float(expected.norm())


@on
@pytest.mark.parametrize("setting", ["inductive", "transductive", "supervised"])
def test_golden_training(setting, backend):
    """Losses and gradient of ZegCLIP's official head, through the upsampling."""
    logits = golden(f"out/{setting}/logits").to(device_of(backend)).requires_grad_()
    with running_on(backend):
        focal, dice, present = ok.upsample_mask_loss(
            logits, golden(f"out/{setting}/labels_used").to(logits.device)
        )
        masks = present.sum()
        focal, dice = 100 * focal.sum() / masks, (dice * present).sum() / masks
        (grad,) = torch.autograd.grad(focal + dice, logits)
    assert int(masks) == int(golden(f"out/{setting}/num_masks"))
    close(focal.detach(), golden(f"out/{setting}/loss_focal"), 1e-6)
    close(dice.detach(), golden(f"out/{setting}/loss_dice"), 1e-6)
    close(grad, golden(f"out/{setting}/dlogits"), 1e-5)


@on
def test_golden_extremes(backend):
    """Logits of -41 to 37, and an image of which every pixel is a negative."""
    logits, labels = (
        golden("in/loss/logits").to(device_of(backend)).requires_grad_(),
        golden("in/loss/labels").to(device_of(backend)),
    )
    with running_on(backend):
        focal, dice, present = ok.upsample_mask_loss(logits, labels)
        masks = present.sum().clamp(min=1)
        (grad,) = torch.autograd.grad(
            (100 * focal.sum() + (dice * present).sum()) / masks, logits, retain_graph=True
        )
        (of_dice,) = torch.autograd.grad((dice * present).sum() / masks, logits, retain_graph=True)
        (of_one,) = torch.autograd.grad(100 * focal[1].sum(), logits)
    close((100 * focal.sum() / masks).detach(), golden("out/loss/loss_focal"), 1e-6)
    close(((dice * present).sum() / masks).detach(), golden("out/loss/loss_dice"), 1e-6)
    close(grad, golden("out/loss/dlogits"), 1e-5)
    close(of_dice, golden("out/loss/dlogits_dice_only"), 1e-5)
    close(100 * focal[1].sum().detach(), golden("out/loss_all_ignored/loss_focal"), 1e-6)
    close(of_one[1:], golden("out/loss_all_ignored/dlogits"), 1e-5)


SIZES = [
    ((2, 5, 4, 7), (33, 20)),
    ((1, 3, 20, 9), (7, 5)),
    ((2, 4, 1, 1), (9, 9)),
    ((1, 2, 1, 6), (3, 300)),
    ((3, 1, 6, 1), (6, 1)),
    ((1, 1, 19, 2), (140, 130)),
]


@on
@pytest.mark.parametrize("shape,size", SIZES)
def test_equal_to_zegclip_loss(shape, size, backend):
    """Value and gradient in float64, up and down, one sample, one class."""
    logits = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    labels = labels_of(shape[0], *size, shape[1])
    (expected,) = torch.autograd.grad(zegclip(logits, labels), logits)
    mine = logits.detach().to(device_of(backend)).requires_grad_()
    with running_on(backend):
        value = composed(mine, labels.to(mine.device))
        (grad,) = torch.autograd.grad(value, mine)
    torch.testing.assert_close(
        value.detach().cpu(), zegclip(logits, labels).detach(), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(grad.cpu(), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    *(st.integers(1, n) for n in (3, 7, 9, 9, 40, 40)),
    st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.7]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_size_and_exponent(B, C, h, w, H, W, gamma, ignoring, seed):
    g = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(B, C, h, w, generator=g, dtype=torch.float64)).requires_grad_()
    labels, weights = (
        labels_of(B, H, W, C, seed),
        torch.randn(2, B, C, generator=g, dtype=torch.float64),
    )
    options = {"gamma": gamma, "alpha": 0.4, "ignore_index": 255 if ignoring else None}

    def run():
        focal, dice, present = ok.upsample_mask_loss(logits, labels, **options)
        return (
            focal,
            dice,
            present,
            *torch.autograd.grad((weights[0] * focal + weights[1] * dice).sum(), logits),
        )

    found = run()
    with ok.backend("reference"):
        expected = run()
    assert torch.equal(found[2], expected[2])
    for a, b in zip((*found[:2], found[3]), (*expected[:2], expected[3]), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-11)


@on
def test_ignored_pixels_do_not_count_and_others_outside_are_negatives(backend):
    device = device_of(backend)
    logits = torch.randn(1, 3, 3, 3).to(device)
    labels = labels_of(1, 6, 7, 3, seed=4).to(device)
    assert bool((labels == 255).any()) and bool((labels == -1).any())
    with running_on(backend):
        with_negatives = ok.upsample_mask_loss(logits, labels)
        same = ok.upsample_mask_loss(logits, torch.where(labels == 255, -7, labels))
        without = ok.upsample_mask_loss(logits, labels, ignore_index=255)
        own_class = ok.upsample_mask_loss(logits, labels, ignore_index=1)
        nothing = ok.upsample_mask_loss(logits, torch.full_like(labels, 255), ignore_index=255)
    maps = F.interpolate(logits, (6, 7), mode="bilinear")[0]
    keep = (labels != 255)[0]
    q, y = maps.sigmoid()[:, keep], torch.stack([labels[0][keep] == c for c in range(3)]).float()
    chance = torch.where(y == 1, q, 1 - q)
    focal = -(torch.where(y == 1, 0.25, 0.75) * (1 - chance) ** 2 * chance.log()).mean(1)
    dice = 1 - (2 * (q * y).sum(1) + 1) / (q.sum(1) + y.sum(1) + 1)
    torch.testing.assert_close(without[0][0], focal)
    torch.testing.assert_close(without[1][0], dice)
    assert all(torch.equal(a, b) for a, b in zip(with_negatives, same, strict=True))
    assert not torch.allclose(with_negatives[0], without[0])
    assert not bool(own_class[2][0, 1]) and own_class[2].dtype == torch.bool
    assert not bool(nothing[0].any()) and not bool(nothing[2].any())


@on
def test_extremes(backend):
    """Logits at which log(1 - sigmoid) is -infinity in float32, and far beyond; NaN stays with its
    class.
    """
    device = device_of(backend)
    labels = labels_of(1, 8, 8, 4).to(device)
    for scale in (20.0, 200.0, 1e30):
        logits = (scale * torch.randn(1, 4, 3, 3)).to(device).requires_grad_()
        with running_on(backend):
            focal, dice, _ = ok.upsample_mask_loss(logits, labels)
            (grad,) = torch.autograd.grad((focal + dice).sum(), logits)
        assert all(bool(x.isfinite().all()) for x in (focal, dice, grad))
    broken = torch.randn(1, 4, 3, 3).to(device)
    broken[0, 2, 1, 1] = float("nan")
    with running_on(backend):
        focal, dice, _ = ok.upsample_mask_loss(broken, labels)
    assert focal[0].isnan().tolist() == dice[0].isnan().tolist() == [False, False, True, False]


@on
def test_error_rule_at_32_to_512(backend):
    """The precision asked of float32 at ZegCLIP's size: loss to 1e-6, gradient to 1e-5 of its
    largest value; fewer classes.
    """
    side, size, C = (12, 96, 5) if "emulated" in backend else (32, 512, 12)
    logits = (2.5 * torch.randn(2, C, side, side)).to(device_of(backend))
    labels = labels_of(2, size, size, C).to(logits.device)

    def run(dtype):
        leaf = logits.to(dtype).requires_grad_()
        value = composed(leaf, labels)
        return value.detach(), *torch.autograd.grad(value, leaf)

    with running_on(backend):
        found = run(torch.float32)
    with ok.backend("reference"):
        eager, truth = run(torch.float32), run(torch.float64)
    assert abs(float(found[0] - truth[0])) <= 1e-6 * abs(float(truth[0]))
    assert float((found[1] - truth[1]).abs().max()) <= 1e-5 * float(truth[1].abs().max())
    for name, a, b, c in zip(("loss", "gradient"), found, eager, truth, strict=True):
        assert_close_to_truth(name, a, b, c, torch.float32)


@on
def test_labels_of_every_integer_type_and_strides(backend):
    device = device_of(backend)
    logits = torch.randn(3, 4, 2, 2).to(device).permute(3, 1, 0, 2)  # [2, 4, 3, 2]
    labels = torch.randint(0, 4, (9, 7, 2)).to(device).permute(2, 0, 1)
    with running_on(backend):
        expected = ok.upsample_mask_loss(logits.contiguous(), labels.contiguous())
        for dtype in (torch.int64, torch.int32, torch.uint8):
            found = ok.upsample_mask_loss(logits, labels.to(dtype))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        far = ok.upsample_mask_loss(logits, labels + 2**32)  # would be a class, cut to 32 bits
    assert not bool(far[2].any())


def test_16_bits_are_computed_in_float32():
    logits, labels = (
        torch.randn(2, 3, 4, 4, dtype=torch.bfloat16).requires_grad_(),
        labels_of(2, 16, 16, 3),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        focal, dice, _ = ok.upsample_mask_loss(logits, labels)
    (grad,) = torch.autograd.grad((focal + dice).sum(), logits)
    assert focal.dtype == dice.dtype == torch.float32 and grad.dtype == torch.bfloat16


def test_nothing_at_full_size_is_kept():
    logits, labels, kept = torch.randn(2, 9, 4, 4, requires_grad=True), labels_of(2, 64, 64, 9), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        ok.upsample_mask_loss(logits, labels)
    assert max(kept) <= 2 * 64 * 64


@on
def test_no_images(backend):
    logits = torch.randn(0, 3, 4, 4, device=device_of(backend), requires_grad=True)
    with running_on(backend):
        focal, dice, present = ok.upsample_mask_loss(
            logits, torch.zeros(0, 8, 8, dtype=torch.int64, device=logits.device)
        )
        (grad,) = torch.autograd.grad((focal + dice).sum(), logits)
    assert focal.shape == dice.shape == present.shape == (0, 3) and grad.shape == logits.shape
