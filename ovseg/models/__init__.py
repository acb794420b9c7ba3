"""One file a system, the registry, the shared output type."""

from .base import ImageFeatures, OVSegModel
from .registry import (
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
    "ImageFeatures",
    "OVSegModel",
    "create_model",
    "from_pretrained",
    "list_models",
    "list_pretrained",
    "load_official_state_dict",
    "official_state_dict",
    "register_model",
    "save_pretrained",
]
