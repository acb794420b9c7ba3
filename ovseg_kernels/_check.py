"""Argument checks of the operators.

Messages name the argument, what came and what was expected.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from . import _checking, philox

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
# Floats below are literals: torch.compile(dynamic=True) takes a float of the module for one that
# changes.


def tensor(
    name: str, x: object, rank: int, shape: str, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a tensor {shape}")
    dense(name, x, shape)
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{name} has dtype {str(x.dtype).removeprefix('torch.')}; expected {allowed}"
        )
    if x.dim() != rank:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected {rank} dimensions, {shape}")
    return x


def dense(name: str, x: torch.Tensor, shape: str) -> None:
    if x.layout != torch.strided:
        raise TypeError(
            f"{name} has layout {str(x.layout).removeprefix('torch.')}; expected a dense tensor "
            f"{shape}"
        )
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor; expected a dense tensor {shape}")


def same(
    name: str, x: torch.Tensor, other_name: str, other: torch.Tensor, *, dtype: bool = True
) -> None:
    """Check that ``x`` has the device and, unless told otherwise, the dtype of ``other``."""
    if x.device != other.device:
        raise ValueError(
            f"{name} is on {x.device} and {other_name} is on {other.device}; expected one device"
        )
    if dtype and x.dtype != other.dtype:
        raise TypeError(
            f"{name} has dtype {str(x.dtype).removeprefix('torch.')} and {other_name} has "
            f"{str(other.dtype).removeprefix('torch.')}; expected one dtype"
        )


def shape(name: str, x: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {list(x.shape)}; expected {list(expected)}, {meaning}")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {list(allowed)}")


def flag(name: str, value: object) -> None:
    """Check that ``value`` is a bool, and not whatever is true: "no" is."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; expected True or False")


def number(
    name: str,
    value: object,
    wanted: str = "a finite number",
    *,
    least: float = -math.inf,
    most: float = math.inf,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Check for a finite number of the host, from ``least`` to ``most``, that ``dtype`` holds.

    No tensor: comparing one with a number would wait for the GPU, or break a compilation.
    """
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number")
    # Not math.isfinite: torch.compile takes it for an operation of the graph. A NaN compares false.
    if not (abs(value) < math.inf and least <= value <= most):
        raise ValueError(f"{name} is {value}; expected {wanted}")
    if abs(value) > torch.finfo(dtype).max:
        raise ValueError(
            f"{name} is {value}; {str(dtype).removeprefix('torch.')} holds "
            f"{torch.finfo(dtype).max} at most"
        )


def divisor(
    name: str, value: object, dtype: torch.dtype = torch.float64, least: float = 1e-15
) -> None:
    """Check a positive number that something is divided by.

    Above 1e-15 the result, and its square, stays in the range of float32.
    """
    number(name, value, "a positive finite number", least=5e-324, dtype=dtype)
    number(name, value, f"at least {least}", least=least)


def integer(name: str, value: object, least: int, most: int = 2**63 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")
    if value > most:
        raise ValueError(f"{name} is {value!r}; expected an integer of at most {most}")


def group(value: object) -> None:
    if value is not None and not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        raise TypeError(
            f"group is a {type(value).__name__}; expected a torch.distributed process group, or "
            "None for one process"
        )


def rng(x: object, like_name: str, like: torch.Tensor) -> torch.Tensor:
    """Return ``rng``, int64 [seed, offset], side by side in memory as kernels read it."""
    found = philox.check(x)
    same("rng", found, like_name, like, dtype=False)
    return found.contiguous()


def pair_ids(
    image_ids, images: int, text_ids, texts: int, like_name: str, like: torch.Tensor
) -> None:
    """Check that both id vectors are given or neither; int64, one for each image and text."""
    if (image_ids is None) != (text_ids is None):
        raise ValueError("image_ids and text_ids go together; one was given and the other is None")
    if image_ids is None:
        return
    for name, ids, size, letter in (
        ("image_ids", image_ids, images, "B"),
        ("text_ids", text_ids, texts, "T"),
    ):
        tensor(name, ids, 1, f"[{letter}]", (torch.int64,))
        shape(name, ids, (size,), "one id for each image or text")
        same(name, ids, like_name, like, dtype=False)


def weights(name: str, x: torch.Tensor) -> None:
    """Check, where values are looked at, that no number of ``x`` is negative, NaN or infinite."""
    for each in _checking.looked_at(x) if type(x) in (torch.Tensor, torch.nn.Parameter) else []:
        if each.numel() == 0:
            continue
        least, most = (float(bound) for bound in each.aminmax())  # both NaN if there is one
        if not (least >= 0 and most < math.inf):
            raise ValueError(
                f"{name} holds {most if least >= 0 or least != least else least}; expected finite "
                "weights of at least 0"
            )


def pair_list(
    positives: torch.Tensor | None,
    weights: torch.Tensor | None,
    images: int,
    like_name: str,
    like: torch.Tensor,
) -> int:
    """Check a list of positive pairs and their weights.

    Return how many texts its numbers need, 0 where they are not looked at. Weights are 0, or from
    1e-15 to 1e15, so that neither their sums nor what is divided by them leaves float32.
    """
    if positives is None:
        if weights is not None:
            raise ValueError("positive_weights was given without positives; expected both")
        return 0
    tensor("positives", positives, 2, "[P, 2]", (torch.int64,))
    shape("positives", positives, (positives.shape[0], 2), "(image, text) of each pair")
    same("positives", positives, like_name, like, dtype=False)
    if weights is not None:
        tensor("positive_weights", weights, 1, "[P]")
        shape("positive_weights", weights, (positives.shape[0],), "one weight for each pair")
        same("positive_weights", weights, like_name, like, dtype=False)
    needed = 0
    for each in _numbers(positives) if positives.shape[0] else []:
        low, high = (x.tolist() for x in (each.amin(0), each.amax(0)))
        if low[0] < 0 or high[0] >= images:
            wrong = low[0] if low[0] < 0 else high[0]
            raise ValueError(
                f"positives holds image {wrong}; expected 0 or more, below the {images} rows of "
                "image"
            )
        if low[1] < 0:
            raise ValueError(f"positives holds text {low[1]}; expected 0 or more, a row of text")
        needed = max(needed, high[1] + 1)
    for each in [] if weights is None else _numbers(weights):
        each = each.double()
        wrong = each[~((each == 0) | ((each >= 1e-15) & (each <= 1e15)))]
        if wrong.numel():
            raise ValueError(
                f"positive_weights holds {float(wrong[0])}; expected 0, or 1e-15 to 1e15"
            )
    return needed


def _numbers(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors whose numbers a check of ``x`` reads now: fake tensors have none."""
    return _checking.looked_at(x) if type(x) in (torch.Tensor, torch.nn.Parameter) else []


def scalar(
    name: str,
    value: float | torch.Tensor,
    like: torch.Tensor,
    dtype: torch.dtype,
    *,
    least: float | None = None,
) -> torch.Tensor:
    """Return a 0-dim tensor on ``like``'s device, made without a copy from the host.

    Its value is checked where values are looked at.

    ``least``: what a number that divides must be at least.
    """
    wanted = "a finite number" if least is None else "a positive finite number"
    if isinstance(value, torch.Tensor):
        dense(name, value, "of one element")
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {list(value.shape)}; expected one element")
        if not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}; expected a floating dtype")
        if value.device != like.device:
            raise ValueError(
                f"{name} is on {value.device}; expected {like.device}, where the features are"
            )
        for each in _numbers(value):
            _number(name, float(each), wanted, least, dtype)
        return value.to(dtype).reshape(())
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected {wanted} or a tensor of one element"
        )
    _number(name, value, wanted, least, dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


def _number(name: str, value: float, wanted: str, least: float | None, dtype: torch.dtype) -> None:
    if least is None:
        number(name, value, wanted, dtype=dtype)
    else:
        divisor(name, value, dtype, least)
