"""Tensors: the dtype of losses, the way to the device, and results kept while their inputs stay."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_PLAIN = (Tensor, torch.nn.Parameter)


def at_least_float32(x: Tensor) -> Tensor:
    """Bring float16 and bfloat16 to float32, in which losses and scores are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Return ``x`` on the device.

    A GPU copies from pinned memory while the host goes on; any other memory of the host makes it
    wait.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def autocast_type(kind: str) -> torch.dtype | None:
    """Return the dtype that autocast computes in on a kind of device; None where it is off."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


# Steps of fused optimizers in this process: what their kernels write, torch does not count.
_fused_steps = 0


def _count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    global _fused_steps
    _fused_steps += any(group.get("fused") for group in optimizer.param_groups)


register_optimizer_step_post_hook(_count_step)


class Kept:
    """The last result of a function of tensors.

    It is made again once one of them is another tensor, was written to, or was moved, and under
    another autocast. Threads may call it at once.

    Copies and pickles begin empty. Moving a module keeps its parameters' identity: call ``clear``
    where modules are moved.
    """

    def __init__(self) -> None:
        # One value, so that no thread sees the tensors of one call with the result of another.
        self._last: tuple[list[tuple[Tensor, Any]], Any] = ([], None)

    def __call__(self, of: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """Return ``make()``, or what it gave the last time.

        It is not kept where gradients are asked for, or a compiler looks on.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        now = [(x, _state(x)) for x in of]
        made_of, result = self._last
        if len(now) != len(made_of) or any(
            a is not b or x != y for (a, x), (b, y) in zip(now, made_of, strict=True)
        ):
            result = make()
            self._last = (now, result)
        return result

    def clear(self) -> None:
        """Forget the last result."""
        self._last = ([], None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


class Version:
    """Tensors as they were at one moment: which, where, and how often they had been written to.

    It keeps no tensor alive. A write through ``.data``, which torch does not count, is seen on the
    CPU where it changes the middle of a tensor. Copies and pickles are of nothing that is there.

    Args:
        of: the tensors.
        facts: what else a result was made of.
    """

    def __init__(self, of: Iterable[Tensor], facts: Any = None) -> None:
        self._of = [(weakref.ref(x), _state(x)) for x in of]
        self._facts = facts

    def holds(self, of: Iterable[Tensor], facts: Any = None) -> bool:
        """Return whether these are the tensors, and as they were."""
        now = list(of)
        if facts != self._facts or len(now) != len(self._of):
            return False
        pairs = zip(now, self._of, strict=True)
        return all(known() is x and state == _state(x) for x, (known, state) in pairs)

    def __reduce__(self) -> tuple[type[Version], tuple[Any, ...]]:
        return Version, ((), float("nan"))  # which equals nothing


def _state(x: Tensor) -> tuple[Any, ...]:
    writes = -1 if x.is_inference() else x._version
    place = x.data_ptr() if type(x) in _PLAIN else None
    cast = autocast_type(x.device.type)
    return (writes, _fused_steps, place, _middle(x), x.dtype, x.device, cast)


def _middle(x: Tensor) -> bytes | None:
    """Return up to eight bytes from the middle of a tensor that can be read at once.

    They show what is written without being counted.
    """
    if x.device.type != "cpu" or type(x) not in _PLAIN or not x.is_contiguous() or not x.nbytes:
        return None
    length = min(8, x.nbytes)
    return ctypes.string_at(x.data_ptr() + (x.nbytes - length) // 2, length)
