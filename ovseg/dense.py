"""Tensors from callers: dense ones with numbers in them, or an error that names the argument."""

from __future__ import annotations

from typing import Any

import torch

from .errors import InputError

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_dense(name: str, x: Any, expected: str, *, meta: bool = False) -> None:
    """Refuse what is no tensor, and tensors that are sparse, nested or quantised.

    Args:
        name: of the argument.
        x: what was given.
        expected: in its place, for messages.
        meta: whether it may be without numbers.

    Raises:
        InputError: naming the argument.
    """
    if not isinstance(x, torch.Tensor):
        raise InputError(f"{name} is a {type(x).__name__}; expected {expected}")
    if x.is_nested:
        raise InputError(f"{name} is a nested tensor; expected {expected}, dense")
    if x.layout != torch.strided:
        raise InputError(
            f"{name} has layout {str(x.layout).removeprefix('torch.')}; expected {expected}, dense"
        )
    if x.is_quantized:
        raise InputError(f"{name} is quantised; expected {expected} of plain numbers")
    if x.device.type == "meta" and not meta:
        raise InputError(
            f"{name} is on the meta device and holds no numbers; expected {expected} with numbers"
        )
