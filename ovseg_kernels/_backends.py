"""The backends: which implementation answers a call, and why not a faster one.

``OVSEG_BACKEND=cpu|cuda|triton|reference`` forces one for the process, ``with
ovseg_kernels.backend("reference"):`` for the calls of one thread or asyncio task; asking for one
that cannot run is an error. Otherwise the best one is taken, and a fall back to the reference warns
once per operator. A backward runs on the backend that is in force where it runs, which on a GPU is
a thread of autograd's own; where nothing is forced, on that of its forward: all of them read the
same saved statistics.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from . import _library as lib
from ._build import cuda_archs
from ._context import BACKEND
from .triton import IMPLEMENTATIONS, KERNELS

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
_forced = os.environ.get("OVSEG_BACKEND", "auto")  # for the process
_warned: set[str] = set()


@dataclass(frozen=True)
class Choice:
    """The ``backend`` that runs an operator; ``refused`` holds the reason of every other one."""

    op: str
    backend: str
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        return "\n".join(
            lines + [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        )


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block, for this thread or asyncio task.

    Raises:
        ValueError: for a name that is no backend. BackendError comes from the call that cannot be
            served.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; expected one of {list(BACKENDS)}")
    available_backends()  # asked now, and not while a call is being compiled
    with BACKEND.to(name):
        _let_triton_answer()
        yield


def forced() -> str:
    """Return the backend that is forced here, or ``auto``."""
    inside = BACKEND.get()
    return _forced if inside is None else inside


def available_backends() -> dict[str, str]:
    """Return every backend with ``yes`` or the reason why it cannot run here."""
    return {name: _unavailable(name) or "yes" for name in BACKENDS[1:]}


def interpreted() -> bool:
    """Return whether Triton's interpreter was switched on before import.

    Its kernels then run on CPU tensors, slowly.
    """
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_registering = threading.Lock()
_asking = contextlib.ExitStack()  # holds what ``_asks`` has registered, to the end of the process
_asking_at: set[tuple[str, str]] = set()  # (schema, dispatch key)
_for_cuda = _TRITON_INSTALLED and torch.version.cuda is not None  # Triton may compile for a GPU
_no_cuda_library = not lib.CUDA.loaded  # or none for this GPU
_cuda_kernels: set[str] = set()  # the schemas that the CUDA library implements


def start() -> None:
    """Let Triton answer where it does without being forced in a block.

    Called once, when all schemas are defined.
    """
    _cuda_kernels.update(
        name
        for name in lib.SCHEMAS
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"ovseg::{name}", "CUDA")
    )
    _let_triton_answer()


def _triton_alone(name: str) -> bool:
    """Return whether no CUDA kernel can answer this schema on a GPU, and Triton can."""
    return _for_cuda and (_no_cuda_library or name not in _cuda_kernels)


def _let_triton_answer() -> None:
    """Put what asks in every call whether Triton is to answer it where that may now be so.

    That is wherever Triton is forced, and at CUDA for the schemas that have no CUDA kernel. Done
    once for each of them: the dispatcher knows of no contexts.
    """
    places = {(name, "CUDA") for name in IMPLEMENTATIONS if _triton_alone(name)}
    if forced() == "triton" and not _unavailable("triton"):
        keys = ("CPU", "CUDA") if interpreted() else ("CUDA",)
        places |= {(name, key) for name in IMPLEMENTATIONS for key in keys}
    with _registering:
        for name, key in sorted(places - _asking_at):
            asking = {name: _asks(name, key)}
            _asking.enter_context(lib.overriding(asking, (key,), with_keyset=True))
            _asking_at.add((name, key))


def _asks(name: str, key: str) -> Callable:
    """Return the kernel that decides between Triton and what answered before.

    It calls Triton's where that is forced, and where no CUDA kernel answers, the reference not
    being forced.
    """
    try:
        before = torch.library.get_kernel(f"ovseg::{name}", key)
    except RuntimeError:  # none for this device
        before = None

    def kernel(keyset, *args):
        wanted = forced()
        if wanted == "triton" or (
            key == "CUDA" and wanted in ("auto", "cuda") and _triton_alone(name)
        ):
            return IMPLEMENTATIONS[name](*args)
        if before is None:
            return (lib.FALLBACKS.get(name) or lib.COMPOSITES[name])(*args)
        return before.call_boxed(keyset, *args)

    return kernel


_reasons: dict[str, str] = {}


def _unavailable(name: str) -> str:
    """Return why a backend cannot run here, or nothing.

    Asked once: it looks at the GPU, which must not happen at every call.
    """
    if name not in _reasons:
        _reasons[name] = _find_reason(name)
    return _reasons[name]


def _find_reason(name: str) -> str:
    if name == "reference":
        return ""
    if name == "triton":
        if not _TRITON_INSTALLED:
            return "triton is not installed"
        if interpreted() or (torch.version.cuda is not None and torch.cuda.is_available()):
            return ""
        return "no GPU is visible to torch (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    native = lib.CPU if name == "cpu" else lib.CUDA
    if not native.loaded or name == "cpu":
        return native.reason
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    return unsupported(cuda_archs(), torch.cuda.get_device_capability())


def unsupported(archs: list[str], capability: tuple[int, int]) -> str:
    """Return why code for ``archs`` does not run on a GPU of this capability; empty if it does.

    ``archs`` are written as in "80", "90a", "120+PTX".
    """
    for arch in archs:
        chip = arch.removesuffix("+PTX")
        exact = chip[-1] in "af"  # such code runs on its own chip alone
        major, minor = divmod(int(chip.rstrip("af")), 10)
        if (major, minor) == capability or (
            not exact and major == capability[0] and minor <= capability[1]
        ):
            return ""
        if arch.endswith("+PTX") and (major, minor) <= capability:
            return ""
    if not archs:  # built by hand: the launch itself will tell
        return ""
    return (
        f"built for sm_{', sm_'.join(archs)}, and the GPU is sm_{capability[0]}{capability[1]}; "
        "set TORCH_CUDA_ARCH_LIST and reinstall"
    )


def allow_tf32(x: torch.Tensor) -> bool:
    """Return torch's own switch, for float32 products on CUDA."""
    return (
        x.device.type == "cuda"
        and x.dtype == torch.float32
        and torch.backends.cuda.matmul.allow_tf32
    )


def lacks(op: str, name: str) -> bool:
    """Return whether no kernel of this backend was written for the operator.

    What a CUDA library that is not loaded holds is not known: it is not held to lack anything.
    """
    if name == "triton":
        return not any(schema in KERNELS for schema in lib.schemas_of(op))
    if name == "cuda":
        return lib.CUDA.loaded and _cuda_kernels.isdisjoint(lib.schemas_of(op))
    return False


def _no_kernel(op: str, name: str) -> str:
    """Return the sentence about a backend that the operator lacks, or nothing."""
    if not lacks(op, name):
        return ""
    has = [other for other in BACKENDS[1:] if not lacks(op, other)]
    return f"{op} has no kernel there, only on {', '.join(has)}"


def select(op: str, device: torch.device) -> Choice:
    """Return the choice for tensors on ``device``.

    Raises BackendError if a backend was forced and cannot run, or has no kernel of the operator.
    """
    refused = {}
    for name in ("cuda", "triton", "cpu"):
        fits = (
            device.type
            in {
                "cuda": ("cuda",),
                "triton": ("cuda", "cpu") if interpreted() else ("cuda",),
                "cpu": ("cpu",),
            }[name]
        )
        refused[name] = (
            _unavailable(name) or _no_kernel(op, name)
            if fits
            else f"the tensors are on {device.type}"
        )
    wanted = forced()
    if wanted == "auto" and device.type == "cpu" and not refused["triton"]:
        refused["triton"] = "the interpreter runs only when it is asked for"
    if wanted not in BACKENDS:
        raise ValueError(f"OVSEG_BACKEND is {wanted!r}; expected one of {list(BACKENDS)}")
    if wanted == "reference":
        return Choice(
            op,
            "reference",
            {name: reason or "reference is forced" for name, reason in refused.items()},
        )
    if wanted != "auto":
        if reason := _no_kernel(op, wanted) or refused[wanted]:
            raise lib.BackendError(
                f"{op}: backend {wanted!r} was asked for and cannot run: {reason}"
            )
        return Choice(
            op, wanted, {n: r or f"{wanted} is forced" for n, r in refused.items() if n != wanted}
        )
    for name, reason in refused.items():
        if not reason:
            return Choice(op, name, {n: r for n, r in refused.items() if r})
    return Choice(op, "reference", refused)


def use_definition(op: str, device: torch.device) -> bool:
    """Return whether the reference is forced.

    The caller then runs the differentiable definition itself.
    """
    global _no_cuda_library
    wanted = forced()
    if wanted == "auto" and torch.compiler.is_compiling():
        return False  # the first call outside of it says what there is to say
    if device.type == "meta":
        return wanted == "reference"  # the fakes answer
    choice = select(op, device)
    if choice.backend == "triton" and not _no_cuda_library and _unavailable("cuda"):
        _no_cuda_library = True  # a CUDA library may be loaded, and not be for this GPU
        _let_triton_answer()
    if choice.backend == "reference" and wanted == "auto" and op not in _warned:
        _warned.add(op)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.refused.items())
        warnings.warn(
            f"ovseg_kernels.{op} runs on the reference for {device.type} tensors ({reasons}). "
            "See `python -m ovseg_kernels.info`.",
            RuntimeWarning,
            stacklevel=3,
        )
    return wanted == "reference"


def explain(op: str, *args: object) -> Choice:
    """Return which backend would run ``op`` for these arguments, and why not the others.

    Args:
        op: name of a public operator.
        args: its tensor arguments; the first tensor decides the device. None given: the CPU.
    """
    from . import OPERATORS

    if op not in OPERATORS:
        raise ValueError(f"op is {op!r}; expected one of {list(OPERATORS)}")
    device = next((a.device for a in args if isinstance(a, torch.Tensor)), torch.device("cpu"))
    return select(op, device)
