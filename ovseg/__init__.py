"""Open-vocabulary semantic segmentation from text supervision, composed from ``ovseg_kernels``."""

from ovseg_kernels import __version__

from . import errors
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
