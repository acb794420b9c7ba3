"""One random stream in Python, C++, CUDA and Triton: known answers, equal bits, distribution."""

import math

import numpy as np
import pytest
import torch
from backends import device_of, parameters

from ovseg_kernels import philox

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [(0, 0), (1, 0), (-1, 5), (2**63 - 1, 2**40 + 3), (-(2**63), 2**62), (20261121, 2**32 - 2)]


def pair(low, high):
    return low | high << 32


@pytest.mark.parametrize("counter,key,answer", KNOWN)
def test_known_answers_in_cpp(counter, key, answer):
    import emulation

    assert emulation.load().philox(pair(*key), pair(*counter[:2]), pair(*counter[2:])) == answer


def test_known_answer_in_python():
    _, _, answer = KNOWN[0]
    assert tuple(philox.words(torch.tensor([0, 0]), torch.tensor(0)).tolist()) == answer


@pytest.mark.parametrize("seed,offset", SEEDS)
def test_python_equals_cpp(seed, offset):
    import emulation

    module, rng, count = emulation.load(), torch.tensor([seed, offset]), 41
    found = philox.bits(rng, (count,))
    assert found.tolist() == [module.philox_bits(seed, offset, i) for i in range(count)]
    uniform, gumbel = philox.uniform(rng, (count,)), philox.gumbel(rng, (count,))
    assert uniform.tolist() == [module.uniform_from_bits(int(x)) for x in found]
    torch.testing.assert_close(
        gumbel, torch.tensor([module.gumbel_from_bits(int(x)) for x in found]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("seed,offset", SEEDS)
def test_emulated_cuda_equals_python(seed, offset):
    import emulation

    count, rng = 300, torch.tensor([seed, offset])
    out = [torch.empty(count) for _ in range(3)]
    emulation.load().philox_on_device(rng.data_ptr(), 2, count, *(x.data_ptr() for x in out))
    bits = out[0].long() | out[1].long() << 16
    assert torch.equal(bits, philox.bits(rng, (count + 2,))[2:])
    torch.testing.assert_close(out[2], philox.gumbel(rng, (count + 2,))[2:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", parameters(("triton-interpreted", "triton")))
@pytest.mark.parametrize("seed,offset", SEEDS)
def test_triton_equals_python(seed, offset, backend):
    from ovseg_kernels.triton.philox import philox_kernel

    device, count = device_of(backend), 300
    rng = torch.tensor([seed, offset], device=device)
    bits = torch.empty(count, dtype=torch.int64, device=device)
    uniform, gumbel = (torch.empty(count, device=device) for _ in range(2))
    philox_kernel[(math.ceil(count / 128),)](rng, bits, uniform, gumbel, count, BLOCK=128)
    assert torch.equal(bits.cpu(), philox.bits(rng.cpu(), (count,)))
    assert torch.equal(uniform.cpu(), philox.uniform(rng.cpu(), (count,)))
    torch.testing.assert_close(
        gumbel.cpu(), philox.gumbel(rng.cpu(), (count,)), rtol=1e-6, atol=1e-6
    )


def test_uniform_never_reaches_its_ends():
    import emulation

    module = emulation.load()
    assert (
        module.uniform_from_bits(0) == 2.0**-24
        and module.uniform_from_bits(2**32 - 1) == 1 - 2.0**-24
    )
    assert (
        -2.82 < module.gumbel_from_bits(0) < -2.80
        and 16.6 < module.gumbel_from_bits(2**32 - 1) < 16.7
    )


def test_distribution():
    stats = pytest.importorskip("scipy.stats")
    uniform, gumbel = (
        philox.uniform(philox.make_rng(3), (100_000,)),
        philox.gumbel(philox.make_rng(4), (100_000,)),
    )
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(gumbel.numpy(), "gumbel_r").pvalue > 1e-3
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.01


def test_shape_does_not_matter_and_advance_repeats_nothing():
    rng = philox.make_rng(5)
    assert torch.equal(philox.bits(rng, (3, 7)).flatten(), philox.bits(rng, (21,)))
    later = philox.bits(philox.advance(rng, 21), (40,))
    assert not set(later.tolist()) & set(philox.bits(rng, (24,)).tolist())


@pytest.mark.parametrize(
    "rng,error,message",
    [
        (7, TypeError, "rng is int; expected an int64 tensor"),
        (torch.zeros(2), TypeError, "rng is float32; expected an int64 tensor"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"rng has shape \[3\]; expected \[2\]"),
    ],
)
def test_bad_rng(rng, error, message):
    with pytest.raises(error, match=message):
        philox.uniform(rng, (4,))


def test_bad_seed():
    with pytest.raises(
        ValueError, match="seed is 9223372036854775808; expected an integer of 64 bits"
    ):
        philox.make_rng(2**63)
