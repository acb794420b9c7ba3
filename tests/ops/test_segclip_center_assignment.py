"""What is special about segclip_center_assignment: it equals the chain of torch modules, at real
widths; bad input.
"""

import pytest
import torch
from backends import COMPILED, device_of, dtypes, parameters, running_on
from torch import nn

import ovseg_kernels as ok
from ovseg_kernels import philox
from ovseg_kernels.reference.segclip_center_assignment import grouped_linear
from ovseg_kernels.testing import assert_close_to_truth

on = pytest.mark.parametrize("backend", parameters(of="segclip_center_assignment"))


def weights(D, size):
    spread = [torch.randn(D) * 0.2 for _ in range(4)]
    return [
        torch.randn(D, size) / size**0.5,
        torch.randn(D, size) / size**0.5,
        1 + spread[0],
        spread[1],
        1 + spread[2],
        spread[3],
    ]


def run(tensors, upstream, **options):
    tensors = [x.detach().requires_grad_() for x in tensors]
    pooled, index, _ = ok.segclip_center_assignment(*tensors, **options)
    return index, pooled, *torch.autograd.grad(pooled, tensors, upstream.to(pooled.dtype))


@on
@pytest.mark.parametrize("B,G,L,D,size", [(1, 1, 1, 2, 1), (2, 8, 70, 48, 16), (3, 3, 65, 24, 24)])
def test_sizes(B, G, L, D, size, backend):
    device = device_of(backend)
    inputs = [torch.randn(B, G, D), torch.randn(B, L, D), *weights(D, size)]
    upstream, noise = torch.randn(B, G, D, device=device), torch.randn(B, G, L, device=device)
    options = {"scale": D**-0.5, "hard": False, "tau": 0.9, "noise": noise}
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
@pytest.mark.parametrize("rows,D,size", [(70, 48, 16), (131, 72, 24), (5, 136, 136), (1, 6, 1)])
def test_inverse_std_keeps_its_digits_where_the_mean_is_large(rows, D, size, backend):
    """A thousand times the deviation in float32, where E[y^2] - E[y]^2 has lost all digits of the
    variance. Groups that fill a tile of the kernel, that do not, and wider ones.
    """
    if backend in COMPILED and size != 16:
        pytest.skip("three kernels for each width and dtype")
    device = device_of(backend)
    noise, tokens = torch.randn(D, size) / size**0.5, 1 + 1e-3 * torch.randn(2, rows, D)

    def eager(x, w):
        return (grouped_linear(x, w).var(-1, unbiased=False) + 1e-5).rsqrt()

    def found(x, w):
        return torch.ops.ovseg.grouped_inverse_std(x, w, 1e-5)

    upstream = torch.randn(2, rows, device=device)
    for dtype in dtypes(backend):
        mean = 1000 if dtype == torch.float32 else 4
        inputs = [x.to(device, dtype) for x in (tokens, noise + mean / size)]

        def run(function, to=dtype, inputs=inputs):
            leaves = [x.to(to).requires_grad_() for x in inputs]
            with running_on(backend):
                out = function(*leaves)
                return out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))

        results = run(found), run(eager), run(eager, torch.float64)
        for name, *three in zip(("r", "d tokens", "d weight"), *results, strict=True):
            assert_close_to_truth(name, *three, dtype)


@on
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_chain_of_modules(training, backend):
    """LayerNorm, grouped Conv1d and the definition of the mapping, written with torch's modules:
    values, indices, gradients.
    """
    B, G, L, D, groups = 2, 4, 30, 24, 3
    device, options = device_of(backend), {"dtype": torch.float64}
    torch.set_default_dtype(torch.float64)
    try:
        norm, key_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        key, value = (nn.Conv1d(D, D, 1, groups=groups, bias=False) for _ in range(2))
        for parameter in (*norm.parameters(), *key_norm.parameters()):
            nn.init.normal_(parameter)
    finally:
        torch.set_default_dtype(torch.float32)
    modules = nn.ModuleList([norm, key_norm, key, value]).to(device)
    q, x = (
        torch.randn(B, G, D, **options).to(device).requires_grad_(),
        torch.randn(B, L, D, **options).to(device).requires_grad_(),
    )
    rng = philox.make_rng(9, device=device)
    noise = (
        philox.gumbel(rng, (B, L, G)).transpose(1, 2)
        if training
        else torch.zeros(B, G, L, device=device)
    )
    tau = 0.9 if training else 1.0

    normed = norm(x).transpose(1, 2)
    k, v = key_norm(key(normed).transpose(1, 2)), value(normed).transpose(1, 2)
    y = ((q @ k.transpose(1, 2) + noise) / tau).softmax(1)
    hard = torch.zeros_like(y).scatter_(1, y.argmax(1, keepdim=True), 1) - y.detach() + y
    expected = hard @ v / hard.sum(-1, keepdim=True).clamp(min=1)

    arguments = (
        q,
        x,
        key.weight[..., 0],
        value.weight[..., 0],
        norm.weight,
        norm.bias,
        key_norm.weight,
        key_norm.bias,
    )
    with running_on(backend):
        found, index, _ = ok.segclip_center_assignment(
            *arguments, tau=tau, rng=rng if training else None
        )
        assert torch.equal(index, y.argmax(1))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # Philox noise is float32
        leaves, upstream = [q, x, *modules.parameters()], torch.randn_like(found)
        one = (index[..., None] == torch.arange(G, device=device)).sum(1) == 1
        upstream[one] = (
            # at one token the official clamp passes a gradient in some releases of torch and none
            # in others
            0
        )
        for a, b in zip(
            torch.autograd.grad(found, leaves, upstream),
            torch.autograd.grad(expected, leaves, upstream),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@on
def test_masked_tokens_reach_nothing(backend):
    with torch.device(device_of(backend)), running_on(backend):
        tensors = [torch.randn(2, 3, 8), torch.randn(2, 12, 8), *weights(8, 4)]
        mask = torch.rand(2, 12) > 0.4
        mask[1] = False
        tensors[1][~mask] = float("nan")
        _, pooled, *grads = run(
            [x.to(mask.device) for x in tensors], torch.ones(2, 3, 8), mask=mask
        )
        assert torch.equal(pooled[1], torch.zeros(3, 8)) and all(
            bool(g.isfinite().all()) for g in (pooled, *grads)
        )
        assert torch.equal(grads[1][~mask], torch.zeros_like(grads[1][~mask]))


def test_empty():
    for B, L in ((0, 4), (2, 0)):
        index, pooled, *grads = run(
            [torch.randn(B, 3, 8), torch.randn(B, L, 8), *weights(8, 4)], torch.ones(B, 3, 8)
        )
        assert (
            index.shape == (B, L)
            and torch.equal(pooled, torch.zeros(B, 3, 8))
            and all(bool((g == 0).all()) for g in grads)
        )
