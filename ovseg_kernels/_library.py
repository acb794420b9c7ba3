"""The torch library ``ovseg``: schemas, fallbacks, fakes, autocast, and loading of the native part.

Derivatives: ``_transforms``.

Schemas live in Python. The native libraries and Triton only implement them; where nothing does, the
reference's closed form answers under the same name, so ``torch.ops.ovseg.*`` always works.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import library as torch_library

from ._build import FOLDER, build_info, libc

LIBRARY = torch_library.Library("ovseg", "DEF")
SCHEMAS: dict[str, str] = {}
OPERATOR_OF: dict[str, str] = {}  # schema to the public operator it belongs to
FALLBACKS: dict[str, Callable] = {}  # what answers where no kernel is built
ON_GPUS: set[str] = set()  # schemas that are called for tensors on a GPU alone
# A handful of torch calls, the same on every device: no kernel is wanted.
COMPOSITES: set[str] = set()
BUILT_ON: dict[str, str] = {}  # public operator to the one whose schemas it calls


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


class _Native:
    """The outcome of loading one shared library, kept for ``explain`` and ``info``."""

    def __init__(self, stem: str, needs: str, unusable: str = ""):
        self.path = FOLDER / f"{stem}.so"
        self.loaded, self.reason = False, unusable
        if not self.path.exists():
            self.reason = (
                f"not built ({self.path.name} is not in the package); reinstall with {needs}"
            )
        if self.reason:
            return
        try:
            torch.ops.load_library(self.path)
            self.loaded = True
        except (OSError, RuntimeError) as error:
            built = build_info()
            there = (
                f"built against torch {built.get('torch', 'unknown')} "
                f"with {built.get('libc') or 'an unknown libc'}"
            )
            self.reason = (
                f"{there}, and does not load under {torch.__version__} "
                f"with {libc() or 'another libc'}: {error}"
            )
            warnings.warn(
                f"ovseg_kernels: {self.path.name} {self.reason}", RuntimeWarning, stacklevel=2
            )


def define(op: str, schema: str, *, on_gpus: bool = False) -> None:
    """Define a schema of the public operator ``op``.

    With ``on_gpus`` it is called for tensors on a GPU alone, and no kernel of the CPU is wanted.
    """
    name = schema.split("(", 1)[0]
    if on_gpus:
        ON_GPUS.add(name)
    SCHEMAS[name], OPERATOR_OF[name] = schema, op
    LIBRARY.define(schema)


def built_on(op: str, other: str) -> None:
    """Let the public operator ``op`` have the kernels of ``other``, which it calls."""
    BUILT_ON[op] = other


def schemas_of(op: str) -> list[str]:
    """Return the schemas that ``op`` calls: its own, and those of the operator it is built on."""
    return [name for name, owner in OPERATOR_OF.items() if owner in (op, BUILT_ON.get(op))]


def fallback(name: str, function: Callable) -> None:
    """Register what answers on a device for which no kernel is registered."""
    FALLBACKS[name] = function
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")


def composite(name: str, function: Callable) -> None:
    """Register the implementation for all devices."""
    COMPOSITES.add(name)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")


def fake(name: str) -> Callable:
    """Register shapes and dtypes of the outputs.

    For torch.compile, torch.export and meta tensors.
    """
    return torch_library.register_fake(f"ovseg::{name}", lib=LIBRARY)


def autocast(name: str, features: tuple[int, ...]) -> None:
    """Cast, under autocast, the arguments at ``features`` to its dtype, and leave scales alone.

    torch's own ``register_autocast`` would cast every floating argument, a temperature too.
    """
    op = getattr(torch.ops.ovseg, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args, device=device, keys=keys):
            dtype = torch.get_autocast_dtype(device)
            cast = [
                a.to(dtype) if i in features and a.dtype != torch.float64 else a
                for i, a in enumerate(args)
            ]
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*cast)

        LIBRARY.impl(name, kernel, key)


def autocast_type(device: torch.device) -> str:
    """Return the device type to ask torch.autocast by.

    It knows no meta tensors, which compute nothing.
    """
    return "cpu" if device.type == "meta" else device.type


@contextlib.contextmanager
def overriding(
    implementations: dict[str, Callable], keys: tuple[str, ...], *, with_keyset: bool = False
) -> Iterator[None]:
    """Let ``implementations`` answer at the dispatch ``keys``, in all threads.

    What answered before does again afterwards.
    """
    library = torch_library.Library("ovseg", "IMPL")
    # Newer releases of torch let Python override Python by default, older ones want to be told, the
    # oldest do not know.
    options = (
        {"allow_override": True}
        if "allow_override" in inspect.signature(library.impl).parameters
        else {}
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Oo]verrid")  # that is the purpose
            for name, function in implementations.items():
                for key in keys:
                    library.impl(name, function, key, with_keyset=with_keyset, **options)
        yield
    finally:
        library._destroy()


CPU = _Native("_C_cpu", "a C++ compiler and cmake")
CUDA = _Native(
    "_C_cuda", "nvcc and FORCE_CUDA=1", "" if torch.version.cuda else "this torch has no CUDA"
)
