"""Random numbers that do not depend on device, backend, tiling or thread: Philox4x32-10.

    key = seed, counter = (offset + index // 4, 0), word = index % 4                            (1)
    u = ((word >> 9) + 0.5) 2^-23        exact in float32, in [2^-24, 1 - 2^-24]:
                                         no logarithm sees 0 or 1                               (2)
    gumbel = -log(-log u)                in float32, in [-2.82, 16.64]                          (3)

``index`` counts the elements of the unpadded tensor in contiguous order. Operators take ``rng``, an
int64 tensor [seed, offset] on their device: a Python number would recompile at every step, and a
CUDA graph could not replay with fresh noise. The same definition is csrc/common/philox.h and
ovseg_kernels/triton/philox.py; the bits agree. Each step must use an offset of its own: ``advance``
gives the next one.

Source   Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import math

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def make_rng(
    seed: int | None = None, offset: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return ``rng`` for the operators: int64 [seed, offset].

    Without a seed, one is drawn from torch's default generator.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    for name, value in (("seed", seed), ("offset", offset)):
        if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} is {value!r}; expected an integer of 64 bits")
    # Filled, not copied: a copy from the host would wait for the GPU.
    return torch.stack(
        [torch.full((), number, dtype=torch.int64, device=device) for number in (seed, offset)]
    )


def advance(rng: torch.Tensor, elements: int) -> torch.Tensor:
    """Return ``rng`` past a tensor of ``elements`` elements.

    What follows shares no number with it.
    """
    check(rng)
    if (
        isinstance(elements, bool)
        or not isinstance(elements, (int, torch.SymInt))
        or not 0 <= elements < 2**63
    ):
        raise ValueError(
            f"elements is {elements!r}; expected an integer of at least 0, the number of elements "
            "that were drawn"
        )
    return rng + -(-elements // 4) * torch.arange(2, device=rng.device)


def check(rng: object) -> torch.Tensor:
    """Return ``rng``; TypeError or ValueError unless it is int64 [seed, offset]."""
    if not isinstance(rng, torch.Tensor) or rng.dtype != torch.int64 or rng.layout != torch.strided:
        came = type(rng).__name__
        if isinstance(rng, torch.Tensor):
            came = str(rng.dtype if rng.layout == torch.strided else rng.layout).removeprefix(
                "torch."
            )
        raise TypeError(
            f"rng is {came}; expected an int64 tensor [seed, offset], as "
            "ovseg_kernels.philox.make_rng gives"
        )
    if rng.is_nested:  # which has no shape
        raise TypeError(
            "rng is a nested tensor; expected an int64 tensor [seed, offset], as "
            "ovseg_kernels.philox.make_rng gives"
        )
    if rng.shape != (2,):
        raise ValueError(f"rng has shape {list(rng.shape)}; expected [2], seed and offset")
    return rng


def _multiply(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return high and low 32 bits of x * factor for x below 2^32.

    int64 holds no product of two full words.
    """
    low, high = x * (factor & 0xFFFF), x * (factor >> 16)
    low, carry = low + ((high & 0xFFFF) << 16), high >> 16
    return carry + (low >> 32), low & _WORD


def words(rng: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return the four words of the blocks with counter ``offset + blocks``, equation (1).

    They are int64 [..., 4] in 0 .. 2^32 - 1.
    """
    counter = rng[1] + blocks
    x0, x1 = counter & _WORD, (counter >> 32) & _WORD
    x2, x3 = torch.zeros_like(x0), torch.zeros_like(x0)
    key0, key1 = rng[0] & _WORD, (rng[0] >> 32) & _WORD
    for _ in range(10):
        even_high, even_low = _multiply(x0, _MULTIPLIERS[0])
        odd_high, odd_low = _multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = odd_high ^ x1 ^ key0, odd_low, even_high ^ x3 ^ key1, even_low
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return torch.stack([x0, x1, x2, x3], -1)


def bits(rng: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return 32 random bits an element: int64 of ``shape``."""
    check(rng)
    if any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) or n < 0 for n in shape):
        raise ValueError(f"shape is {tuple(shape)}; expected integers of at least 0")
    count = math.prod(shape)
    return words(rng, torch.arange(-(-count // 4), device=rng.device)).flatten()[:count].view(shape)


def uniform(rng: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return uniform numbers, equation (2): float32 of ``shape``."""
    return ((bits(rng, shape) >> 9).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(rng: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return standard Gumbel numbers, equation (3): float32 of ``shape``.

    Example:
        >>> gumbel(make_rng(7), (2, 3)).shape
        torch.Size([2, 3])
    """
    return -torch.log(-torch.log(uniform(rng, shape)))
