"""patch_text_similarity where the pooled vector nearly vanishes: patches centred over n under
nearly equal weights.

|v| is then far below the lengths of the patches. Neither the Gram form nor rounded weights have digits left for it, and what a
kernel does about that must cost about what it costs otherwise: a serial way for such rows looks
like a hang on a GPU.
"""

import pytest
import torch
from backends import device_of, dtypes, parameters, running_on

import ovseg_kernels as ok
from ovseg_kernels.testing import assert_close_to_truth

KERNELS = ("cpu", "cuda-emulated", "triton-interpreted", "cuda")
sizes = pytest.mark.parametrize(
    "N", [196, 300]
)  # Gram form and pooled vectors; the cosines of 300 patches are two windows


def centred(B: int, N: int, D: int) -> torch.Tensor:
    patches = torch.randn(B, N, D, dtype=torch.float64)
    return patches - patches.mean(1, keepdim=True)


def compare(patches, texts, dtype, **options):
    """The error rule for inputs rounded to the dtype; returns the similarity."""
    patches, texts = patches.to(dtype), texts.to(dtype)
    result = ok.patch_text_similarity(patches, texts, **options)
    with ok.backend("reference"):
        eager = ok.patch_text_similarity(patches, texts, **options)
        truth = ok.patch_text_similarity(patches.double(), texts.double(), **options)
    assert_close_to_truth("similarity", result, eager, truth, dtype)
    return result


@pytest.mark.parametrize("backend", parameters(KERNELS, of="patch_text_similarity"))
@pytest.mark.parametrize("temperature", [20.0, 1000.0])
@sizes
def test_centred_patches(N, temperature, backend):
    """A mask, more texts than a tile: the digits that eager torch has."""
    device = device_of(backend)
    patches, texts, mask = (
        centred(2, N, 72),
        torch.randn(70, 72),
        torch.ones(2, N, dtype=torch.bool),
    )
    mask[1, ::7] = False
    patches[1] -= patches[1, mask[1]].mean(0)
    patches, texts, mask = patches.to(device), texts.to(device), mask.to(device)
    for dtype in dtypes(backend)[1:]:
        with running_on(backend):
            compare(patches, texts, dtype, temperature=temperature, patch_mask=mask)


@pytest.mark.parametrize("backend", parameters(KERNELS, of="patch_text_similarity"))
@sizes
def test_some_texts_cancel_and_others_do_not(N, backend):
    """Patches u and -u: texts across u weigh both alike, texts along u choose one.

    In any order, over several tiles.
    """
    device = device_of(backend)
    u = torch.randn(72, dtype=torch.float64)
    patches = torch.where(torch.arange(N)[:, None] % 2 == 0, u, -u) + 0.05 * centred(1, N, 72)
    along = torch.rand(200) > 0.4
    across = torch.randn(200, 72, dtype=torch.float64)
    across -= across @ u[:, None] / (u @ u) * u
    texts = across + along[:, None] * u
    for dtype in dtypes(backend)[1:]:
        with running_on(backend):
            compare(patches.to(device), texts.to(device), dtype, temperature=0.2)


def forward_steps(patches, texts, scale, tf32):
    """What the emulation counts, of all kernels of one forward."""
    import emulation

    module = emulation.load()
    acc = torch.float64 if patches.dtype == torch.float64 else torch.float32
    module.take_steps()
    arguments = [
        emulation.guarded(x)
        for x in (patches, texts, torch.tensor(scale, dtype=acc), torch.zeros((), dtype=acc))
    ]
    torch.ops.ovseg_emulated.patch_text_similarity(*arguments[:2], None, *arguments[2:], 0, 0, tf32)
    arguments.clear()
    module.release_all()
    return module.take_steps()


@pytest.mark.parametrize("kind", ["float64", "float32", "tf32", "float16", "bfloat16"])
@sizes
def test_centred_patches_cost_what_others_cost(N, kind):
    """Steps of all threads, every text cancelled against none: at most four times.

    One warp a row took 64 times and more.
    """
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    patches, texts = centred(1, N, 128), torch.randn(96, 128, dtype=torch.float64)
    steps = [
        forward_steps(x.to(dtype), texts.to(dtype), 0.05, kind == "tf32")
        for x in (patches + 1, patches)
    ]
    repair = [n for k, n in steps[0].items() if "fwd_cancelled_kernel" in k]
    assert sum(repair) <= 264 * 128, steps[0]  # every thread leaves at its first step
    ordinary, cancelled = (sum(each.values()) for each in steps)
    assert ordinary > 10**7 and cancelled <= 4 * ordinary, steps


def test_tf32_does_not_round_what_has_cancelled():
    """With tf32 allowed, cosines and weights may round, but not a pooled vector that is a
    thousandth of its patches.
    """
    import emulation

    for N in (196, 300):
        patches, texts = centred(1, N, 72).float(), torch.randn(70, 72)
        with ok.backend("reference"):
            truth = ok.patch_text_similarity(patches.double(), texts.double(), temperature=20.0)
            eager = ok.patch_text_similarity(patches, texts, temperature=20.0)
        with emulation.emulated_cuda():
            arguments = patches, texts, None, torch.tensor(0.05), torch.tensor(0.0), 0, 0, True
            result = torch.ops.ovseg.patch_text_similarity(*arguments)[0]
        assert_close_to_truth("similarity", result, eager, truth, torch.float32)
