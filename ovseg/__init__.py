"""Open-vocabulary semantic segmentation from text supervision, composed from ``ovseg_kernels``."""

from ovseg_kernels import __version__

from . import errors

try:
    from .inference import Predictor, Segmentation, segment
    from .models import (
        create_model,
        from_pretrained,
        list_models,
        list_pretrained,
        load_official_state_dict,
        official_state_dict,
        register_model,
        save_pretrained,
    )
except ModuleNotFoundError as error:
    if (error.name or "").startswith("ovseg"):
        raise
    raise ModuleNotFoundError(f"ovseg needs {error.name}, which is not installed: pip install 'ovseg-kernels[models]'. The operators "
                              "alone, ovseg_kernels, do without", name=error.name) from error

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
