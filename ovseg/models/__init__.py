"""One folder a system, the registry, the contract that all keep."""

from .base import GroupFeatures, ModelSpec, OVSegModel, PatchFeatures
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
    "GroupFeatures",
    "ModelSpec",
    "OVSegModel",
    "PatchFeatures",
    "create_model",
    "from_pretrained",
    "list_models",
    "list_pretrained",
    "load_official_state_dict",
    "official_state_dict",
    "register_model",
    "save_pretrained",
]
