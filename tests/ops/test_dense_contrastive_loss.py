"""What is special about dense_contrastive_loss: selection with a total order, the noise, ids,
sizes, bad input.
"""

import math

import pytest
import torch
from backends import SLOW, device_of, dtypes, exact, parameters, running_on
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels import philox
from ovseg_kernels.reference.dense_contrastive_loss import dense_contrastive_loss as definition
from ovseg_kernels.testing import assert_close_to_truth

on = pytest.mark.parametrize("backend", parameters(of="dense_contrastive_loss"))
SAMPLINGS = ("topk", "semi", "gumbel", "random")


def noise(sampling, device="cpu", seed=3):
    return {"rng": philox.make_rng(seed, device=device)} if sampling in ("gumbel", "random") else {}


@on
@pytest.mark.parametrize(
    "B,N,T,D,k_pos,k_neg",
    [(1, 1, 1, 1, 1, 1), (5, 33, 5, 24, 4, 9), (3, 70, 66, 16, 8, 130), (9, 13, 4, 48, 20, 64)],
)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sizes(B, N, T, D, k_pos, k_neg, sampling, backend):
    """The same pixels are selected everywhere; tails of tiles, fewer pixels than wanted, texts
    without an image.
    """
    device = device_of(backend)
    pixels, texts = (
        torch.randn(B, N, D, dtype=torch.float64, device=device),
        torch.randn(T, D, dtype=torch.float64, device=device),
    )
    options = {
        "k_pos": k_pos,
        "k_neg": k_neg,
        "sampling": sampling,
        "skip": 3 if D > 20 else 0,
        "margin": 0.5,
        **noise(sampling, device),
    }
    if B != T:
        options |= {
            "image_ids": torch.randint(0, 4, (B,)).to(device),
            "text_ids": torch.randint(0, 6, (T,)).to(device),
        }
    with ok.backend("reference"):
        expected = ok.select_pixels(pixels, texts, **options)
    with running_on(backend):
        found = ok.select_pixels(pixels, texts, **options)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@on
@pytest.mark.parametrize("reduction", ["mean_of_log", "log_of_sum"])
def test_values_and_gradients(reduction, backend):
    """The error rule in every dtype, for one selection."""
    device = device_of(backend)
    T, k_neg = (9, 17) if backend in SLOW else (70, 70)
    inputs = torch.randn(3, 40, 24), torch.randn(T, 24)
    ids = {
        "image_ids": torch.tensor([0, 1, 1]).to(device),
        "text_ids": torch.randint(0, 4, (T,)).to(device),
    }
    options = {"k_pos": 6, "k_neg": k_neg, "temperature": 0.2, "reduction": reduction, **ids}

    def run(pixels, texts):
        tensors = pixels.detach().requires_grad_(), texts.detach().requires_grad_()
        loss = ok.dense_contrastive_loss(*tensors, **options)
        return loss, *torch.autograd.grad(loss, tensors)

    for dtype in dtypes(backend):
        pixels, texts = (x.to(device, dtype) for x in inputs)
        with running_on(backend):
            results = run(pixels, texts)
        with ok.backend("reference"):
            eager, truth = run(pixels, texts), run(pixels.double(), texts.double())
        for i, (a, b, c) in enumerate(zip(results, eager, truth, strict=True)):
            assert_close_to_truth(f"tensor {i}", a, b, c, dtype)


@on
def test_ties_go_to_the_smaller_index(backend):
    """Similarities of exactly 0 and 1, many of each."""
    device = device_of(backend)
    code = torch.randint(0, 3, (4, 50))
    pixels, texts = F.one_hot(code, 3).float().to(device), torch.eye(3).repeat(2, 1)[:4].to(device)
    with running_on(backend):
        positive, negative = ok.select_pixels(pixels, texts, k_pos=40, k_neg=120)
    flat = code.flatten()
    for j in range(4):
        own = range(50 * j, 50 * j + 50)
        others = [x for x in range(200) if x not in own]
        for found, among, k in ((positive[j], own, 40), (negative[j], others, 120)):
            best = [x for x in among if flat[x] == j % 3] + [x for x in among if flat[x] != j % 3]
            assert found.tolist() == best[:k]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 50),
    st.integers(0, 5),
    st.integers(0, 2**31),
)
def test_selection_against_sorting(B, N, k_pos, k_neg, skip, seed):
    """Few distinct similarities, so that most candidates tie; one thread and two."""
    g = torch.Generator().manual_seed(seed)
    pixels = F.one_hot(torch.randint(0, 4, (B, N), generator=g), 4).double()
    texts = F.one_hot(torch.randint(0, 4, (B,), generator=g), 4).double()
    options = {"k_pos": k_pos, "k_neg": k_neg, "skip": skip}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(ok.select_pixels(pixels, texts, **options))
    finally:
        torch.set_num_threads(threads)
    s = texts @ pixels.flatten(0, 1).T
    for j in range(B):
        order = sorted(range(B * N), key=lambda x, j=j: (-float(s[j, x]), x))
        own = [x for x in order if x // N == j][:k_pos]
        others = [x for x in order if x // N != j][skip : skip + k_neg]
        for positive, negative in found:
            assert positive[j].tolist() == own + [-1] * (min(k_pos, B * N) - len(own))
            assert negative[j].tolist() == others + [-1] * (min(k_neg, B * N) - len(others))


def _by_reference(*args, **options):
    with ok.backend("reference"):
        return ok.select_pixels(*args, **options)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("limit", [32 << 20, 1])
def test_full_lists_and_chunks_of_the_emulated_launcher(limit, sampling):
    """3000 pixels in one chunk or in three, by rising similarity: each beats all before it, and the
    lists fill again and again.
    """
    import emulation

    angle = torch.linspace(1.5, 0.0, 3000, dtype=torch.float64)
    pixels, texts = (
        torch.stack([angle.cos(), angle.sin()], 1).view(4, 750, 2),
        torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64),
    )
    ids = {"image_ids": torch.tensor([0, 1, 0, 2]), "text_ids": torch.tensor([2, 0])}
    options = {
        "k_pos": 30,
        "k_neg": 40,
        "skip": 5,
        "margin": 0.2,
        "sampling": sampling,
        **ids,
        **noise(sampling),
    }
    with running_on("cuda-emulated"):
        emulation.load().set_dense_limit(limit)
        try:
            found = ok.select_pixels(pixels, texts, **options)
        finally:
            emulation.load().set_dense_limit(32 << 20)
    assert all(
        torch.equal(a, b)
        for a, b in zip(found, _by_reference(pixels, texts, **options), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "backend", parameters(("cpu", "cuda-emulated", "cuda"), of="dense_contrastive_loss")
)
def test_16_bit_pixels_meet_texts_of_twice_as_many_bits(dtype, backend):
    """Wherever similarities differ by more than 1e-5 the better pixel is selected: texts rounded to
    16 bits, or to tf32, would be off by a hundred times that. In several chunks, and of strided
    pixels.
    """
    B, N, D, T, k = 2, 700, 48, 3, 60
    device = device_of(backend)
    pixels = torch.randn(B, 2 * N, D).to(device, dtype)[:, ::2]
    texts = torch.randn(T, D, device=device)
    ids = {"image_ids": torch.tensor([0, 1]), "text_ids": torch.tensor([0, 0, 1])}
    ids = {name: x.to(device) for name, x in ids.items()}
    with running_on(backend):
        if backend == "cuda-emulated":
            import emulation

            emulation.load().set_dense_limit(1)
        try:
            found = ok.select_pixels(pixels, texts, k_pos=k, k_neg=k, **ids)
        finally:
            if backend == "cuda-emulated":
                emulation.load().set_dense_limit(32 << 20)
    truth = F.normalize(texts.double(), dim=1) @ F.normalize(pixels.double(), dim=2).flatten(0, 1).T
    own = (ids["text_ids"][:, None] == ids["image_ids"]).repeat_interleave(N, 1)
    for index, among in zip(found, (own, ~own), strict=True):
        for j in range(T):
            best = truth[j][among[j]].sort(descending=True).values[:k]
            assert bool(among[j][index[j]].all())
            assert float((truth[j][index[j]] - best).abs().max()) <= 1e-5


@pytest.mark.parametrize("k_neg", [16, 256])
@pytest.mark.parametrize("rising", [False, True])
def test_steps_of_the_emulated_selection(rising, k_neg):
    """Basic blocks a pixel, shared by 256 threads: few where most pixels are not among the best,
    and never in proportion to k.
    """
    import emulation

    angle = torch.linspace(1.5, 0.0, 6000)
    angle = angle if rising else angle[torch.randperm(6000)]
    pixels, texts = torch.stack([angle.cos(), angle.sin()], 1)[None], torch.tensor([[1.0, 0.0]])
    with running_on("cuda-emulated"):
        emulation.load().take_steps()
        ok.select_pixels(
            pixels,
            texts,
            k_pos=1,
            k_neg=k_neg,
            image_ids=torch.tensor([0]),
            text_ids=torch.tensor([1]),
        )
        (steps,) = (n for name, n in emulation.load().take_steps().items() if "select_best" in name)
    assert steps / 6000 < (500 if rising else 150)


@pytest.mark.parametrize(
    "backend", parameters(("cuda-emulated", "cuda"), of="dense_contrastive_loss")
)
def test_lists_too_long_for_shared_memory(backend):
    device = device_of(backend)
    pixels, texts = (
        torch.randn(2, 3400, 4, dtype=torch.float64, device=device),
        torch.randn(2, 4, dtype=torch.float64, device=device),
    )
    with running_on(backend):
        found = ok.select_pixels(pixels, texts, k_pos=2, k_neg=3300, skip=30)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            found, _by_reference(pixels, texts, k_pos=2, k_neg=3300, skip=30), strict=True
        )
    )


def test_chunks_of_the_gpu_launcher_do_not_matter(monkeypatch):
    from ovseg_kernels.triton import dense_contrastive_loss as kernels

    pixels, texts = torch.randn(2, 2100, 4), torch.randn(2, 4)
    found = []
    for limit in (64 << 20, 1):  # 4200 pixels in one chunk, or in two of 4096
        with running_on("triton-interpreted"), monkeypatch.context() as patch:
            patch.setattr(kernels, "CHUNK_BYTES", limit)
            found.append(ok.select_pixels(pixels, texts, k_pos=5, k_neg=40))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@on
def test_images_with_the_texts_id_are_no_negatives(backend):
    with torch.device(device_of(backend)), running_on(backend):
        pixels, texts = torch.randn(6, 20, 8), torch.randn(9, 8)
        image_ids, text_ids = (
            torch.tensor([0, 0, 1, 2, 2, 3]),
            torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 9]),
        )
        for sampling in SAMPLINGS:
            options = {
                "sampling": sampling,
                "margin": 9.0,
                "image_ids": image_ids,
                "text_ids": text_ids,
            }
            positive, negative = ok.select_pixels(
                pixels, texts, k_pos=30, k_neg=200, **options, **noise(sampling, device_of(backend))
            )
            for j in range(9):
                own = image_ids[positive[j][positive[j] >= 0] // 20]
                others = image_ids[negative[j][negative[j] >= 0] // 20]
                assert bool((own == text_ids[j]).all()) and bool((others != text_ids[j]).all())
                assert len(own) == min(30, 20 * int((image_ids == text_ids[j]).sum()))
                if sampling != "semi":
                    assert len(others) == 20 * int((image_ids != text_ids[j]).sum())
                    assert len(set(negative[j].tolist()) - {-1}) == len(others)


def test_window_and_semi_are_parts_of_the_order():
    pixels, texts = torch.randn(5, 40, 8), torch.randn(5, 8)
    positive, whole = ok.select_pixels(pixels, texts, k_pos=3, k_neg=160)
    window = ok.select_pixels(pixels, texts, k_pos=3, k_neg=20, skip=7)[1]
    assert torch.equal(window, whole[:, 7:27])
    semi = ok.select_pixels(pixels, texts, k_pos=3, k_neg=160, sampling="semi", margin=0.3)[1]
    s = F.normalize(texts, dim=-1) @ F.normalize(pixels, dim=-1).flatten(0, 1).T
    for j in range(5):
        low = float(s[j, positive[j]].min())
        assert semi[j][semi[j] >= 0].tolist() == [
            x for x in whole[j].tolist() if low - 0.3 <= float(s[j, x]) < low
        ]


def test_gumbel_samples_in_proportion_and_random_evenly():
    """The first of N_j over many seeds, against softmax(s / tau) and against 1 / count: a
    chi-square far from the edge.
    """
    pixels, texts = torch.randn(2, 6, 3), torch.randn(2, 3)
    s = (F.normalize(texts, dim=-1) @ F.normalize(pixels, dim=-1).flatten(0, 1).T)[0, 6:]
    for sampling, expected in (
        ("gumbel", (s / 0.7).softmax(0)),
        ("random", torch.full((6,), 1 / 6)),
    ):
        counts = torch.zeros(6)
        for seed in range(1500):
            options = {
                "sampling": sampling,
                "rng": philox.make_rng(seed),
                "sampling_temperature": 0.7,
            }
            first = ok.select_pixels(pixels, texts, k_pos=1, k_neg=1, **options)[1]
            counts[int(first[0, 0]) - 6] += 1
        chi = float(((counts - 1500 * expected) ** 2 / (1500 * expected)).sum())
        assert chi < 20.5, (sampling, chi)  # 5 degrees of freedom: 0.1 %


@on
def test_terms_add_and_lengths_do_not_matter(backend):
    with torch.device(device_of(backend)), running_on(backend):
        pixels, texts = (
            torch.randn(*shape, dtype=exact(backend)[-1]) for shape in ((4, 15, 8), (4, 8))
        )
        ways = ("both", "text_to_pixel", "pixel_to_text")
        losses = {
            terms: ok.dense_contrastive_loss(pixels, texts, k_pos=3, k_neg=7, terms=terms)
            for terms in ways
        }
        torch.testing.assert_close(
            losses["both"], losses["text_to_pixel"] + losses["pixel_to_text"]
        )
        scaled = ok.dense_contrastive_loss(7 * pixels, 0.1 * texts, k_pos=3, k_neg=7)
        torch.testing.assert_close(scaled, losses["both"])


@on
def test_strides(backend):
    with torch.device(device_of(backend)), running_on(backend):
        base = torch.randn(8, 20, 3, 2)
        pixels, texts = (
            base[..., 0].permute(2, 1, 0),
            torch.randn(8, 3).T,
        )  # [3, 20, 8], no unit stride
        found, expected = [], []
        for p, t, out in (
            (pixels, texts, found),
            (pixels.contiguous(), texts.contiguous(), expected),
        ):
            leaves = p.detach().requires_grad_(), t.detach().requires_grad_()
            loss = ok.dense_contrastive_loss(*leaves, k_pos=3, k_neg=7)
            out += [loss, *torch.autograd.grad(loss, leaves)]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@on
def test_a_nan_is_not_passed_over(backend):
    with torch.device(device_of(backend)), running_on(backend):
        pixels, texts = torch.randn(3, 20, 8), torch.randn(3, 8)
        pixels[1, 4, 2] = float("nan")
        assert bool(ok.dense_contrastive_loss(pixels, texts, k_pos=2, k_neg=2).isnan())


@on
def test_zero_pixels_have_zero_similarity(backend):
    with torch.device(device_of(backend)), running_on(backend):
        pixels, texts = torch.zeros(2, 5, 4), torch.randn(2, 4)
        pixels.requires_grad_()
        loss = ok.dense_contrastive_loss(
            pixels, texts, k_pos=2, k_neg=3, temperature=0.5, terms="text_to_pixel"
        )
        torch.testing.assert_close(loss, torch.tensor(math.log(4.0)))
        (grad,) = torch.autograd.grad(loss, pixels)
        assert bool(grad.isfinite().all())


@on
@pytest.mark.parametrize("B,N,T", [(0, 4, 0), (2, 0, 2), (0, 4, 3), (2, 3, 0)])
def test_empty(B, N, T, backend):
    with torch.device(device_of(backend)), running_on(backend):
        ids = {"image_ids": torch.arange(B), "text_ids": torch.arange(T)}
        leaves = torch.randn(B, N, 4, requires_grad=True), torch.randn(T, 4, requires_grad=True)
        loss = ok.dense_contrastive_loss(*leaves, k_pos=2, k_neg=3, **ids)
        assert float(loss.detach()) == 0
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(loss, leaves))


def test_nothing_dense_is_kept():
    pixels, texts = (
        torch.randn(20, 100, 8, requires_grad=True),
        torch.randn(20, 8, requires_grad=True),
    )
    kept = {}

    def note(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        ok.dense_contrastive_loss(pixels, texts, k_pos=4, k_neg=8)
    others = [size for at, size in kept.items() if at != pixels.data_ptr()]
    assert max(others) <= 20 * 4 * 8  # the unit vectors of the positives; [T, B N] would be 40000


def test_definition_by_hand():
    """Two images of two pixels, written out."""
    pixels = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [-1.0, 0.0]]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = ok.dense_contrastive_loss(
        pixels, texts, temperature=1.0, k_pos=1, k_neg=1, terms="text_to_pixel"
    )
    expected = (
        math.log(math.exp(1.0) + math.exp(0.6))
        - 1.0
        + math.log(math.exp(0.8) + math.exp(1.0))
        - 0.8
    ) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    loss = ok.dense_contrastive_loss(
        pixels, texts, temperature=1.0, k_pos=1, k_neg=1, terms="pixel_to_text"
    )
    expected = (
        math.log(math.exp(1.0) + 1.0) - 1.0 + math.log(math.exp(0.6) + math.exp(0.8)) - 0.8
    ) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    selected = torch.tensor([[0], [2]]), torch.tensor([[2], [1]])
    whole = definition(pixels, texts, 1.0, None, None, *selected, "mean_of_log", "both")
    assert float(whole) == pytest.approx(
        float(ok.dense_contrastive_loss(pixels, texts, temperature=1.0, k_pos=1, k_neg=1)), rel=1e-6
    )
