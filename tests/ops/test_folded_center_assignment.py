"""What is special about folded_center_assignment: it equals projecting first, at real widths and in
every dtype; bad input.
"""

import pytest
import torch
from backends import device_of, dtypes, parameters, running_on
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels import philox
from ovseg_kernels.testing import assert_close_to_truth

on = pytest.mark.parametrize("backend", parameters(of="folded_center_assignment"))


def run(tensors, upstream, **options):
    tensors = [x.detach().requires_grad_() for x in tensors]
    pooled, index, _ = ok.folded_center_assignment(*tensors, **options)
    return index, pooled, *torch.autograd.grad(pooled, tensors, upstream.to(pooled.dtype))


@on
@pytest.mark.parametrize(
    "B,G,L,C,D,E", [(1, 1, 1, 1, 1, 1), (2, 8, 70, 48, 32, 40), (1, 3, 196, 24, 64, 17)]
)
def test_sizes(B, G, L, C, D, E, backend):
    device = device_of(backend)
    shapes = ((B, G, D), (B, L, C), (D, C), (E, C), (D,), (E,))
    inputs = [torch.randn(*s) / (s[-1] ** 0.5 if i in (2, 3) else 1) for i, s in enumerate(shapes)]
    upstream, noise = torch.randn(B, G, E, device=device), torch.randn(B, G, L, device=device)
    options = {"scale": D**-0.5, "hard": False, "noise": noise}
    for dtype in dtypes(backend):
        tensors = [x.to(device, dtype if i < 2 else torch.float32) for i, x in enumerate(inputs)]
        with running_on(backend):
            found = run(tensors, upstream, **options)
        with ok.backend("reference"):
            eager = run(tensors, upstream, **options)
            truth = run(
                [x.double() for x in tensors], upstream, **{**options, "noise": noise.double()}
            )
        for i, (a, b, c) in enumerate(zip(found[1:], eager[1:], truth[1:], strict=True)):
            assert_close_to_truth(f"tensor {i}", a, b, c, dtype)


@on
def test_equals_center_assignment_of_projected_tokens(backend):
    with torch.device(device_of(backend)), running_on(backend):
        q, x = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 30, 8, dtype=torch.float64)
        w_k, w_v = torch.randn(6, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
        b_k, b_v = torch.randn(6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
        for normalizer in ("mean", "mean_plus_one", "sum"):
            options = {
                "rng": philox.make_rng(3),
                "normalizer": normalizer,
                "mask": torch.rand(2, 30) > 0.3,
                "return_soft": True,
            }
            found = ok.folded_center_assignment(q, x, w_k, w_v, b_k, b_v, **options)
            expected = ok.center_assignment(
                q, F.linear(x, w_k, b_k), F.linear(x, w_v, b_v), **options
            )
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_tokens_are_not_projected():
    """Of all that is kept for backward, only the tokens have their size."""
    q, x, w = (
        torch.randn(2, 3, 16),
        torch.randn(2, 50, 16, requires_grad=True),
        torch.randn(16, 16, requires_grad=True),
    )
    large = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: large.add(t.data_ptr()) or t if t.numel() >= x.numel() else t, lambda t: t
    ):
        ok.folded_center_assignment(q, x, w, w)
    assert large == {x.data_ptr()}
