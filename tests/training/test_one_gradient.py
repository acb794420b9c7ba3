"""Several losses of the same pixels: values and gradients of the plain operations, in one tensor."""

import pytest
import torch

import ovseg_kernels as ok
from ovseg.systems.mgca.one_gradient import OneGradient
from ovseg_kernels.results import SelectedPixels


def leaves():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 4, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 7, 2, generator=g, dtype=torch.float64)
    index = torch.tensor([[0, 20, 5, -1], [5, 5, 9, 3]])  # one twice, one that is not there
    return x, weights, index


def plainly(x, weights, index):
    rows = x.flatten(0, 1)[index.clamp(min=0)] * (index >= 0)[..., None]
    return (x**3).sum(), (weights.transpose(1, 2) @ x).square().sum(), rows.pow(4).sum()


def shared(x, weights, index):
    one = OneGradient(x)
    return (one.pixels**3).sum(), one.weighted(weights).square().sum(), one.rows(index).pow(4).sum()


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_gradients_are_those_of_the_plain_operations(used):
    x, *others = leaves()
    found, right = shared(x, *others), plainly(x, *others)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)
    (ours,), (theirs,) = (
        torch.autograd.grad(sum(losses[i] for i in used), x) for losses in (found, right)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_passes_of_a_kept_graph_are_independent():
    x, *others = leaves()
    found, right = shared(x, *others), plainly(x, *others)
    for i in (1, 0, 2, 1):
        (ours,), (theirs,) = (
            torch.autograd.grad(losses[i], x, retain_graph=True) for losses in (found, right)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_somebody_else_holds_is_left_alone():
    """What arrives may be a view of one number, as that of a sum."""
    x, _, index = leaves()
    one = OneGradient(x)
    (one.pixels.sum() + one.rows(index).sum()).backward()
    plain = x.grad.clone()
    x.grad = None
    (x.sum() + (x.flatten(0, 1)[index.clamp(min=0)] * (index >= 0)[..., None]).sum()).backward()
    torch.testing.assert_close(plain, x.grad)


def test_under_a_compiler():
    x, *others = leaves()
    (ours,) = torch.autograd.grad(
        sum(torch.compile(shared, backend="eager", fullgraph=True)(x, *others)), x
    )
    torch.testing.assert_close(ours, torch.autograd.grad(sum(plainly(x, *others)), x)[0])


def test_without_gradients():
    x, weights, index = leaves()
    with torch.no_grad():
        assert not shared(x, weights, index)[1].requires_grad


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("terms", ["both", "text_to_pixel", "pixel_to_text"])
def test_the_operator_on_selections_made_before(backend, terms):
    """The same loss from the pixels with their selections, and from the selected rows alone."""
    g = torch.Generator().manual_seed(2)
    pixels = torch.randn(4, 9, 6, generator=g, dtype=torch.float64, requires_grad=True)
    texts = torch.randn(5, 6, generator=g, dtype=torch.float64, requires_grad=True)
    ids, owners = (
        torch.tensor([0, 0, 2, 3]),
        torch.tensor([0, 2, 2, 3, 9]),
    )  # the last text has no picture
    options = {"image_ids": ids, "text_ids": owners, "terms": terms, "temperature": 0.2}
    with ok.backend(backend):
        chosen = ok.select_pixels(pixels, texts, k_pos=3, k_neg=30, image_ids=ids, text_ids=owners)
        whole = ok.dense_contrastive_loss(pixels, texts, k_pos=3, k_neg=30, **options)
        given = ok.dense_contrastive_loss(pixels, texts, selected=chosen, **options)
        one, index = OneGradient(pixels), torch.cat(chosen, 1)
        place = torch.arange(index.numel()).view_as(index).masked_fill(index < 0, -1)
        rows = ok.dense_contrastive_loss(
            one.rows(index),
            texts,
            selected=SelectedPixels(*place.split([3, 30], 1)),
            **{**options, "image_ids": owners},
        )
    gradients = [
        torch.autograd.grad(loss, (pixels, texts), retain_graph=True)
        for loss in (whole, given, rows)
    ]
    for loss, found in zip((given, rows), gradients[1:], strict=True):
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-12)
        for a, b in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.bad_input("operators", "selections that cannot be")
@pytest.mark.parametrize(
    "selected,message",
    [
        (torch.zeros(2, 1), "selected is a Tensor; expected"),
        ((torch.zeros(2, 1).long(),), "selected is a tuple; expected"),
        (
            (torch.zeros(2, 1), torch.zeros(2, 1).long()),
            r"selected\.positive has dtype float32; expected int64",
        ),
        (
            (torch.zeros(2, 1).long(), torch.zeros(3, 1).long()),
            r"selected\.negative has shape \[3, 1\]; expected \[2, 1\]",
        ),
        (
            (torch.full((2, 1), 10), torch.zeros(2, 1).long()),
            r"selected\.positive holds 10 to 10; expected -1 to 9",
        ),
        ((torch.zeros(2, 1).long(), torch.full((2, 1), -2)), r"selected\.negative holds -2 to -2"),
    ],
)
def test_selections_that_cannot_be(selected, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ok.dense_contrastive_loss(torch.randn(2, 5, 3), torch.randn(2, 3), selected=selected)
