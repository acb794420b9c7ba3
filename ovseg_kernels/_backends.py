"""Which implementation answers a call, and why not a faster one.

``OVSEG_BACKEND=cpu|cuda|triton|reference`` or ``with ovseg_kernels.backend("reference"):`` forces one; asking for one
that cannot run is an error. Otherwise the best one is taken, and a fall back to the reference warns once per operator.
A backward runs on the backend that is in force when it runs: all of them read the same saved statistics.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from . import _library as lib
from ._build import cuda_archs
from .triton import IMPLEMENTATIONS

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
_forced = os.environ.get("OVSEG_BACKEND", "auto")
_warned: set[str] = set()


@dataclass(frozen=True)
class Choice:
    """``backend`` runs; ``refused`` holds the reason of every backend that does not."""

    op: str
    backend: str
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.refused.items()])


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block.

    Raises:
        ValueError: for a name that is no backend. BackendError comes from the call that cannot be served.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; expected one of {list(BACKENDS)}")
    before, _forced = _forced, name
    available_backends()  # asked now, and not while a call is being compiled
    try:
        _let_triton_answer(_triton_keys())
        yield
    finally:
        _forced = before
        _let_triton_answer(_triton_keys())


def available_backends() -> dict[str, str]:
    """Every backend with ``yes`` or the reason why it cannot run here."""
    return {name: _unavailable(name) or "yes" for name in BACKENDS[1:]}


def interpreted() -> bool:
    """Triton's interpreter was switched on before import: its kernels then run on CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_registered = contextlib.ExitStack()  # Triton's kernels, while they answer
_registered_keys: tuple[str, ...] = ()


def _triton_keys() -> tuple[str, ...]:
    """Where Triton should answer now: where it is forced, and on CUDA where no CUDA library is loaded."""
    if _forced == "triton":
        return () if _unavailable("triton") else ("CPU", "CUDA") if interpreted() else ("CUDA",)
    stands_in = _forced == "auto" and _TRITON_INSTALLED and torch.version.cuda is not None and not lib.CUDA.loaded
    return ("CUDA",) if stands_in else ()


def _let_triton_answer(keys: tuple[str, ...]) -> None:
    global _registered_keys
    if keys != _registered_keys:
        _registered.close()
        _registered_keys = keys
        if keys:
            _registered.enter_context(lib.overriding(IMPLEMENTATIONS, keys))


_reasons: dict[str, str] = {}


def _unavailable(name: str) -> str:
    """Why a backend cannot run here, or nothing. Asked once: it looks at the GPU, which must not happen at every call."""
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
    """Why code for ``archs`` ("80", "90a", "120+PTX") does not run on a GPU of this capability; empty if it does."""
    for arch in archs:
        chip = arch.removesuffix("+PTX")
        exact = chip[-1] in "af"  # such code runs on its own chip alone
        major, minor = divmod(int(chip.rstrip("af")), 10)
        if (major, minor) == capability or (not exact and major == capability[0] and minor <= capability[1]):
            return ""
        if arch.endswith("+PTX") and (major, minor) <= capability:
            return ""
    if not archs:  # built by hand: the launch itself will tell
        return ""
    return f"built for sm_{', sm_'.join(archs)}, and the GPU is sm_{capability[0]}{capability[1]}; set TORCH_CUDA_ARCH_LIST and reinstall"


def allow_tf32(x: torch.Tensor) -> bool:
    """torch's own switch, for float32 products on CUDA."""
    return x.device.type == "cuda" and x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32


def select(op: str, device: torch.device) -> Choice:
    """The choice for tensors on ``device``. Raises BackendError if a backend was forced and cannot run."""
    refused = {}
    for name in ("cuda", "triton", "cpu"):
        fits = device.type in {"cuda": ("cuda",), "triton": ("cuda", "cpu") if interpreted() else ("cuda",), "cpu": ("cpu",)}[name]
        refused[name] = _unavailable(name) if fits else f"the tensors are on {device.type}"
    if _forced == "auto" and device.type == "cpu" and not refused["triton"]:
        refused["triton"] = "the interpreter runs only when it is asked for"
    if _forced not in BACKENDS:
        raise ValueError(f"OVSEG_BACKEND is {_forced!r}; expected one of {list(BACKENDS)}")
    if _forced == "reference":
        return Choice(op, "reference", {name: reason or "reference is forced" for name, reason in refused.items()})
    if _forced != "auto":
        if refused[_forced]:
            raise lib.BackendError(f"{op}: backend {_forced!r} was asked for and cannot run: {refused[_forced]}")
        return Choice(op, _forced, {n: r or f"{_forced} is forced" for n, r in refused.items() if n != _forced})
    for name, reason in refused.items():
        if not reason:
            return Choice(op, name, {n: r for n, r in refused.items() if r})
    return Choice(op, "reference", refused)


def use_definition(op: str, device: torch.device) -> bool:
    """True when the reference is forced: the caller then runs the differentiable definition itself."""
    if _forced == "auto" and torch.compiler.is_compiling():
        return False  # the first call outside of it says what there is to say
    if device.type == "meta":
        return _forced == "reference"  # the fakes answer
    choice = select(op, device)
    if choice.backend == "triton" and _forced == "auto":
        _let_triton_answer(("CUDA",))  # a CUDA library may be loaded, and not be for this GPU
    if choice.backend == "reference" and _forced == "auto" and op not in _warned:
        _warned.add(op)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.refused.items())
        warnings.warn(
            f"ovseg_kernels.{op} runs on the reference for {device.type} tensors ({reasons}). "
            "See `python -m ovseg_kernels.info`.",
            RuntimeWarning,
            stacklevel=3,
        )
    return _forced == "reference"


def explain(op: str, *args: object) -> Choice:
    """Which backend would run ``op`` for these arguments, and why not the others.

    Args:
        op: name of a public operator.
        args: its tensor arguments; the first tensor decides the device. None given: the CPU.
    """
    from . import OPERATORS

    if op not in OPERATORS:
        raise ValueError(f"op is {op!r}; expected one of {list(OPERATORS)}")
    device = next((a.device for a in args if isinstance(a, torch.Tensor)), torch.device("cpu"))
    return select(op, device)


_let_triton_answer(_triton_keys())
