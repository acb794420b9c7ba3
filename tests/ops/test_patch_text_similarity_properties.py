"""patch_text_similarity against its definition over random shapes, scales and masks."""

import pytest
import torch

pytest.importorskip("hypothesis")
from backends import running_on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_patch_text_similarity import POOLS, both

import ovseg_kernels as ok

shapes = {
    "B": st.integers(0, 4),
    "T": st.integers(0, 70),
    "N": st.integers(1, 40),
    "D": st.integers(1, 33),
}
options = {
    "seed": st.integers(0, 2**31),
    "pool": st.sampled_from(POOLS),
    "weight": st.sampled_from(["softmax", "sigmoid"]),
    "exponent": st.integers(-3, 3),
    "magnitude": st.sampled_from([1e-4, 1.0, 1e4]),
    "masked": st.booleans(),
}


def check(backend, B, T, N, D, seed, pool, weight, exponent, magnitude, masked):
    g = torch.Generator().manual_seed(seed)
    patches = magnitude * torch.randn(B, N, D, generator=g, dtype=torch.float64)
    texts = torch.randn(T, D, generator=g, dtype=torch.float64)
    options = {
        "pool": pool,
        "weight": weight,
        "patch_mask": torch.rand(B, N, generator=g) > 0.5 if masked else None,
    }
    options |= (
        {"temperature": 10.0**exponent} if weight == "softmax" else {"weight_scale": 10.0**exponent}
    )
    grad = torch.randn(B, T, generator=g, dtype=torch.float64)
    with running_on(backend):
        results = both(patches, texts, grad, **options)
    with ok.backend("reference"):
        truth = both(patches, texts, grad, **options)
    for a, b, size in zip(results, truth, (1.0, 1 / magnitude, 1.0), strict=True):
        # A steep softmax multiplies rounding by 1 / temperature.
        torch.testing.assert_close(
            a, b, rtol=1e-7, atol=1e-9 * size * max(1.0, 10.0 ** abs(exponent))
        )


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(**shapes, **options)
def test_cpu(**drawn):
    check("cpu", **drawn)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(**shapes, **options)
def test_emulated_cuda(**drawn):
    check("cuda-emulated", **drawn)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(**shapes, **options)
def test_interpreted_triton(**drawn):
    check("triton-interpreted", **drawn)
