"""A result that is kept from one call to the next, while what it was made of stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Kept:
    """The last result of a function of tensors. It is made again once one of them is another tensor, was written to, or was moved, and
    under another autocast.

    Copies and pickles begin empty. Moving a module keeps its parameters' identity: call ``clear`` where modules are moved.
    """

    def __init__(self) -> None:
        self._made_of: list[tuple[torch.Tensor, Any]] = []
        self._result: Any = None

    def __call__(self, of: Sequence[torch.Tensor], make: Callable[[], Any]) -> Any:
        """``make()``, or what it gave the last time. Not kept where gradients are asked for, or a compiler looks on."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        now = [(x, _state(x)) for x in of]
        if len(now) != len(self._made_of) or any(a is not b or x != y for (a, x), (b, y) in zip(now, self._made_of, strict=True)):
            self._made_of, self._result = now, make()
        return self._result

    def clear(self) -> None:
        self._made_of, self._result = [], None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def _state(x: torch.Tensor) -> tuple[Any, ...]:
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) else None
    return (-1 if x.is_inference() else x._version), x.dtype, x.device, cast
