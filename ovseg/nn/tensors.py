"""In which numbers losses and scores are computed, whatever the model computes in.

From the host to the device without waiting for it.

Results that are kept from one call to the next, while the tensors that it was made of stay as they
are.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``x`` on the device.

    A GPU copies from pinned memory while the host goes on; any other memory of the host makes it
    wait.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_fused_steps = (
    0  # of the optimizers of this process: what their kernels write, torch does not count
)


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
        self._last: tuple[list[tuple[torch.Tensor, Any]], Any] = ([], None)

    def __call__(self, of: Sequence[torch.Tensor], make: Callable[[], Any]) -> Any:
        """``make()``, or what it gave the last time.

        Not kept where gradients are asked for, or a compiler looks on.
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
        self._last = ([], None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


class Version:
    """Tensors as they were at one moment: which they were, where they lay, and how often they had
    been written to.

    It keeps no tensor alive. A write through ``.data``, which torch does not count, is seen on the
    CPU where it changes the middle of a tensor. Copies and pickles are of nothing that is there.

    Args:
        of: the tensors.
        facts: what else a result was made of.
    """

    def __init__(self, of: Iterable[torch.Tensor], facts: Any = None) -> None:
        self._of = [(weakref.ref(x), _state(x)) for x in of]
        self._facts = facts

    def holds(self, of: Iterable[torch.Tensor], facts: Any = None) -> bool:
        """Return whether these are the tensors, and as they were."""
        now = list(of)
        return (
            facts == self._facts
            and len(now) == len(self._of)
            and all(
                known() is x and state == _state(x)
                for x, (known, state) in zip(now, self._of, strict=True)
            )
        )

    def __reduce__(self) -> tuple[type[Version], tuple[Any, ...]]:
        return Version, ((), float("nan"))  # which equals nothing


def autocast_type(kind: str) -> torch.dtype | None:
    """Return the dtype that autocast computes in on a kind of device; None where it is off."""
    return (
        torch.get_autocast_dtype(kind)
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        else None
    )


def _state(x: torch.Tensor) -> tuple[Any, ...]:
    kind = x.device.type
    place = x.data_ptr() if type(x) in _PLAIN else None
    return (
        (-1 if x.is_inference() else x._version),
        _fused_steps,
        place,
        _middle(x),
        x.dtype,
        x.device,
        autocast_type(kind),
    )


def _middle(x: torch.Tensor) -> bytes | None:
    """Up to eight bytes from the middle of a tensor that can be read at once: for what is written
    without being counted.
    """
    if x.device.type != "cpu" or type(x) not in _PLAIN or not x.is_contiguous() or not x.nbytes:
        return None
    length = min(8, x.nbytes)
    return ctypes.string_at(x.data_ptr() + (x.nbytes - length) // 2, length)
