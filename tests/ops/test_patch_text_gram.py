"""patch_text_similarity of 16-bit inputs in Triton: the Gram form, whose tiles have parts of 128,
64 and 16 patches, and the backward between library products.
"""

import pytest
import torch
from backends import running_on
from test_patch_text_similarity import both

import ovseg_kernels as ok
from ovseg_kernels.testing import assert_close_to_truth

pytest.importorskip("triton")


@pytest.fixture
def gram():
    with running_on("triton-interpreted"):
        from ovseg_kernels.triton import _patch_text_gram

        return _patch_text_gram


def compare(patches, texts, grad, **options):
    with running_on("triton-interpreted"):
        results = both(patches, texts, grad, **options)
    with ok.backend("reference"):
        eager = both(patches, texts, grad, **options)
        truth = both(patches.double(), texts.double(), grad, **options)
    for name, *values in zip(
        ("similarity", "d patches", "d texts"), results, eager, truth, strict=True
    ):
        assert_close_to_truth(name, *values, torch.float16)
    return results


@pytest.mark.parametrize(
    "N,pool", [(64, "vector"), (129, "vector"), (196, "vector"), (208, "vector"), (196, "score")]
)
def test_each_part_of_a_tile_counts(N, pool):
    """Texts near one patch of each part, so that a part that is lost or doubled shows; a mask over
    some of the last 16 columns; D that ends no block.
    """
    patches = torch.randn(2, N, 72)
    chosen = [n for n in (0, 63, 64, 127, 128, 191, 192, N - 1) if n < N]
    texts = torch.cat([patches[0, chosen] + 0.7 * torch.randn(len(chosen), 72)] * 2)
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, -5:] = False
    patches[1, -5:] = 100.0
    grad = torch.randn(2, len(texts))
    options = {"patch_mask": mask, "temperature": 0.1, "pool": pool}
    compare(patches.half(), texts.half(), grad, **options)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # d patches of short ones
@pytest.mark.parametrize("width,weight", [(1e-4, "sigmoid"), (1e3, "softmax")])
def test_gradients_of_any_size(width, weight):
    """Powers of two bring coefficients into the range of float16: a loss scale changes no bit of
    the gradient of the texts, and neither do long or short patches make it overflow.
    """
    patches, texts = (width * torch.randn(1, 20, 16)).half(), torch.randn(10, 16).half()
    grad = torch.randn(1, 10)
    options = {"temperature": 0.2} if weight == "softmax" else {"weight": weight}
    with running_on("triton-interpreted"):
        d_texts = both(patches, texts, 2.0**-3 * grad, **options)[2]
        large = both(patches, texts, 2.0**9 * grad, **options)[2]
    assert bool(large.isfinite().all()) and bool(large.any())
    torch.testing.assert_close(large / 2.0**12, d_texts, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("tma", [True, False])
def test_chunks_and_columns_give_the_same(tma, gram, monkeypatch):
    """One image at a time, against all of them; tiles of 128 patches read by pointers, as before
    sm_90, against one tile an image.
    """
    patches, texts, grad = torch.randn(2, 150, 24), torch.randn(66, 24), torch.randn(2, 66)
    results = []
    for limit in (1, 1 << 30):
        with monkeypatch.context() as patch:
            patch.setattr(gram, "FORWARD_BYTES", limit)
            patch.setattr(gram, "BACKWARD_BYTES", limit)
            patch.setattr(gram, "hopper", lambda _: tma)
            results.append(compare(patches.half(), texts.half(), grad, temperature=0.2))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)


def test_a_patch_far_shorter_than_the_longest(gram):
    """A patch of length 1e-4 has nearly all the weight, beside one of 1e4: what float16 makes of its
    weight is computed again.
    """
    patches = torch.zeros(1, 3, 16)
    patches[0, 0, 0], patches[0, 1, 1], patches[0, 2, 2] = 1e4, 1e-4, 3e-5
    texts = torch.nn.functional.normalize(torch.tensor([[-1.0, 2.0, 2.0] + [0.0] * 13]), dim=-1)
    with running_on("triton-interpreted"):
        found = ok.patch_text_similarity(patches.half(), texts.half(), temperature=0.02)
    with ok.backend("reference"):
        truth = ok.patch_text_similarity(
            patches.half().double(), texts.half().double(), temperature=0.02
        )
    torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=1e-3)


def test_the_repair_leaves_at_once(gram, monkeypatch):
    """Where nothing has cancelled no row has the norm that marks one; the repair writes none."""
    written = []
    kernel = gram.patch_text_similarity_gram_cancelled_kernel

    class Watched:
        def __getitem__(self, grid):
            assert grid[0] <= 3  # programs of the interpreter's device

            def launch(*args, **options):
                norm, some = args[11], args[12]
                before = norm.clone()
                kernel[grid](*args, **options)
                written.append((int(some[0]), torch.equal(before, norm)))

            return launch

    monkeypatch.setattr(gram, "patch_text_similarity_gram_cancelled_kernel", Watched())
    patches = torch.randn(2, 20, 16)
    for x in (patches + 3, patches - patches.mean(1, keepdim=True)):
        with running_on("triton-interpreted"):
            ok.patch_text_similarity(x.half(), torch.randn(300, 16).half(), temperature=50.0)
    assert written == [(0, True), (1, False)]
