"""When the numbers in a tensor are looked at.

Shapes, dtypes and devices are checked always: that costs nothing.

On the CPU numbers are looked at in the call. To look at one on a GPU, the host waits for all work
queued before it, on every call, and no CUDA graph can be captured: there it happens only under
``OVSEG_CHECK=1`` or inside ``with ovseg_kernels.checking():``. What the kernels of the label
operators see on their way (NaN in the logits) they write into a flag of the device, without
waiting; it is raised by a later call of these operators or by ``check_errors``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch._C import _functorch as functorch

from ._context import CHECKING

_on = os.environ.get("OVSEG_CHECK", "0") not in ("", "0")
DEFERRED = (
    "upsample_argmax: logits or bias holds NaN, or infinities of both signs in one class; "
    "expected numbers",
    "window_argmax: logits, tables or bias holds NaN or +infinity; expected numbers, or -infinity "
    "where a class is switched off",
    "window_argmax: logits, tables or bias holds NaN or an infinity; expected finite numbers for "
    "softmax",
)
UPSAMPLE, WINDOW, WINDOW_SOFTMAX = 1, 2, 3  # slots: where their flags lie


@contextlib.contextmanager
def checking(on: bool = True) -> Iterator[None]:
    """Look at numbers on a GPU too inside a ``with`` block, or not.

    ``OVSEG_CHECK=1`` does the same for a whole process. Every call of this thread or task then
    waits for the GPU, and none can be captured in a CUDA graph.
    """
    with CHECKING.to(on):
        yield


def looks_at_values(x: torch.Tensor) -> bool:
    """Return whether a check may read ``x`` on the host.

    Not while a call is being compiled, nor where there are no numbers.
    """
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return False
    inside = CHECKING.get()
    return (_on if inside is None else inside) or x.device.type == "cpu"


def defers(x: torch.Tensor) -> bool:
    """Return whether a check of ``x`` is left to the GPU.

    Only that of a plain tensor is: others may have no numbers, as fake ones have none.
    """
    return (
        x.device.type == "cuda"
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )


def looked_at(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors whose numbers a check of ``x`` reads now: itself, or none.

    Under ``torch.vmap`` one for each element of the batch.
    """
    return _parts(x.detach()) if looks_at_values(x) else []


def _parts(x: torch.Tensor) -> list[torch.Tensor]:
    """Return ``x`` without what the transforms of torch.func have wrapped it in."""
    if torch.compiler.is_compiling() or not functorch.is_functorch_wrapped_tensor(x):
        return [x]
    inner = functorch.get_unwrapped(x)
    parts = inner.unbind(functorch.maybe_get_bdim(x)) if functorch.is_batchedtensor(x) else [inner]
    return [leaf for part in parts for leaf in _parts(part)]


class _Flags:
    """One number for each of DEFERRED on one device, after one that means nothing.

    Kernels only write it, and only ones: no stream can lose what another one wrote.
    """

    def __init__(self, device: torch.device) -> None:
        # The memory outlives the mode of the call that happens to be the first.
        with torch.inference_mode(False):
            self.found = torch.zeros(1 + len(DEFERRED), dtype=torch.int32, device=device)
            self.copy = torch.zeros(
                1 + len(DEFERRED), dtype=torch.int32, pin_memory=device.type == "cuda"
            )
        self.landed: torch.cuda.Event | None = None  # of a copy on its way to the host

    def raise_arrived(self) -> None:
        """Raise what the last copy holds, if it has landed.

        Waits for nothing.
        """
        landed = self.landed
        if landed is not None and landed.query():
            self.landed = None
            self.raise_for(self.copy.tolist())

    def send(self) -> None:
        """Copy the flags to the host, behind what is queued now, if no copy is on its way."""
        if self.landed is None and not capturing():
            self.copy.copy_(self.found, non_blocking=True)
            self.landed = _event(self.found)

    def raise_for(self, found: list[int]) -> None:
        messages = [message for message, seen in zip(DEFERRED, found[1:], strict=True) if seen]
        if messages:
            self.found.zero_()
            raise ValueError(
                f"an earlier call of {'; and of '.join(messages)} (seen on the GPU after that call "
                "had returned; OVSEG_CHECK=1 raises in the call itself)"
            )


def _event(x: torch.Tensor) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))
    return event


def capturing() -> bool:
    """Return whether the current CUDA stream is being captured in a graph."""
    return torch.cuda.is_current_streamcapturing()


_flags: dict[torch.device, _Flags] = {}


def flags_of(x: torch.Tensor) -> _Flags | None:
    """Return the flags that the kernels of a call with ``x`` are to write, or None.

    None where the check is not left to a GPU. Raises what earlier calls flagged. A captured graph
    flags at every replay, into the memory that calls before the capture have made; without one it
    does not. After the call its flags are to be sent.
    """
    if looks_at_values(x) or not defers(x) or not x.numel():
        return None
    flags = _flags.get(x.device)
    captured = capturing()
    if captured:  # inside a capture no event may be asked
        return flags
    if flags is None:
        flags = _flags.setdefault(x.device, _Flags(x.device))
    flags.raise_arrived()
    return flags


def flag(flags: torch.Tensor, slot: int, bad: torch.Tensor) -> None:
    """Write a one at ``slot`` of the flags if any of ``bad`` is true, as a kernel does."""
    for each in _parts(bad):
        place = torch.where(each.any(), slot, 0)
        flags.index_fill_(0, place.reshape(1), 1)


def check_errors() -> None:
    """Raise what the GPUs have found in the numbers of earlier calls, and forget it.

    Waits for the work of each current stream.

    The natural place is where results are read anyway: after ``labels.cpu()``, or after replaying a
    CUDA graph.

    Raises:
        ValueError: naming the operator and the argument.
    """
    for flags in list(_flags.values()):
        flags.landed = None
        flags.raise_for(flags.found.tolist())
