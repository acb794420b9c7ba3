"""Numbers that are not finite, or whose squares are not: every backend gives what the definition
gives. No NaN is lost on the way.
"""

import pytest
import torch
from backends import BACKENDS, COMPILED, SLOW, device_of, has, parameters, running_on
from samples import MAKERS, all_samples

import ovseg_kernels as ok

SAMPLES = all_samples(torch.float32)
VALUES = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": -float("inf")}
# Their definitions project before they assign: what NaN meets zero in is not the same sum. No NaN
# may be lost, more may be found.
FOLDED = ("folded_center_assignment", "segclip_center_assignment")


def everywhere(op):
    return pytest.mark.parametrize("backend", parameters(of=op))


def held(what):
    return pytest.mark.bad_input("operators", what)


def run(sample, tensors, upstream=None):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = sample.call(*leaves)
    return [
        out.detach(),
        *torch.autograd.grad(out, leaves, torch.ones_like(out), materialize_grads=True),
    ]


def planted():
    """A sample with one number replaced: every sample where that is quick, the first of an operator
    elsewhere.
    """
    first = {}
    for place, sample in enumerate(SAMPLES):
        if not sample.discrete:
            first.setdefault(sample.op, place)
    for name in BACKENDS:
        few = name in (*SLOW, *COMPILED)
        for place, sample in enumerate(SAMPLES):
            if (
                sample.discrete
                or not has(sample.op, name)
                or (few and (place != first[sample.op] or sample.op in FOLDED))
            ):
                continue
            marks = [pytest.mark.gpu] if name in ("cuda", "triton") else []
            yield pytest.param(place, name, id=f"{sample}-{name}", marks=marks)


@held("NaN or an infinity in one place of an argument with a gradient")
@pytest.mark.parametrize("place,backend", list(planted()))
def test_what_is_not_finite_arrives_as_in_the_definition(place, backend):
    sample = all_samples(torch.float32, device_of(backend))[place]
    for i, x in enumerate(sample.tensors):
        for what, value in VALUES.items():
            if x.numel() == 1 or (what != "NaN" and (sample.op in FOLDED or backend in SLOW)):
                # a number that is not finite is refused where it is one of the call's options
                continue
            tensors = [y.detach().clone() for y in sample.tensors]
            tensors[i].view(-1)[-1] = value
            with ok.backend("reference"):
                expected = run(sample, tensors)
            with running_on(backend):
                found = run(sample, tensors)
            bad, lost = ~found[0].isfinite(), ~expected[0].isfinite()
            assert torch.equal(bad, lost) or (sample.op in FOLDED and bool((bad | ~lost).all())), (
                f"{what} in argument {i}"
            )
            for j, (a, b) in enumerate(zip(expected[1:], found[1:], strict=True)):
                assert bool(b.isfinite().all()) <= bool(a.isfinite().all()), (
                    f"{what} in argument {i} is lost in gradient {j}"
                )


def assignment(G=3, L=7, D=5):
    torch.manual_seed(0)
    return {
        "queries": torch.randn(2, G, D),
        "keys": torch.randn(2, L, D),
        "values": torch.randn(2, L, D),
        "noise": torch.randn(2, G, L),
        "center_bias": torch.randn(2, G),
        "key_scale": torch.rand(2, L),
    }


PLACES = {
    "queries": (0,),
    "keys": (0, 4),
    "values": (0, 4, 2),
    "noise": (0, 1, 4),
    "center_bias": (0, 2),
    "key_scale": (0, 4),
}


@pytest.mark.parametrize(
    "normalizer,hard", [("mean", True), ("mean_plus_one", True), ("sum", True), ("mean", False)]
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=held(f"{x} of center_assignment that hold NaN or infinity"))
        for x in PLACES
    ],
)
@everywhere("center_assignment")
def test_center_assignment_hides_nothing(backend, name, normalizer, hard):
    """A token whose softmax is NaN has a weight of NaN for all centers of its image; the other
    image is left alone.
    """
    if backend in COMPILED and not (hard and normalizer == "mean"):
        pytest.skip("each option is a compilation")
    for value in (float("nan"), float("inf"), -float("inf")):
        given = {key: x.to(device_of(backend)) for key, x in assignment().items()}
        given[name][PLACES[name]] = value
        with ok.backend("reference"):
            expected = ok.center_assignment(
                **given, normalizer=normalizer, hard=hard, return_soft=True
            )
        with running_on(backend):
            found = ok.center_assignment(
                **given, normalizer=normalizer, hard=hard, return_soft=True
            )
        assert torch.equal(found.index, expected.index), value
        torch.testing.assert_close(found.pooled, expected.pooled, equal_nan=True)
        torch.testing.assert_close(found.soft, expected.soft, equal_nan=True)
        assert bool(found.pooled[1].isfinite().all())
        if name not in ("values", "center_bias", "noise") or value != -float("inf"):
            assert not bool(found.pooled[0].isfinite().all())


@held("a diverged model: all queries NaN")
@everywhere("center_assignment")
def test_a_diverged_model_does_not_train_on(backend):
    given = {key: x.to(device_of(backend)) for key, x in assignment().items()}
    given["queries"] = torch.full_like(given["queries"], float("nan")).requires_grad_()
    with running_on(backend):
        pooled = ok.center_assignment(**given).pooled
        assert bool(pooled.isnan().all())
        assert bool(torch.autograd.grad(pooled.sum(), given["queries"])[0].isnan().all())


LONG = {
    "one entry": lambda x: x.view(-1)[3:4].fill_(1e20),
    "two rows": lambda x: x[..., 0].view(-1)[:2].fill_(-1e20),
    "all": lambda x: x.mul_(1e20),
}


@pytest.mark.parametrize(
    "pool,weight",
    [
        ("vector", "softmax"),
        ("vector", "sigmoid"),
        ("score", "softmax"),
        ("max", "softmax"),
        ("mean", "softmax"),
    ],
)
@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=held(f"features whose squares overflow: {what} of 1e20"))
        for what in LONG
    ],
)
@everywhere("patch_text_similarity")
def test_lengths_whose_squares_overflow(backend, what, pool, weight):
    """Against float64: cosines, and the weights' gradient through them, do not know how long a
    patch is.
    """
    if backend in COMPILED and weight == "sigmoid":
        pytest.skip("each option is a compilation")
    if device_of(backend) == "cuda" and pool == "mean":
        pytest.skip("torch's own norm, whose overflow is NaN on a GPU")
    for longer in ("patches", "texts"):
        for shape in ((2, 7, 40), (2, 40, 8)):  # v of the Gram form, v itself
            torch.manual_seed(1)
            patches, texts = torch.randn(*shape), torch.randn(9, shape[2])
            LONG[what](patches if longer == "patches" else texts)
            upstream = torch.randn(2, 9)

            def both(dtype, device, patches=patches, texts=texts, upstream=upstream):
                leaves = [x.to(device, dtype).requires_grad_() for x in (patches, texts)]
                out = ok.patch_text_similarity(*leaves, pool=pool, weight=weight)
                return [
                    out.detach().cpu(),
                    *(x.cpu() for x in torch.autograd.grad(out, leaves, upstream.to(out))),
                ]

            with ok.backend("reference"):
                truth, definition = both(torch.float64, "cpu"), both(torch.float32, "cpu")
            with running_on(backend):
                found = both(torch.float32, device_of(backend))
            for a, b, c in zip(truth, definition, found, strict=True):
                torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(c.double(), a, rtol=1e-4, atol=1e-5)


@held("pixels of dense_contrastive_loss whose squares overflow")
@everywhere("dense_contrastive_loss")
def test_pixels_whose_squares_overflow(backend):
    torch.manual_seed(2)
    pixels, texts = torch.randn(3, 7, 5), torch.randn(3, 5)
    pixels[0, 2, 1], pixels[1, 4] = 1e20, pixels[1, 4] * 1e25

    def both(dtype, device):
        leaves = [x.to(device, dtype).requires_grad_() for x in (pixels, texts)]
        out = ok.dense_contrastive_loss(*leaves, k_pos=3, k_neg=5)
        return [out.detach().cpu(), *(x.cpu() for x in torch.autograd.grad(out, leaves))]

    with ok.backend("reference"):
        truth = both(torch.float64, "cpu")
    with running_on(backend):
        for a, b in zip(truth, both(torch.float32, device_of(backend)), strict=True):
            torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=1e-5)


@held("features of contrastive_loss whose squares overflow")
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_features_whose_squares_overflow(kind):
    torch.manual_seed(3)
    image, text = torch.randn(4, 6), torch.randn(4, 6)
    image[1, 2], text[3] = 1e20, 1e30 * text[3]
    truth = ok.contrastive_loss(image.double(), text.double(), 5.0, kind=kind)
    torch.testing.assert_close(
        ok.contrastive_loss(image, text, 5.0, kind=kind).double(), truth, rtol=1e-5, atol=1e-5
    )


@held("features whose squares overflow where no number may be read: NaN, and no zero")
def test_overflow_shows_where_it_is_not_looked_at(monkeypatch):
    """As on a GPU, and while a call is compiled."""
    from ovseg_kernels import _checking
    from ovseg_kernels._unit import unit

    x = torch.tensor([[1e20, 1.0], [3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(unit(x), torch.tensor([[1.0, 1e-20], [0.6, 0.8], [0.0, 0.0]]))
    monkeypatch.setattr(_checking, "looks_at_values", lambda x: False)
    assert unit(x).isnan().tolist() == [[True, True], [False, False], [False, False]]


@held("weights of segclip_center_assignment under which a variance overflows")
@pytest.mark.parametrize("name", ["key_weight", "norm_weight", "norm_bias"])
def test_an_infinite_variance_is_no_scale_of_zero(name):
    torch.manual_seed(4)
    given = {
        "queries": torch.randn(2, 3, 6),
        "tokens": torch.randn(2, 7, 6),
        "key_weight": torch.randn(6, 3),
        "value_weight": torch.randn(6, 3),
        **{n: torch.randn(6) for n in ("norm_weight", "norm_bias", "key_norm_weight")},
        "key_norm_bias": torch.zeros(6),
    }
    given[name].view(-1)[2] = 1e20
    for backend in ("reference", "cpu"):
        with ok.backend(backend):
            assert bool(ok.segclip_center_assignment(**given).pooled.isnan().any()), backend


@held("a temperature just above its bound")
@pytest.mark.parametrize("pool", ["vector", "score"])
@everywhere("patch_text_similarity")
def test_small_temperatures(backend, pool):
    """Down to the bound the value is right, and the gradient within what a rounded exponent leaves
    of it.
    """
    torch.manual_seed(5)
    patches, texts = (
        torch.randn(2, 12, 15),
        torch.randn(5, 15),
    )  # not a multiple of 16: compiled for other tests too
    for temperature in (1e-2, 1e-4, 2e-6):

        def both(dtype, device, temperature=temperature):
            leaves = [x.to(device, dtype).requires_grad_() for x in (patches, texts)]
            out = ok.patch_text_similarity(*leaves, temperature=temperature, pool=pool)
            return [out.detach().cpu(), *(x.cpu() for x in torch.autograd.grad(out.sum(), leaves))]

        with ok.backend("reference"):
            truth = both(torch.float64, "cpu")
        with running_on(backend):
            value, *grads = both(torch.float32, device_of(backend))
        torch.testing.assert_close(value.double(), truth[0], rtol=1e-4, atol=1e-4)
        for a, b in zip(truth[1:], grads, strict=True):
            torch.testing.assert_close(
                b.double(), a, rtol=0, atol=(1e-5 + 5e-7 / temperature) * float(a.abs().max())
            )


@held("the smallest tau that is taken")
@everywhere("center_assignment")
def test_small_tau_is_a_hard_choice(backend):
    given = {key: x.to(device_of(backend)) for key, x in assignment().items()}
    with running_on(backend):
        soft, hard = (ok.center_assignment(**given, tau=1e-15, hard=hard) for hard in (False, True))
    assert torch.equal(soft.index, hard.index)
    torch.testing.assert_close(soft.pooled, hard.pooled)


def test_the_table_covers_every_operator_with_a_gradient():
    assert {SAMPLES[p.values[0]].op for p in planted()} == {
        op for op in MAKERS if not any(s.op == op and s.discrete for s in SAMPLES)
    }
