"""Open-vocabulary semantic segmentation from text supervision, composed from ``ovseg_kernels``.

What a name stands for is imported when it is first asked for. So the command line can set up
torch's threads before torch is imported, and ``ovseg --version`` and ``ovseg info`` work without
the libraries of ``[models]``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors
from .libraries import MissingLibrary, reason

if TYPE_CHECKING:
    from ovseg_kernels import __version__

    from .inference import Predictor, Segmentation, segment
    from .systems import (
        create_model,
        from_pretrained,
        list_models,
        list_pretrained,
        load_official_state_dict,
        official_state_dict,
        register_model,
        save_pretrained,
    )

__all__ = [
    "Predictor",
    "Segmentation",
    "__version__",
    "create_model",
    "errors",
    "from_pretrained",
    "list_models",
    "list_pretrained",
    "load_official_state_dict",
    "official_state_dict",
    "register_model",
    "save_pretrained",
    "segment",
]

_INFERENCE = ("Predictor", "Segmentation", "segment")
_SUBMODULES = (
    "data",
    "distributed",
    "environment",
    "evaluation",
    "inference",
    "nn",
    "objectives",
    "options",
    "paths",
    "progress",
    "registration",
    "replacing",
    "systems",
    "text_files",
    "training",
    "weights",
)

if not TYPE_CHECKING:  # a type checker would take every name for one that is there

    def __getattr__(name: str) -> Any:
        """Import what ``name`` stands for.

        Raises:
            MissingLibrary: in one sentence, if a library that it needs is not installed.
        """
        if name not in __all__ and name not in _SUBMODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            found = _found(name)
        except ModuleNotFoundError as error:
            if isinstance(error, MissingLibrary) or (error.name or "").startswith("ovseg"):
                raise
            raise MissingLibrary(
                f"ovseg {reason(error)}. The operators alone, ovseg_kernels, do without",
                name=error.name,
            ) from None
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


def _found(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name == "__version__":
        return import_module("ovseg_kernels").__version__
    return getattr(
        import_module(".inference" if name in _INFERENCE else ".systems", __name__), name
    )
