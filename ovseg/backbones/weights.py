"""An open_clip model with its weights: by architecture and tag, from a file, or drawn at random."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn


def import_open_clip() -> ModuleType:
    """open_clip, or an error that names the usual cause: a torchvision that does not match torch."""
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"open_clip does not import ({error}). It needs open_clip_torch and a torchvision built for torch "
            f"{torch.__version__}: pip install 'ovseg-kernels[models]', with torch and torchvision of one release "
            "(torchvision has no CPU wheel on PyPI; the CUDA build of torch runs without a GPU)"
        ) from error
    return open_clip


def create_clip(architecture: str | dict[str, Any], weights: str | None = None) -> nn.Module:
    """Arguments as ``OpenClipOptions.architecture`` and ``clip``."""
    open_clip = import_open_clip()
    if isinstance(architecture, dict):
        if weights is not None:
            raise ValueError(f"weights is {weights!r} and architecture a configuration; expected a name of open_clip's beside weights")
        return open_clip.CLIP(**architecture)
    if architecture not in open_clip.list_models():
        raise ValueError(f"architecture is {architecture!r}; expected one of open_clip.list_models()")
    return open_clip.create_model(architecture, pretrained=weights, weights_only=True, pretrained_text=False)
