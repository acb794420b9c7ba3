"""What is special about patch_text_similarity: sizes, properties that need no reference, strides,
bad input.
"""

import pytest
import torch
from backends import COMPILED, SLOW, device_of, dtypes, exact, parameters, running_on
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels.reference.patch_text_similarity import patch_text_similarity as definition
from ovseg_kernels.testing import assert_close_to_truth

POOLS = ("vector", "score", "max", "mean")
SIZES = [
    (1, 1, 1, 1),
    (2, 3, 1, 4),
    (2, 5, 7, 16),
    (1, 65, 196, 64),
    (3, 2, 257, 24),
    (2, 130, 33, 8),
    (1, 1, 4097, 8),
]
on = pytest.mark.parametrize("backend", parameters(of="patch_text_similarity"))
kernels = pytest.mark.parametrize(
    "backend",
    parameters(
        ("cuda-emulated", "triton-interpreted", "cuda", "triton"), of="patch_text_similarity"
    ),
)


def both(patches, texts, grad, **options):
    """Values and gradients of the kernel."""
    patches, texts = patches.detach().requires_grad_(), texts.detach().requires_grad_()
    out = ok.patch_text_similarity(patches, texts, **options)
    return out, *torch.autograd.grad(out, (patches, texts), grad.to(out.dtype))


@on
@pytest.mark.parametrize("B,T,N,D", SIZES)
@pytest.mark.parametrize("pool", POOLS)
def test_sizes(B, T, N, D, pool, backend):
    """Tails of tiles, both forms of the pooled vector, T != B, one of everything."""
    device = device_of(backend)
    if backend in SLOW:
        N = min(N, 1025)  # still seventeen tiles: half a minute less
    mask = torch.rand(B, N) > 0.3
    mask[:, 0] = True
    options = {"patch_mask": mask.to(device), "temperature": 0.2, "pool": pool}
    inputs = torch.randn(B, N, D), torch.randn(T, D), torch.randn(B, T)
    common = 2 * torch.randn(D)
    for dtype in dict.fromkeys(
        [*dtypes(backend), torch.float16]
    ):  # whose products are not those of bfloat16
        if backend in COMPILED and dtype.itemsize == 2 and D % 16:
            continue
        # Thousands of independent patches average out to the text's own direction: phi = 1, and in
        # 16 bits no gradient to measure.
        correlated = N > 1000 and (
            dtype == torch.bfloat16
            or (dtype == torch.float16 and backend not in ("reference", "cpu"))
        )
        patches, texts, grad = (
            (inputs[0] + correlated * common).to(device, dtype),
            inputs[1].to(device, dtype),
            inputs[2].to(device),
        )
        with running_on(backend):
            results = both(patches, texts, grad, **options)
        with ok.backend("reference"):
            eager = both(patches, texts, grad, **options)
            truth = both(patches.double(), texts.double(), grad, **options)
        for name, a, b, c in zip(
            ("similarity", "d patches", "d texts"), results, eager, truth, strict=True
        ):
            assert_close_to_truth(name, a, b, c, dtype)


@kernels
@pytest.mark.parametrize("weight", ["softmax", "sigmoid"])
def test_realistic_sizes(weight, backend):
    """Several chunks' worth of tiles in both forms: more texts than a tile, a width that is no
    multiple of one.
    """
    device = device_of(backend)
    for N, D in ((196, 72), (300, 40)):
        common, spread = (
            torch.randn(D),
            torch.randn(3, N, D),
        )  # correlated patches, as a network gives
        patches, texts, grad = (
            (common + spread).to(device),
            (common + torch.randn(70, D)).to(device),
            torch.randn(3, 70, device=device),
        )
        options = (
            {"temperature": 0.07}
            if weight == "softmax"
            else {"weight": weight, "weight_scale": 12.0}
        )
        with running_on(backend):
            results = both(patches, texts, grad, **options)
        with ok.backend("reference"):
            eager = both(patches, texts, grad, **options)
            truth = both(patches.double(), texts.double(), grad, **options)
        for name, a, b, c in zip(
            ("similarity", "d patches", "d texts"), results, eager, truth, strict=True
        ):
            assert_close_to_truth(name, a, b, c, torch.float32)


@on
@pytest.mark.parametrize("weight", ["softmax", "sigmoid"])
@pytest.mark.parametrize("first", [0, 1, 7])
def test_a_masked_patch_sets_no_scale(first, weight, backend):
    """Every patch that counts points away from the text, and masked ones come first.

    The largest logit is theirs: taken from a masked patch it would make all weights vanish, or
    alike.
    """
    device = device_of(backend)
    for dtype in exact(backend):
        tail = torch.tensor([-1.0, -0.9, -0.8, -0.7])
        s = torch.cat([torch.ones(first), tail]).to(device, dtype)
        patches = torch.stack([s, (1 - s * s).clamp(min=0).sqrt()], -1)[None]
        texts = torch.tensor([[1.0, 0.0]], device=device, dtype=dtype)
        mask = (torch.arange(first + 4, device=device) >= first)[None]
        scale = {"temperature": 1e-3} if weight == "softmax" else {"weight_scale": 1e3}
        for pool in ("vector", "score"):
            with running_on(backend):
                found = ok.patch_text_similarity(
                    patches, texts, patch_mask=mask, weight=weight, pool=pool, **scale
                )
            torch.testing.assert_close(found, torch.full_like(found, -0.7), rtol=1e-5, atol=1e-5)


# Gram form and pooled vectors; Triton has the second alone.
@pytest.mark.parametrize(
    "N,backend", [(70, "cuda-emulated"), (300, "cuda-emulated"), (70, "triton-interpreted")]
)
def test_one_image_at_a_time_gives_the_same(N, backend, monkeypatch):
    """A workspace too small for two images: every chunk after the first reads and writes at its own
    images.
    """
    inputs = torch.randn(3, N, 24), torch.randn(66, 24), torch.randn(3, 66)
    for pool in ("vector", "score", "max"):
        options = {"temperature": torch.tensor(0.2, requires_grad=True), "pool": pool}
        results = []
        for limit in (1, 64 << 20):  # the emulation keeps the last one
            with running_on(backend), monkeypatch.context() as patch:
                _limit_chunks(patch, backend, limit)
                patches, texts = (x.clone().requires_grad_() for x in inputs[:2])
                out = ok.patch_text_similarity(patches, texts, **options)
                wanted = (
                    (patches, texts) if pool == "max" else (patches, texts, options["temperature"])
                )
                results.append((out, *torch.autograd.grad(out, wanted, inputs[2])))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def _limit_chunks(patch, backend, limit):
    if backend == "triton-interpreted":
        from ovseg_kernels.triton import patch_text_similarity as kernels

        patch.setattr(kernels, "CHUNK_BYTES", limit)
        return
    import emulation

    emulation.load().set_patch_text_limit(limit)
    assert emulation.load().patch_text_plan(3, 66, 70, 24, 0, 0, True)["chunk"] == (
        1 if limit == 1 else 3
    )


@pytest.mark.parametrize("N", [196, 576])
@pytest.mark.parametrize("B,T", [(256, 256), (4096, 4096), (1, 100_000)])
def test_workspace_on_cuda_is_bounded(B, T, N):
    """Whatever the batch, within 64 MiB of chunk, up to 16 partial gradients of the texts, and what
    one image needs.
    """
    import emulation

    D = 512
    for backward in (False, True):
        plan = emulation.load().patch_text_plan(B, T, N, D, 0, 0, backward)
        one_image = 4 * (2 * N * (N + 8) + 2 * T * (N + 8) + T * (D + 8) + T * (2 + N / 32))
        assert plan["bytes"] <= max(72 << 20, 1.1 * one_image) + plan["slots"] * T * D * 4
        assert 1 <= plan["chunk"] <= B and plan["slots"] <= min(16, plan["chunk"])


@on
def test_order_of_patches_does_not_matter(backend):
    with torch.device(device_of(backend)), running_on(backend):
        patches, texts, order = torch.randn(2, 9, 6), torch.randn(3, 6), torch.randperm(9)
        for pool in POOLS:
            a = both(patches, texts, torch.ones(2, 3), pool=pool)
            b = both(patches[:, order], texts, torch.ones(2, 3), pool=pool)
            torch.testing.assert_close(a[0], b[0])
            torch.testing.assert_close(a[1][:, order], b[1])


@on
def test_length_of_texts_does_not_matter_and_gradients_are_tangent(backend):
    with torch.device(device_of(backend)), running_on(backend):
        wide = {"dtype": exact(backend)[-1]}
        patches, texts = torch.randn(2, 9, 6, **wide), torch.randn(3, 6, **wide)
        for pool in POOLS:
            out, _, d_texts = both(patches, texts, torch.randn(2, 3, **wide), pool=pool)
            torch.testing.assert_close(out, ok.patch_text_similarity(patches, 7 * texts, pool=pool))
            torch.testing.assert_close((d_texts * texts).sum(-1), torch.zeros(3, **wide))


@on
def test_limits_of_the_temperature(backend):
    with torch.device(device_of(backend)), running_on(backend):
        patches, texts = torch.randn(2, 50, 15), torch.randn(3, 15)
        for cold, hot in ((1e-3, 1e4),):
            torch.testing.assert_close(
                ok.patch_text_similarity(patches, texts, pool="score", temperature=cold),
                ok.patch_text_similarity(patches, texts, pool="max"),
                rtol=1e-3,
                atol=1e-4,
            )
            torch.testing.assert_close(
                ok.patch_text_similarity(patches, texts, pool="score", temperature=hot),
                ok.patch_text_similarity(patches, texts, pool="mean"),
                rtol=1e-3,
                atol=1e-4,
            )


@on
def test_one_patch_is_a_cosine(backend):
    with torch.device(device_of(backend)), running_on(backend):
        patches, texts = torch.randn(4, 1, 8), torch.randn(5, 8)
        cosine = F.cosine_similarity(patches, texts[None], dim=-1)
        for pool in POOLS:
            torch.testing.assert_close(ok.patch_text_similarity(patches, texts, pool=pool), cosine)


def test_splitting_the_batch_equals_concatenation():
    patches, texts = torch.randn(5, 20, 8), torch.randn(70, 8)
    whole = ok.patch_text_similarity(patches, texts)
    assert torch.equal(
        whole, torch.cat([ok.patch_text_similarity(part, texts) for part in patches.split(2)])
    )


@on
def test_fully_masked_image_gives_zero_and_touches_nothing_else(backend):
    with torch.device(device_of(backend)), running_on(backend):
        patches, texts = torch.randn(3, 6, 4), torch.randn(2, 4)
        patches[1] = float("nan")  # whatever a masked patch holds
        mask = torch.ones(3, 6, dtype=torch.bool)
        mask[1] = False
        for pool in POOLS:
            out, d_patches, d_texts = both(
                patches, texts, torch.ones(3, 2), pool=pool, patch_mask=mask
            )
            rest = both(patches[[0, 2]], texts, torch.ones(2, 2), pool=pool)
            assert torch.equal(out[1], torch.zeros(2)) and torch.equal(
                d_patches[1], torch.zeros(6, 4)
            )
            torch.testing.assert_close(out[[0, 2]], rest[0])
            torch.testing.assert_close(d_texts, rest[2])


@on
def test_masked_patches_get_exactly_zero_gradient(backend):
    with torch.device(device_of(backend)), running_on(backend):
        patches, texts, mask = torch.randn(2, 12, 4), torch.randn(3, 4), torch.rand(2, 12) > 0.5
        mask[:, 0] = True
        patches[~mask] = float("inf")
        for pool in POOLS:
            _, d_patches, d_texts = both(
                patches, texts, torch.ones(2, 3), pool=pool, patch_mask=mask
            )
            assert torch.equal(d_patches[~mask], torch.zeros_like(d_patches[~mask])) and bool(
                d_texts.isfinite().all()
            )


def test_patches_that_cancel():
    """u and -u: the Gram form would lose every digit of |v|; the kernel falls back to the vector
    itself.
    """
    u = torch.randn(1, 1, 64)
    patches = torch.cat([u, -u * (1 - 1e-3), 0.01 * torch.randn(1, 30, 64)], 1)
    texts = torch.randn(100, 64)
    result = ok.patch_text_similarity(patches, texts, temperature=50.0)
    with ok.backend("reference"):
        eager = ok.patch_text_similarity(patches, texts, temperature=50.0)
        truth = ok.patch_text_similarity(patches.double(), texts.double(), temperature=50.0)
    assert_close_to_truth("similarity", result, eager, truth, torch.float32)


@on
def test_offsets_beyond_32_bits(backend):
    """Views whose elements lie more than 2^31 apart; of the memory between them no page is touched."""
    device = device_of(backend)
    storage = torch.empty(2**31 + 2**12, dtype=torch.float16, device=device)
    patches = storage.as_strided((2, 3, 16), (2**31, 16, 1)).copy_(torch.randn(2, 3, 16))
    texts = storage.as_strided((3, 16), (2**30, 1), 64).copy_(torch.randn(3, 16))
    mask, grad = torch.ones(2, 3, dtype=torch.bool, device=device), torch.ones(2, 3, device=device)
    for pool in ("vector", "score", "max"):
        with running_on(backend):
            results = both(patches, texts, grad, pool=pool, patch_mask=mask)
            near = both(patches.contiguous(), texts.contiguous(), grad, pool=pool, patch_mask=mask)
        for a, b in zip(results, near, strict=True):
            torch.testing.assert_close(a, b)


@on
@pytest.mark.parametrize("weight", ["softmax", "sigmoid"])
def test_masked_patches_far_above_the_kept_ones(weight, backend):
    """The weight of a masked patch, were it computed, would overflow."""
    with torch.device(device_of(backend)), running_on(backend):
        texts = torch.ones(1, 4)
        patches = torch.stack([-texts[0], texts[0], torch.zeros(4)])[None]
        mask = torch.tensor([[True, False, False]])
        options = (
            {"temperature": 1e-3}
            if weight == "softmax"
            else {"weight": weight, "weight_scale": 1e3}
        )
        for pool in POOLS:
            out, d_patches, d_texts = both(
                patches, texts, torch.ones(1, 1), pool=pool, patch_mask=mask, **options
            )
            torch.testing.assert_close(out, -torch.ones(1, 1))
            assert bool(d_patches.isfinite().all()) and bool(d_texts.isfinite().all())


@on
def test_nan_in_features_gives_nan(backend):
    with torch.device(device_of(backend)), running_on(backend):
        patches, texts = torch.randn(2, 5, 4), torch.randn(3, 4)
        patches[0, 2, 1] = float("nan")
        for pool in POOLS:
            out = ok.patch_text_similarity(patches, texts, pool=pool)
            assert bool(out[0].isnan().all()) and bool(out[1].isfinite().all()), pool


@on
def test_strides(backend):
    with torch.device(device_of(backend)), running_on(backend):
        base = torch.randn(8, 3, 10, 2)
        patches = base[..., 0].transpose(0, 1)  # [3, 8, 10], no unit stride anywhere
        texts = torch.randn(10, 5).T
        mask = (torch.rand(8, 3) > 0.3).T
        for x, y, m in (
            (patches, texts, mask),
            (torch.randn(1, 8, 10).expand(3, -1, -1), texts, None),
        ):
            a = both(x, y, torch.ones(3, 5), patch_mask=m)
            b = both(
                x.contiguous(),
                y.contiguous(),
                torch.ones(3, 5),
                patch_mask=None if m is None else m.contiguous(),
            )
            for p, q in zip(a, b, strict=True):  # the reference leaves the order of sums to torch
                torch.testing.assert_close(
                    p, q
                ) if backend == "reference" else torch.testing.assert_close(p, q, rtol=0, atol=0)


@on
@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 0, 3, 5), (0, 0, 1, 1)])
def test_empty_batches(shape, backend):
    B, T, N, D = shape
    with torch.device(device_of(backend)), running_on(backend):
        for pool in POOLS:
            out, d_patches, d_texts = both(
                torch.randn(B, N, D), torch.randn(T, D), torch.ones(B, T), pool=pool
            )
            assert out.shape == (B, T)
            assert torch.equal(d_patches, torch.zeros(B, N, D)) and torch.equal(
                d_texts, torch.zeros(T, D)
            )


def test_nothing_of_size_BTN_is_kept():
    patches, texts = (
        torch.randn(4, 20, 8, requires_grad=True),
        torch.randn(6, 8, requires_grad=True),
    )
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        ok.patch_text_similarity(patches, texts)
    assert sum(kept) <= patches.numel() + texts.numel() + 3 * 4 * 6 + 4


@pytest.mark.parametrize("learned", ["temperature", "weight_scale"])
def test_learned_parameters_alone(learned):
    """Gradient to a scale when neither patches nor texts need one."""
    patches, texts = (
        torch.randn(2, 5, 4, dtype=torch.float64),
        torch.randn(3, 4, dtype=torch.float64),
    )
    value = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    weight = "softmax" if learned == "temperature" else "sigmoid"
    assert torch.autograd.gradcheck(
        lambda v: ok.patch_text_similarity(patches, texts, weight=weight, **{learned: v}), (value,)
    )


@pytest.mark.parametrize(
    "backend", parameters(("cpu", "cuda-emulated", "cuda"), of="patch_text_similarity")
)
def test_dispatcher_calls_are_checked_too(backend):
    """torch.ops.ovseg.* skips Python's checks: the native side must refuse, not read out of bounds."""
    with torch.device(device_of(backend)), running_on(backend):
        scale, bias, call = (
            torch.tensor(1.0),
            torch.tensor(0.0),
            torch.ops.ovseg.patch_text_similarity,
        )
        patches, texts = torch.randn(2, 5, 4), torch.randn(3, 4)
        with pytest.raises(RuntimeError, match="texts has size"):
            call(patches, torch.randn(3, 5), None, scale, bias, 0, 0, False)
        with pytest.raises(RuntimeError, match="patch_mask has size"):
            call(patches, texts, torch.ones(2, 4, dtype=torch.bool), scale, bias, 0, 0, False)
        with pytest.raises(RuntimeError, match="pool is 9"):
            call(patches, texts, None, scale, bias, 9, 0, False)


def test_definition_matches_the_paper_line_by_line():
    """Equation (4) written out with loops, no masks, no helpers."""
    patches, texts, tau = (
        torch.randn(2, 3, 4, dtype=torch.float64),
        torch.randn(2, 4, dtype=torch.float64),
        0.5,
    )
    for i in range(2):
        for j in range(2):
            q = texts[j] / texts[j].norm()
            s = torch.stack([u @ q / u.norm() for u in patches[i]])
            a = (s / tau).exp() / (s / tau).exp().sum()
            v = sum(a[n] * patches[i, n] for n in range(3))
            expected = v @ q / v.norm()
            torch.testing.assert_close(definition(patches, texts, scale=1 / tau)[i, j], expected)
