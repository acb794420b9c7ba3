"""What is special about center_assignment: golden tensors, flips, noise, normalizers, masks, sizes,
bad input.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import BACKENDS, COMPILED, device_of, dtypes, parameters, running_on
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels import philox
from ovseg_kernels.testing import assert_close_to_truth

GOLDEN = Path(__file__).parents[1] / "golden" / "groupvit_assign.npz"
UNCOMPILED = [name for name in BACKENDS if name not in COMPILED]
on = pytest.mark.parametrize("backend", parameters(of="center_assignment"))


def run(queries, keys, values, grad, **options):
    """Value, index and gradients."""
    tensors = [x.detach().requires_grad_() for x in (queries, keys, values)]
    pooled, index, _ = ok.center_assignment(*tensors, **options)
    return pooled, index, *torch.autograd.grad(pooled, tensors, grad.to(pooled.dtype))


@on
@pytest.mark.parametrize("case", ["g8", "g64"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_golden_tensors_of_the_official_module(case, mode, backend):
    """agg, dq, dk, dv of the assignment step, and which center every token goes to; see
    tests/golden/README.md.
    """
    device = device_of(backend)
    with np.load(GOLDEN) as file:

        def get(name):
            return torch.from_numpy(file[f"{case}/{name}"].astype(np.float32)).to(device)

        q, k, v = (get(f"out/assign/{name}") for name in "qkv")
        noise = get("in/noise")[:, 0] if mode == "train" else None
        with running_on(backend):
            pooled, index, *grads = run(q, k, v, get("in/d_agg"), scale=48**-0.5, noise=noise)
        assert torch.equal(index, get(f"out/{mode}/hard_idx").long())
        counts = F.one_hot(index, q.shape[1]).sum(1)
        assert torch.equal(counts, get(f"out/{mode}/counts").long())
        for name, found in zip(("agg", "dq", "dk", "dv"), (pooled, *grads), strict=True):
            expected = get(f"out/assign_{mode}/{name}")
            assert float((found - expected).detach().abs().max()) <= 1e-5 * float(
                expected.abs().max()
            ), name
        assert json.loads(str(file["meta/config"]))[case]["groups"] == q.shape[1]


@on
@pytest.mark.parametrize(
    "B,G,L,D,E",
    [
        (1, 1, 1, 1, 1),
        (2, 8, 7, 16, 24),
        (1, 8, 196, 72, 40),
        (2, 3, 257, 24, 5),
        (1, 5, 37, 300, 290),
        (1, 70, 65, 20, 33),
    ],
)
def test_sizes(B, G, L, D, E, backend):
    """Tails of tiles, one of everything, more centers than a tile; a flipped token is allowed only
    within rounding of a tie.
    """
    if G > 64 and backend in COMPILED:
        pytest.skip("twelve compilations: the golden tensors have many centers too")
    device = device_of(backend)
    mask = (torch.rand(B, L) > 0.2).to(device)
    mask[:, 0] = True
    noise, grad = (torch.randn(B, G, L)).to(device), torch.randn(B, G, E, device=device)
    inputs = torch.randn(B, G, D), torch.randn(B, L, D), torch.randn(B, L, E)
    for dtype in dtypes(backend):
        q, k, v = (x.to(device, dtype) for x in inputs)
        for hard, normalizer in ((True, "mean"), (False, "mean_plus_one")):
            options = {
                "mask": mask,
                "noise": noise,
                "scale": D**-0.5,
                "tau": 0.8,
                "hard": hard,
                "normalizer": normalizer,
            }
            with running_on(backend):
                results = run(q, k, v, grad, **options)
            with ok.backend("reference"):
                eager = run(q, k, v, grad, **options)
                truth = run(
                    q.double(), k.double(), v.double(), grad, **{**options, "noise": noise.double()}
                )
            assert torch.equal(results[1], truth[1]), (
                "with these seeds no token is within rounding of a tie"
            )
            for name, i in (("pooled", 0), ("d queries", 2), ("d keys", 3), ("d values", 4)):
                assert_close_to_truth(name, results[i], eager[i], truth[i], dtype)


@pytest.mark.parametrize("backend", parameters(UNCOMPILED, of="center_assignment"))
@pytest.mark.parametrize("G", [8, 11])
@pytest.mark.parametrize("hard", [True, False])
def test_values_that_are_the_keys(hard, G, backend):
    """One tensor for both, whose gradient takes what both get: read once where centers are few.
    Bias, scale and soft are there, and rows are whole numbers of 16 bytes.
    """
    device = device_of(backend)
    B, L, D = 2, 70, 264
    shapes = ((B, G, D), (B, L, D), (B, G), (B, L))
    inputs = [torch.randn(*shape).to(device) for shape in shapes]
    mask = (torch.rand(B, L) > 0.2).to(device)
    upstream = torch.randn(B, G, D, device=device), torch.randn(B, G, L, device=device)

    def run(dtype, wide):
        q, x, bias, scale = (
            y.to(dtype).to(to).requires_grad_()
            for y, to in zip(inputs, (wide, wide, torch.float64, torch.float64), strict=True)
        )
        options = {"center_bias": bias, "key_scale": scale, "mask": mask, "hard": hard}
        pooled, index, soft = ok.center_assignment(
            q, x, x, scale=D**-0.5, normalizer="mean", return_soft=True, **options
        )
        grads = (g.to(y.dtype) for g, y in zip(upstream, (pooled, soft), strict=True))
        return (
            index,
            pooled,
            soft,
            *torch.autograd.grad((pooled, soft), (q, x, bias, scale), tuple(grads)),
        )

    for dtype in dtypes(backend):
        with running_on(backend):
            found = run(dtype, dtype)
        with ok.backend("reference"):
            eager, truth = run(dtype, dtype), run(dtype, torch.float64)
        assert torch.equal(found[0], truth[0])
        for i, three in enumerate(zip(found[1:], eager[1:], truth[1:], strict=True)):
            assert_close_to_truth(f"tensor {i}", *three, dtype)


KERNELS = parameters(("cpu", "cuda-emulated", "cuda"), of="center_assignment")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("hard", [True, False])
def test_more_centers_than_shared_memory_holds(hard, backend):
    """In float64 of 64 tokens, and their sums."""
    device = device_of(backend)
    tensors = [torch.randn(2, n, d).double().to(device) for n, d in ((420, 3), (66, 3), (66, 5))]
    grad = torch.randn(2, 420, 5, device=device)
    options = {"hard": hard, "rng": philox.make_rng(5, device=device)}
    with running_on(backend):
        found = run(*tensors, grad, **options)
    with ok.backend("reference"):
        expected = run(*tensors, grad, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("G", [3, 11])
def test_what_is_not_finite_spoils_no_other_image(G, backend):
    """A NaN of a key is in all of its image, an infinite value in its channel."""
    tensors = [torch.randn(3, n, 8) for n in (G, 40, 40)]
    tensors[1][0, 5] = torch.nan
    tensors[2][1, 7, 2] = torch.inf
    tensors = [x.to(device_of(backend)) for x in tensors]
    for hard in (True, False):
        with running_on(backend):
            pooled = ok.center_assignment(*tensors, hard=hard)[0]
        with ok.backend("reference"):
            expected = ok.center_assignment(*tensors, hard=hard)[0]
        assert bool(pooled[0].isnan().all()) and bool(pooled[2].isfinite().all())
        torch.testing.assert_close(pooled, expected, equal_nan=True)


@pytest.mark.parametrize("backend", KERNELS)
def test_tokens_that_several_blocks_share_are_added_in_order(backend):
    """1e8 - 1e8 + 1, tokens apart: any other order loses the one."""
    with torch.device(device_of(backend)), running_on(backend):
        values = torch.zeros(1, 192, 4)
        values[0, ::64] = torch.tensor([1e8, -1e8, 1.0])[:, None]
        pooled = ok.center_assignment(
            torch.ones(1, 1, 4), torch.ones(1, 192, 4), values, normalizer="sum"
        )[0]
        assert torch.equal(pooled, torch.ones(1, 1, 4))


def test_grids_lie_along_x():
    """Their y and z end at 65535, and images do not."""
    for path in (Path(__file__).parents[2] / "csrc" / "center_assignment").iterdir():
        assert not re.search(r"blockIdx\.[yz]|gridDim|dim3", path.read_text()), path


@on
def test_noise_from_rng_is_the_noise_of_philox(backend):
    device = device_of(backend)
    q, k, v = (
        torch.randn(2, 5, 8, device=device),
        torch.randn(2, 33, 8, device=device),
        torch.randn(2, 33, 4, device=device),
    )
    rng = philox.make_rng(11, 7, device=device)
    noise = philox.gumbel(rng, (2, 33, 5)).transpose(1, 2)
    with running_on(backend):
        drawn, given = (
            run(q, k, v, torch.ones(2, 5, 4, device=device), **kw)
            for kw in ({"rng": rng}, {"noise": noise})
        )
        other = ok.center_assignment(q, k, v, rng=philox.advance(rng, noise.numel()))[1]
    assert torch.equal(drawn[1], given[1]) and not torch.equal(drawn[1], other)
    for a, b in zip(drawn, given, strict=True):
        torch.testing.assert_close(a, b)


@on
def test_hard_pooling_is_a_segmented_mean(backend):
    with torch.device(device_of(backend)), running_on(backend):
        q, k, v = torch.randn(1, 3, 4), torch.randn(1, 20, 4), torch.randn(1, 20, 6)
        q[0, 2] = -10 * k.mean(1)  # a center that may stay empty
        for normalizer in ("mean", "mean_plus_one", "sum"):
            pooled, index, _ = ok.center_assignment(q, k, v, normalizer=normalizer)
            for g in range(3):
                mine = v[0, index[0] == g]
                n = {"mean": max(len(mine), 1), "mean_plus_one": len(mine) + 1, "sum": 1}[
                    normalizer
                ]
                torch.testing.assert_close(pooled[0, g], mine.sum(0) / n)


@on
def test_ties_go_to_the_first_center(backend):
    with torch.device(device_of(backend)), running_on(backend):
        q, k = torch.ones(1, 4, 3), torch.randn(1, 9, 3)
        pooled, index, soft = ok.center_assignment(q, k, torch.ones(1, 9, 2), return_soft=True)
        assert torch.equal(index, torch.zeros(1, 9, dtype=torch.int64))
        torch.testing.assert_close(soft, torch.full((1, 4, 9), 0.25))
        torch.testing.assert_close(pooled[0, :, 0], torch.tensor([0.9, 0.0, 0.0, 0.0]))


@on
def test_masked_tokens_reach_nothing(backend):
    with torch.device(device_of(backend)), running_on(backend):
        q, k, v = torch.randn(2, 3, 4), torch.randn(2, 12, 4), torch.randn(2, 12, 5)
        mask = torch.rand(2, 12) > 0.4
        mask[1] = False
        k[~mask], v[~mask] = float("nan"), float("inf")
        for hard in (True, False):
            tensors = [x.detach().requires_grad_() for x in (q, k, v)]
            pooled, index, soft = ok.center_assignment(
                *tensors, mask=mask, hard=hard, return_soft=True
            )
            grads = torch.autograd.grad(pooled.sum() + soft.square().sum(), tensors)
            assert bool((index[~mask] == -1).all()) and bool((index[mask] >= 0).all())
            assert torch.equal(pooled[1], torch.zeros(3, 5)) and bool(
                (soft.transpose(1, 2)[~mask] == 0).all()
            )
            for x, g in zip((q, k, v), grads, strict=True):
                assert bool(g.isfinite().all())
                if x is not q:
                    assert torch.equal(g[~mask], torch.zeros_like(g[~mask]))


@on
def test_strides_and_mixed_dtypes(backend):
    with torch.device(device_of(backend)), running_on(backend):
        base = torch.randn(9, 2, 6, 2)
        k, v = (
            base[..., 0].transpose(0, 1),
            base[..., 1].transpose(0, 1),
        )  # [2, 9, 6], no unit stride
        q = torch.randn(6, 4).T.expand(2, -1, -1)
        dense, grad = [x.contiguous() for x in (q, k, v)], torch.ones(2, 4, 6)
        for a, b in zip(run(q, k, v, grad), run(*dense, grad), strict=True):
            torch.testing.assert_close(a, b)
        pooled, *_ = ok.center_assignment(q, k.half(), v.half())
        assert (
            pooled.dtype == torch.float16
        )  # of the values; scores in float32 from promoted operands


@pytest.mark.parametrize("backend", parameters(("cuda-emulated", "cuda"), of="center_assignment"))
@pytest.mark.parametrize("G", [5, 12])
@pytest.mark.parametrize("hard", [True, False])
def test_loads_of_16_bytes_and_of_one_element_pool_the_same(hard, G, backend):
    """Channels at a whole number of 16 bytes, and one element further; the sums have one order, and
    masked tokens are not read.
    """
    with torch.device(device_of(backend)), running_on(backend):
        mask = torch.rand(2, 139) > 0.3
        for dtype in dtypes(backend):
            queries, keys, base = (
                torch.randn(2, n, d).to(dtype) for n, d in ((G, 8), (139, 8), (139, 41))
            )
            base[~mask] = torch.nan
            narrow = base[..., 1:]
            found = [
                ok.center_assignment(queries, keys, v, hard=hard, mask=mask)[0]
                for v in (narrow.contiguous(), narrow)
            ]
            assert bool(found[0].isfinite().all()) and torch.equal(*found)


@on
@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 2), (2, 3, 0, 2, 2), (2, 3, 4, 2, 0)])
def test_empty(shape, backend):
    B, G, L, D, E = shape
    with torch.device(device_of(backend)), running_on(backend):
        found = run(
            torch.randn(B, G, D), torch.randn(B, L, D), torch.randn(B, L, E), torch.ones(B, G, E)
        )
        assert (
            found[0].shape == (B, G, E)
            and torch.equal(found[0], torch.zeros(B, G, E))
            and found[1].shape == (B, L)
        )
        assert all(bool((g == 0).all()) for g in found[2:]) or L > 0


def test_nothing_of_size_BGL_is_kept():
    q, k, v = (
        torch.randn(2, 8, 4, requires_grad=True),
        torch.randn(2, 50, 4, requires_grad=True),
        torch.randn(2, 50, 4, requires_grad=True),
    )
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        ok.center_assignment(q, k, v, rng=philox.make_rng(0))
    assert sum(kept) <= q.numel() + 2 * k.numel() + 2 * 8 * 4 + 2 * 50 + 2 * 8 + 2


@pytest.mark.parametrize(
    "backend", parameters(("cpu", "cuda-emulated", "cuda"), of="center_assignment")
)
def test_dispatcher_calls_are_checked_too(backend):
    with torch.device(device_of(backend)), running_on(backend):
        q, k = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
        with pytest.raises(RuntimeError, match="values has size"):
            torch.ops.ovseg.center_assignment(
                q, k, torch.randn(2, 6, 4), *(None,) * 5, 1.0, 1.0, True, 0, False
            )
        with pytest.raises(RuntimeError, match="normalizer is 7"):
            torch.ops.ovseg.center_assignment(q, k, k, *(None,) * 5, 1.0, 1.0, True, 7, False)
