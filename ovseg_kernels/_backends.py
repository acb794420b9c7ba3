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
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from . import _library as lib
from . import _selection
from ._build import cuda_archs
from ._context import BACKEND
from .triton import IMPLEMENTATIONS

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")
_forced = os.environ.get("OVSEG_BACKEND", "auto")  # for the process
_warned: set[str] = set()


@dataclass(frozen=True)
class Pass:
    """The ``backend`` that runs one schema of an operator, and why."""

    name: str
    backend: str
    why: str


@dataclass(frozen=True)
class Choice:
    """The ``backend`` that runs an operator; ``refused`` holds the reason of every other one.

    It is that of the first of the ``passes``; the others may run elsewhere.
    """

    op: str
    backend: str
    refused: dict[str, str] = field(default_factory=dict)
    passes: tuple[Pass, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        if any(x.backend != "cpu" for x in self.passes):  # where they have no choice
            lines += [f"  {x.name} on {x.backend}: {x.why}" for x in self.passes]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


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
_for_cuda = _TRITON_INSTALLED and torch.version.cuda is not None  # Triton may compile for a GPU
_registering = threading.Lock()
_asking = contextlib.ExitStack()  # holds what ``_asks`` has registered, to the end of the process
_asking_at: set[tuple[str, str]] = set()  # (schema, dispatch key)
_no_cuda_library = not lib.CUDA.loaded  # or none for this GPU


def start() -> None:
    """Let Triton answer where it does without being forced in a block.

    Called once, when all schemas are defined.
    """
    _let_triton_answer()


def _may_be_triton(name: str) -> bool:
    """Return whether Triton may be the one to answer on a GPU, whichever it is."""
    return _no_cuda_library or "triton" in {rule.order[0] for rule in _selection.TABLE[name]}


def _let_triton_answer() -> None:
    """Put what asks in every call whether Triton is to answer it where that may now be so.

    That is wherever Triton is forced, and at CUDA for the passes of which the table may say so;
    nothing stands before the others. Done once for each: the dispatcher knows of no contexts.
    """
    places = {(name, "CUDA") for name in IMPLEMENTATIONS if _for_cuda and _may_be_triton(name)}
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

    It calls Triton's where that is forced, and on a GPU where the table says so.
    """
    try:
        before = torch.library.get_kernel(f"ovseg::{name}", key)
    except RuntimeError:  # none for this device
        before = None
    told: dict[tuple[str, int, bool], bool] = {}  # what the table said: it is asked once

    def says_triton(wanted: str, x: torch.Tensor) -> bool:
        at = (wanted, x.get_device(), x.dtype == torch.float64)
        if at not in told:
            told[at] = _pass(name, wanted, x.device, at[2]).backend == "triton"
        return told[at]

    def kernel(keyset, *args):
        wanted = forced()
        if wanted == "triton" or (
            key == "CUDA" and wanted in ("auto", "cuda") and says_triton(wanted, args[0])
        ):
            return IMPLEMENTATIONS[name](*args)
        if before is None:
            return lib.FALLBACKS[name](*args)
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
    """Return whether no kernel of this backend was written for the operator."""
    if name in ("cpu", "reference"):
        return False
    return not any(name in _selection.backends_of(schema) for schema in _passes_of(op))


def _passes_of(op: str) -> list[str]:
    """Return the schemas of an operator that are kernels, and no composites of torch calls."""
    return [name for name in lib.schemas_of(op) if name not in lib.COMPOSITES]


def _no_kernel(op: str, name: str) -> str:
    """Return the sentence about a backend that the operator lacks, or nothing."""
    if not lacks(op, name):
        return ""
    has = [other for other in BACKENDS[1:] if not lacks(op, other)]
    return f"{op} has no kernel there, only on {', '.join(has)}"


def _cannot(op: str, name: str, device: torch.device) -> str:
    """Return why a backend cannot run an operator for tensors on ``device``, or nothing."""
    devices = {
        "cuda": ("cuda",),
        "triton": ("cuda", "cpu") if interpreted() else ("cuda",),
        "cpu": ("cpu",),
    }[name]
    if device.type not in devices:
        return f"the tensors are on {device.type}"
    return _unavailable(name) or _no_kernel(op, name)


def _check_forced(op: str, wanted: str, device: torch.device) -> None:
    """Raise if what is forced is no backend, cannot run, or has no kernel of the operator."""
    if wanted not in BACKENDS:
        raise ValueError(f"OVSEG_BACKEND is {wanted!r}; expected one of {list(BACKENDS)}")
    if wanted not in ("auto", "reference") and (
        reason := _no_kernel(op, wanted) or _cannot(op, wanted, device)
    ):
        raise lib.BackendError(f"{op}: backend {wanted!r} was asked for and cannot run: {reason}")


def _pass(name: str, wanted: str, device: torch.device, float64: bool) -> Pass:
    """Return what runs a pass where ``wanted`` is forced, or nothing is.

    A pass without a kernel on the backend that is forced has the best of its others.
    """
    if wanted == "reference":
        return Pass(name, "reference", "it is forced")
    order: list[str] = []
    why = f"no kernel for tensors on {device.type}"
    if device.type == "cuda":
        rule = _selection.rule(name, _capability(device), float64)
        order = list(rule.order)
        why = rule.why
    elif device.type == "cpu":
        order = ["cpu"]
        why = "the tensors are on the CPU"
    if wanted != "auto" and wanted in (*order, *_selection.backends_of(name)):
        order = [wanted, *(x for x in order if x != wanted)]
        why = "it is forced"
    for found in order:
        reason = _unavailable(found)
        if not reason:
            return Pass(name, found, why)
        why = f"{found} comes first and cannot run: {reason}"
    return Pass(name, "reference", why)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU; none for a fake one where torch sees no GPU."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


def select(op: str, device: torch.device, float64: bool = False) -> Choice:
    """Return the choice for tensors on ``device``.

    Raises BackendError if a backend was forced and cannot run, or has no kernel of the operator.
    """
    wanted = forced()
    _check_forced(op, wanted, device)
    passes = tuple(_pass(name, wanted, device, float64) for name in _passes_of(op))
    chosen = passes[0].backend
    refused = {}
    for name in ("cuda", "triton", "cpu"):
        if name == chosen:
            continue
        if wanted != "auto":
            why = f"{wanted} is forced"
        elif device.type == "cpu":
            why = "the interpreter runs only when it is asked for"
        else:
            why = f"{chosen} comes first"
        refused[name] = _cannot(op, name, device) or why
    return Choice(op, chosen, refused, passes)


# (operator, device, what is forced) -> the choice: an operator asks in every call.
_choices: dict[tuple[str, torch.device, str], Choice] = {}


def use_definition(op: str, device: torch.device) -> bool:
    """Return whether the reference is forced.

    The caller then runs the differentiable definition itself.
    """
    global _no_cuda_library
    wanted = forced()
    if device.type == "meta":
        return wanted == "reference"  # the fakes answer
    if torch.compiler.is_compiling():
        if wanted != "auto":  # else the first call outside of it says what there is to say
            _check_forced(op, wanted, device)
        return wanted == "reference"
    choice = _choices.get((op, device, wanted))
    if choice is None:
        choice = _choices[op, device, wanted] = select(op, device)
        if device.type == "cuda" and not _no_cuda_library and _unavailable("cuda"):
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
        args: its tensor arguments; the first tensor decides device and dtype. None given: the CPU.
    """
    from . import OPERATORS

    if op not in OPERATORS:
        raise ValueError(f"op is {op!r}; expected one of {list(OPERATORS)}")
    first = next((a for a in args if isinstance(a, torch.Tensor)), torch.empty(0))
    return select(op, first.device, first.dtype == torch.float64)
