"""One folder a system, the registry, the contract that all keep."""

from ..weights.saving import push_to_hub, save_pretrained
from .base import GroupFeatures, ModelSpec, OVSegModel, PatchFeatures
from .loading import (
    create_model,
    default_model,
    from_pretrained,
    load_official_state_dict,
    model_at_hand,
    official_state_dict,
)
from .names import DEFAULT_MODEL, DEFAULT_VIEW, PHOTO_MODEL
from .registry import list_bundled, list_models, list_pretrained, register_model

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_VIEW",
    "PHOTO_MODEL",
    "GroupFeatures",
    "ModelSpec",
    "OVSegModel",
    "PatchFeatures",
    "create_model",
    "default_model",
    "from_pretrained",
    "list_bundled",
    "list_models",
    "list_pretrained",
    "load_official_state_dict",
    "model_at_hand",
    "official_state_dict",
    "push_to_hub",
    "register_model",
    "save_pretrained",
]
