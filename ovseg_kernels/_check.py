"""Argument checks of the operators. Messages name the argument, what came and what was expected."""

from __future__ import annotations

import math

import torch

from . import _checking

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def tensor(name: str, x: object, rank: int, shape: str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a tensor {shape}")
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} has dtype {str(x.dtype).removeprefix('torch.')}; expected {allowed}")
    if x.dim() != rank:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected {rank} dimensions, {shape}")
    return x


def same(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor, *, dtype: bool = True) -> None:
    """Same device and, unless told otherwise, same dtype."""
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device} and {other_name} is on {other.device}; expected one device")
    if dtype and x.dtype != other.dtype:
        raise TypeError(
            f"{name} has dtype {str(x.dtype).removeprefix('torch.')} and {other_name} has "
            f"{str(other.dtype).removeprefix('torch.')}; expected one dtype"
        )


def shape(name: str, x: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {list(x.shape)}; expected {list(expected)}, {meaning}")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {list(allowed)}")


def no_tensor(name: str, value: object) -> None:
    """For options that are numbers of the host: comparing a tensor with one would wait for the GPU, or break a compilation."""
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number")


def pair_ids(image_ids, images: int, text_ids, texts: int, like_name: str, like: torch.Tensor) -> None:
    """Both or neither; int64, one for each image and text."""
    if (image_ids is None) != (text_ids is None):
        raise ValueError("image_ids and text_ids go together; one was given and the other is None")
    if image_ids is None:
        return
    for name, ids, size, letter in (("image_ids", image_ids, images, "B"), ("text_ids", text_ids, texts, "T")):
        tensor(name, ids, 1, f"[{letter}]", (torch.int64,))
        shape(name, ids, (size,), "one id for each image or text")
        same(name, ids, like_name, like, dtype=False)


def scalar(name: str, value: float | torch.Tensor, like: torch.Tensor, dtype: torch.dtype, *, positive: bool = False) -> torch.Tensor:
    """A 0-dim tensor on ``like``'s device, made without a copy from the host. Its value is checked where values are looked at."""
    wanted = "a positive finite number" if positive else "a finite number"
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {list(value.shape)}; expected one element")
        if not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}; expected a floating dtype")
        if value.device != like.device:
            raise ValueError(f"{name} is on {value.device}; expected {like.device}, where the features are")
        if _checking.looks_at_values(value) and type(value) in (torch.Tensor, torch.nn.Parameter):
            _number(name, float(value.detach()), wanted, positive)
        return value.to(dtype).reshape(())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {wanted} or a tensor of one element")
    _number(name, value, wanted, positive)
    return torch.full((), value, dtype=dtype, device=like.device)


def _number(name: str, value: float, wanted: str, positive: bool) -> None:
    # Not math.isfinite: torch.compile takes it for an operation of the graph. A NaN compares false.
    if not abs(value) < math.inf or (positive and value <= 0):
        raise ValueError(f"{name} is {value}; expected {wanted}")
