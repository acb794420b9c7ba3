"""contrastive_loss with a list of positives: the definition by hand, the bits of equal ids, pairs
listed twice, outside or not at all, and no matrix.
"""

import math

import pytest
import torch
import torch._dynamo.testing
from backends import SLOW, device_of, exact, parameters, running_on
from torch.utils._python_dispatch import TorchDispatchMode

import ovseg_kernels as ok
from ovseg_kernels import _check
from ovseg_kernels.testing import assert_close_to_truth

on = pytest.mark.parametrize("backend", parameters(of="contrastive_loss"))
kinds = pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
BIAS = {"softmax": {}, "sigmoid": {"kind": "sigmoid", "logit_bias": -1.5}}


def features(B, T, D, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype) for n in (B, T)]


def a_list(B, T, count, seed=1):
    """(positives, weights) with pairs listed twice, weights of 0 and rows that are not listed."""
    g = torch.Generator().manual_seed(seed)
    own = torch.randint(0, max(1, B - 1), (count,), generator=g)
    other = torch.randint(0, T, (count,), generator=g)
    weights = torch.randint(0, 4, (count,), generator=g) / 2
    return torch.stack([own, other], 1), weights.double()


def wide_and_narrow(backend):
    """The dtypes of what crosses many tiles: interpreted, float64 has a thousand of them."""
    return exact(backend)[: 1 if backend in SLOW else None]


def run(image, text, kind, **options):
    """(loss, d image, d text, d scale)."""
    device = options["positives" if "positives" in options else "image_ids"].device
    scale = torch.tensor(3.0, dtype=image.dtype)
    leaves = [x.detach().to(device).requires_grad_() for x in (image, text, scale)]
    loss = ok.contrastive_loss(*leaves, **BIAS[kind], **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def on_device(backend, dtype, positives, weights=None):
    device = device_of(backend)
    found = {"positives": positives.to(device)}
    return found if weights is None else {**found, "positive_weights": weights.to(device, dtype)}


def by_hand(z, p, kind):
    """The docstring's (3) or (4), a number at a time."""
    B, T = len(z), len(z[0])
    if kind == "sigmoid":
        terms = [
            torch.log(1 + z[i][j].exp()) - min(p[i][j], 1) * z[i][j]
            for i in range(B)
            for j in range(T)
        ]
        return sum(terms) / B
    halves = []
    for count, length, at in (
        (B, T, lambda row, k: (row, k)),
        (T, B, lambda column, k: (k, column)),
    ):
        terms = []
        for row in range(count):
            places = [at(row, k) for k in range(length)]
            total = math.fsum(p[i][j] for i, j in places)
            if total > 0:
                lse = torch.log(sum(z[i][j].exp() for i, j in places))
                terms.append(lse - sum(p[i][j] * z[i][j] for i, j in places) / total)
        halves.append(sum(terms) / max(1, len(terms)))
    return (halves[0] + halves[1]) / 2


@on
@kinds
@pytest.mark.parametrize("B,T,count", [(1, 1, 1), (1, 4, 3), (4, 1, 3), (5, 6, 9), (3, 4, 0)])
def test_definition_by_hand(B, T, count, kind, backend):
    dtype = exact(backend)[-1]
    image, text = features(B, T, 3)
    positives, weights = a_list(B, T, count)
    leaves = [x.clone().requires_grad_() for x in (image, text, torch.tensor(3.0).double())]
    unit = [x / x.square().sum(1, keepdim=True).sqrt() for x in leaves[:2]]
    z = leaves[2] * unit[0] @ unit[1].T + (-1.5 if kind == "sigmoid" else 0.0)
    p = [[0.0] * T for _ in range(B)]
    for (i, j), weight in zip(positives.tolist(), weights.tolist(), strict=True):
        p[i][j] += weight
    expected = by_hand(z, p, kind) + 0 * z.sum()
    expected = expected.detach(), *torch.autograd.grad(expected, leaves)
    with running_on(backend):
        found = run(
            *features(B, T, 3, dtype), kind, **on_device(backend, dtype, positives, weights)
        )
    close = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.to(dtype), **close)
    with ok.backend("reference"):
        found = run(image, text, kind, positives=positives, positive_weights=weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@on
@kinds
@pytest.mark.parametrize("B,T,count", [(70, 130, 400), (130, 5, 60)])
def test_error_rule_across_tiles(B, T, count, kind, backend):
    for dtype in wide_and_narrow(backend):
        image, text = features(B, T, 9, dtype)
        positives, weights = a_list(B, T, count)
        listed = on_device(backend, dtype, positives, weights)
        with running_on(backend):
            found = run(image, text, kind, **listed)
        with ok.backend("reference"):
            eager = run(image, text, kind, **listed)
            wide = on_device(backend, torch.float64, positives, weights)
            truth = run(image.double(), text.double(), kind, **wide)
        for i, (a, b, c) in enumerate(zip(found, eager, truth, strict=True)):
            assert_close_to_truth(f"tensor {i}", a, b, c, dtype)


def pairs_of(image_ids, text_ids):
    pairs = (image_ids[:, None] == text_ids).nonzero()
    return pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(2))]


@on
@kinds
@pytest.mark.parametrize("B,T,classes", [(70, 130, 9), (5, 70, 1), (6, 6, 40)])
def test_the_pairs_of_equal_ids_give_the_bits_of_the_ids(B, T, classes, kind, backend):
    """Loss and every gradient, whatever the order of the list."""
    g = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, classes, (n,), generator=g).to(device_of(backend)) for n in (B, T)]
    for dtype in wide_and_narrow(backend):
        image, text = features(B, T, 9, dtype)
        with running_on(backend):
            expected = run(image, text, kind, image_ids=ids[0], text_ids=ids[1])
            for weights in (None, torch.ones):
                pairs = pairs_of(*ids)
                listed = on_device(backend, dtype, pairs, weights and weights(len(pairs)))
                found = run(image, text, kind, **listed)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@kinds
def test_the_definition_has_the_values_of_its_ids(kind):
    ids = torch.tensor([0, 1, 1, 2, 9]), torch.tensor([1, 0, 2, 2, 7, 1])
    with ok.backend("reference"):
        expected = run(*features(5, 6, 4), kind, image_ids=ids[0], text_ids=ids[1])
        found = run(*features(5, 6, 4), kind, positives=pairs_of(*ids))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


@on
@kinds
def test_a_pair_listed_twice_has_the_sum_of_its_weights(kind, backend):
    dtype = exact(backend)[-1]
    image, text = features(5, 6, 4, dtype)
    twice = torch.tensor([[1, 2], [3, 0], [1, 2], [0, 5]]), torch.tensor([0.25, 1.0, 0.5, 0.0])
    once = torch.tensor([[3, 0], [1, 2]]), torch.tensor([1.0, 0.75])
    with running_on(backend):
        found, expected = (
            run(image, text, kind, **on_device(backend, dtype, *listed)) for listed in (twice, once)
        )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on
@kinds
def test_an_empty_list_is_ids_that_match_nowhere(kind, backend):
    device, dtype = device_of(backend), exact(backend)[-1]
    image, text = features(4, 5, 3, dtype)
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    with running_on(backend):
        found = run(image, text, kind, **on_device(backend, dtype, nothing, torch.zeros(0)))
        ids = torch.arange(9, device=device)
        expected = run(image, text, kind, image_ids=ids[:4], text_ids=ids[4:])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if kind == "softmax":
        assert not any(bool(x.any()) for x in found)


@on
@kinds
@pytest.mark.parametrize("B,T", [(0, 0), (0, 3), (3, 0)])
def test_nothing_on_a_side(B, T, kind, backend):
    with running_on(backend):
        nothing = on_device(backend, torch.float32, torch.zeros(0, 2, dtype=torch.int64))
        assert not any(
            bool(x.any()) for x in run(*features(B, T, 4, torch.float32), kind, **nothing)
        )


@on
@kinds
def test_pairs_outside_are_left_out_where_nobody_looks(kind, backend, monkeypatch):
    """As on a GPU: nothing is read out of bounds, which the emulation guards."""
    monkeypatch.setattr(_check, "_numbers", lambda x: [])
    dtype = exact(backend)[-1]
    image, text = features(5, 6, 4, dtype)
    inside = torch.tensor([[1, 2], [3, 0]])
    far = 2**62
    outside = [[5, 0], [-1, 3], [0, 6], [2, -1], [far, far], [-far, 1], [1, far], [far, -far]]
    mixed = torch.cat([torch.tensor(outside), inside])
    with running_on(backend):
        found = run(image, text, kind, **on_device(backend, dtype, mixed))
        expected = run(image, text, kind, **on_device(backend, dtype, inside))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        for bad in (torch.nan, torch.inf):
            listed = on_device(backend, dtype, inside, torch.tensor([1.0, bad]))
            loss = run(image, text, kind, **listed)[0]
            assert not bool(loss.isfinite()) or (bad == torch.inf and kind == "sigmoid")


@on
def test_weights_of_a_row_count_among_each_other(backend):
    """From the least that is allowed to the largest, and a factor changes nothing."""
    dtype = exact(backend)[-1]
    image, text = features(5, 6, 4, dtype)
    positives, weights = a_list(5, 6, 12)
    weights = weights + 0.5
    with running_on(backend):
        one, other, least, most = (
            run(image, text, "softmax", **on_device(backend, dtype, positives, factor * weights))
            for factor in (1.0, 4.0, 1e-14, 1e14)
        )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for found in (least, most):
        for a, b in zip(found, one, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_weights_get_no_gradient():
    weights = torch.ones(2, requires_grad=True)
    positives = torch.tensor([[0, 1], [1, 1]])
    image = torch.randn(3, 4, requires_grad=True)
    for backend in ("cpu", "reference"):
        with ok.backend(backend):
            loss = ok.contrastive_loss(
                image, torch.randn(3, 4), 2.0, positives=positives, positive_weights=weights
            )
        assert torch.autograd.grad(loss, [image, weights], allow_unused=True)[1] is None


class _Largest(TorchDispatchMode):
    """The most numbers that a tensor made inside holds."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return found


@kinds
def test_nothing_of_the_size_of_the_matrix_is_made(kind):
    """Between the kernels, forward and backward; these work off tiles and blocks."""
    image, text = features(600, 500, 4)
    positives, weights = a_list(600, 500, 1500)
    with _Largest() as largest:
        run(image, text, kind, positives=positives, positive_weights=weights)
    assert 3000 <= largest.numbers <= 4000


@kinds
def test_lists_of_any_length_compile_once(kind):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def call(image, text, scale, positives, weights):
        options = {} if kind == "softmax" else {"kind": kind}
        return ok.contrastive_loss(
            image, text, scale, positives=positives, positive_weights=weights, **options
        )

    compiled, first = torch.compile(call, fullgraph=True, dynamic=True, backend=counter), 0
    for B, T, count in ((5, 9, 13), (6, 7, 21), (11, 4, 3)):
        given = *features(B, T, 8), torch.tensor(2.0).double(), *a_list(B, T, count)
        assert torch.equal(compiled(*given), call(*given))
        first = first or counter.frame_count
    assert counter.frame_count == first <= 2


def test_vmap_over_lists():
    image, text = features(4, 5, 3)
    lists = torch.stack([a_list(4, 5, 6, seed)[0] for seed in (1, 2)])
    weights = torch.rand(2, 6)

    def call(positives, weights):
        return ok.contrastive_loss(image, text, 2.0, positives=positives, positive_weights=weights)

    expected = torch.stack([call(*given) for given in zip(lists, weights, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(lists, weights), expected)
    with pytest.raises(ValueError, match="positives holds text 7"):
        torch.vmap(call)(lists.clone().index_fill_(2, torch.tensor([1]), 7), weights)


def test_one_thread_and_two_give_the_same_bits():
    image, text = features(300, 700, 8, torch.float32)
    positives, weights = a_list(300, 700, 5000)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(
                run(image, text, "softmax", positives=positives, positive_weights=weights)
            )
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
