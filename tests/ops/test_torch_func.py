"""torch.func and forward mode: what reverse mode can do is autograd's result, everything else is an
error and never a zero.
"""

import contextlib

import pytest
import torch
from samples import MAKERS, all_samples
from torch import func
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

import ovseg_kernels as ok
from ovseg_kernels import _library

SAMPLES = all_samples()
first = {s.op: s for s in reversed(SAMPLES)}
operators = pytest.mark.parametrize("op", MAKERS)


def on(samples):
    """The rules are those of the schemas, above whatever answers: the CPU's kernels stand for all."""
    samples = list(samples)
    return pytest.mark.parametrize("sample", samples, ids=map(str, samples))


smooth = on(s for s in SAMPLES if not s.discrete)


def plain(sample):
    return tuple(x.detach() for x in sample.tensors)


def weighted(sample):
    """A scalar function of the sample's tensors, and autograd's gradients."""
    leaves = tuple(x.clone().requires_grad_() for x in plain(sample))
    out = sample.call(*leaves)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, leaves, upstream, materialize_grads=True)
    return lambda *tensors: (sample.call(*tensors) * upstream).sum(), grads, upstream


@contextlib.contextmanager
def no_fallback():
    """A call for each element by torch, after one warning on the error stream, is an error here."""
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(True)


def test_every_schema_has_a_rule():
    for name in _library.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"ovseg::{name}", "FuncTorchBatched"
        ), name


@smooth
def test_grad_vjp_and_jacrev_are_autograd(sample):
    tensors, places = plain(sample), tuple(range(len(sample.tensors)))
    function, expected, upstream = weighted(sample)
    found = [
        func.grad(function, argnums=places)(*tensors),
        func.vjp(sample.call, *tensors)[1](upstream),
    ]
    assert all(torch.equal(a, b) for grads in found for a, b in zip(grads, expected, strict=True))
    rows = func.jacrev(sample.call)(*tensors)
    torch.testing.assert_close(torch.tensordot(upstream, rows, dims=upstream.dim()), expected[0])


@smooth
def test_gradients_of_each_sample(sample):
    """vmap of grad and grad of vmap, over all tensors, over the first or over all others, and the
    batch in the last dimension.
    """
    tensors, places = plain(sample), tuple(range(len(sample.tensors)))
    many = tuple(torch.stack([x, x.flip(0) if x.dim() else 1.1 * x]) for x in tensors)
    with no_fallback():
        function, *_ = weighted(sample)
        grad = func.grad(function, argnums=places)
        for chosen in (set(places), {0}, set(places) - {0}):
            if not chosen:
                continue
            dims = tuple(0 if i in chosen else None for i in places)
            given = tuple(many[i] if i in chosen else tensors[i] for i in places)
            found = torch.vmap(grad, in_dims=dims)(*given)
            for i in range(2):
                expected = grad(
                    *(x[i] if dim == 0 else x for x, dim in zip(given, dims, strict=True))
                )
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a[i], b)
        expected = torch.stack([sample.call(*(x[i] for x in many)) for i in range(2)])
        torch.testing.assert_close(torch.vmap(sample.call)(*many), expected)
        last = torch.vmap(sample.call, in_dims=(-1, *(None,) * (len(places) - 1)))(
            many[0].movedim(0, -1), *tensors[1:]
        )
        torch.testing.assert_close(
            last, torch.stack([sample.call(x, *tensors[1:]) for x in many[0]])
        )
        whole = func.grad(lambda *x: torch.vmap(function)(*x).sum(), argnums=places)(*many)
        for place, found in enumerate(whole):
            torch.testing.assert_close(
                found, torch.stack([grad(*(x[i] for x in many))[place] for i in range(2)])
            )


@on(first.values())
def test_vmap_of_vmap(sample):
    many = tuple(torch.stack([x, x.flip(0) if x.dim() else 1.1 * x]) for x in plain(sample))
    with no_fallback():
        expected = torch.stack([sample.call(*(x[i] for x in many)) for i in range(2)])
        found = torch.vmap(torch.vmap(sample.call))(*(torch.stack([x, x.flip(0)]) for x in many))
        torch.testing.assert_close(found, torch.stack([expected, expected.flip(0)]))


def forward_mode(sample):
    """Ways to ask for a derivative in forward mode."""
    tensors = plain(sample)
    ones = tuple(torch.ones_like(x) for x in tensors)

    def dual(leaf):
        with forward_ad.dual_level():
            return sample.call(
                *(
                    forward_ad.make_dual(x.clone().requires_grad_(leaf), one)
                    for x, one in zip(tensors, ones, strict=True)
                )
            )

    yield lambda: func.jvp(sample.call, tensors, ones)
    yield lambda: func.jacfwd(sample.call)(*tensors)
    yield lambda: dual(False)
    yield lambda: dual(True)
    yield lambda: torch.vmap(lambda *x: func.jvp(sample.call, x, ones)[1])(
        *(x[None] for x in tensors)
    )
    if not sample.discrete:
        yield lambda: func.hessian(lambda *x: sample.call(*x).sum())(*tensors)


@pytest.mark.bad_input("operators", "a derivative in forward mode")
@on(s for s in first.values() if not s.plain)
def test_forward_mode_is_an_error(sample):
    for ask in forward_mode(sample):
        instead = (
            "constants; pass the detach"
            if sample.discrete
            else "or the definition: with ovseg_kernels.backend"
        )
        names = (
            f"({sample.op}|center_assignment|contrastive_loss)"  # those that others are built on
        )
        with pytest.raises(
            NotImplementedError, match=rf"{names} has no forward-mode derivative .*{instead}"
        ):
            ask()


@pytest.mark.bad_input("operators", "a second derivative under torch.func")
@operators
def test_second_derivative_under_func_is_an_error(op):
    sample = first[op]
    if not sample.discrete:
        with pytest.raises(RuntimeError, match="has no second derivative"):
            func.jacrev(func.jacrev(lambda *x: sample.call(*x).square().sum()))(*plain(sample))


@pytest.mark.parametrize("sample", [s for s in SAMPLES if not s.discrete and not s.mixed], ids=str)
def test_the_definition_has_a_forward_mode(sample):
    """What the message sends people to: <w, J t> = <J^T w, t>."""
    tensors = plain(sample)
    tangents = tuple(torch.randn(x.shape, dtype=x.dtype) for x in tensors)
    with ok.backend("reference"):
        out, along = func.jvp(sample.call, tensors, tangents)
        upstream = torch.randn_like(out)
        back = func.vjp(sample.call, *tensors)[1](upstream)
    torch.testing.assert_close(
        (along * upstream).sum(), sum((a * b).sum() for a, b in zip(back, tangents, strict=True))
    )


@pytest.mark.parametrize("op", ["patch_text_similarity", "center_assignment", "contrastive_loss"])
def test_compiled_func_grad(op):
    """torch.compile goes through torch.func into the same kernel."""
    function, expected, _ = weighted(first[op])
    torch._dynamo.reset()
    found = torch.compile(
        func.grad(function, argnums=tuple(range(len(expected)))), backend="aot_eager"
    )(*plain(first[op]))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", [op for op in MAKERS if first[op].discrete])
def test_labels_of_what_is_detached_are_constants(op):
    (logits,) = plain(first[op])
    labels, tangent = func.jvp(
        lambda x: first[op].call(x.detach()), (logits,), (torch.ones_like(logits),)
    )
    assert torch.equal(labels, first[op].call(logits)) and not bool(tangent.any())


@pytest.mark.bad_input("operators", "a number that is refused, inside of torch.vmap")
def test_numbers_of_a_batch_are_looked_at():
    """Checks read every element of the batch, and no wrapper of torch.func."""
    patches, texts = torch.randn(2, 3, 4), torch.randn(2, 4)
    similar = torch.vmap(lambda t: ok.patch_text_similarity(patches, texts, temperature=t))
    assert similar(torch.tensor([0.1, 0.2])).shape == (2, 2, 2)
    with pytest.raises(ValueError, match="temperature is nan; expected a positive finite number"):
        similar(torch.tensor([0.1, float("nan")]))
    logits = torch.randn(2, 1, 3, 4, 4)
    labels = torch.vmap(lambda x: ok.upsample_argmax(x, (8, 8)))
    assert torch.equal(labels(logits)[1], ok.upsample_argmax(logits[1], (8, 8)))
    logits[1, 0, 2, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="logits or bias holds NaN"):
        labels(logits)
    cover = torch.vmap(lambda x, at: ok.window_argmax(x, at, (8, 8), (8, 12), (8, 8)))
    with pytest.raises(ValueError, match=r"origins holds \(0, 5\)"):
        cover(torch.randn(2, 2, 3, 4, 4), torch.tensor([[[0, 0], [0, 4]], [[0, 0], [0, 5]]]))
