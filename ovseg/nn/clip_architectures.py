"""The architectures of open_clip: their names, configurations, pretrained tags, sizes, positions.

An architecture is a name of open_clip's or its configuration, a dictionary as ``model_cfg`` in
``open_clip_config.json``, with two keys more: ``preprocess_cfg`` (mean and std) beside the towers,
and ``timm_kwargs`` in ``vision_cfg``, a ViT of timm of any size.
"""

from __future__ import annotations

import math
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, first_line

Architecture = str | dict[str, Any]
QUICK = "-quickgelu"  # how open_clip names an architecture with OpenAI's activation


def import_open_clip() -> ModuleType:
    """Import open_clip, or name the usual cause: a torchvision that does not match torch."""
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"open_clip does not import ({first_line(error)}). It needs open_clip_torch and a "
            f"torchvision built for torch {torch.__version__}: pip install "
            "'ovseg-kernels[models]', with torch and torchvision of one release (torchvision has "
            "no CPU wheel on PyPI; the CUDA build of torch runs without a GPU)"
        ) from error
    return open_clip


def architectures() -> list[str]:
    """Return open_clip's names, without importing it; none where it is not installed."""
    loaded = sys.modules.get("open_clip")
    if loaded is not None:
        return loaded.list_models()
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        return []
    return sorted(path.stem for path in Path(spec.origin).parent.glob("model_configs/*.json"))


def supported(architecture: str) -> bool:
    """Return whether ``OpenClipBackbone`` can walk it."""
    vision = import_open_clip().get_model_config(architecture)["vision_cfg"]
    tower = vision.get("timm_model_name", "")
    # These towers' tables of positions are those of one picture size.
    return not tower.startswith("swin") and "relpos" not in tower


def tags_of(architecture: str) -> dict[str, dict[str, Any]]:
    """Return open_clip's pretrained tags of an architecture, and the facts of each.

    The tags of both activations are there: the tag decides between them.
    """
    open_clip = import_open_clip()
    stem = architecture.removesuffix(QUICK)
    names = [name for name in (architecture, stem, stem + QUICK) if name in open_clip.list_models()]
    return {
        tag: open_clip.pretrained.get_pretrained_cfg(name, tag)
        for name in reversed(names)
        for tag in open_clip.pretrained.list_pretrained_tags_by_model(name)
    }


def sized(
    architecture: Architecture, image_size: int | None, context_length: int | None
) -> Architecture:
    """Return the architecture for another size of pictures or texts.

    Args:
        architecture: a name or a configuration.
        image_size: pixels a side; None leaves it as it is.
        context_length: tokens of a text; None leaves it as it is.

    Raises:
        InputError: for a size that it cannot have.
    """
    if image_size is None and context_length is None:
        return architecture
    config = configuration(architecture)
    vision = config["vision_cfg"]
    text = config["text_cfg"]
    if image_size is not None:
        patch = vision.get("patch_size", 16)
        blocks = isinstance(vision.get("layers", 12), int)  # a ResNet has a list of numbers
        if not blocks or {"timm_model_name", "timm_kwargs"} & vision.keys():
            raise InputError(
                f"image_size is {image_size} and architecture {title(architecture)}, whose image "
                "tower is not open_clip's ViT; expected None: pictures of any size are read all "
                "the same"
            )
        if not isinstance(patch, int) or image_size < patch or image_size % patch:
            raise InputError(
                f"image_size is {image_size}; expected a multiple of the patch, {patch} pixels"
            )
        vision["image_size"] = image_size
    if context_length is not None:
        if "hf_model_name" in text:
            raise InputError(
                f"context_length is {context_length} and architecture {title(architecture)}, "
                "whose text tower is transformers'; expected None"
            )
        text["context_length"] = context_length
    return config


def configuration(architecture: Architecture) -> dict[str, Any]:
    """Return a copy of the configuration, with ``preprocess_cfg``."""
    if isinstance(architecture, dict):
        return deepcopy(architecture)
    open_clip = import_open_clip()
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(
            f"architecture is {architecture!r}; expected one of open_clip.list_models()"
        )
    seen = [(tuple(facts["mean"]), tuple(facts["std"])) for facts in tags_of(architecture).values()]
    if not seen:
        seen = [(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)]
    mean, std = max(seen, key=seen.count)
    return {**config, "preprocess_cfg": {"mean": mean, "std": std}}


def of_activation(architecture: str, facts: dict[str, Any]) -> Architecture:
    """Return the architecture with the activation that the tag was trained with.

    open_clip's names of OpenAI's models leave it out.
    """
    if not facts.get("quick_gelu"):
        return architecture.removesuffix(QUICK)
    if is_quick(architecture):
        return architecture
    quick = architecture + QUICK
    if quick in import_open_clip().list_models():
        return quick
    return {**configuration(architecture), "quick_gelu": True}


def is_quick(architecture: Architecture) -> bool:
    """Return whether its activation is OpenAI's QuickGELU."""
    return bool(configuration(architecture).get("quick_gelu"))


def title(architecture: Architecture) -> str:
    """Return what messages call it."""
    return repr(architecture) if isinstance(architecture, str) else "a configuration of its own"


def resize_clip_positions(
    model: Any, state: dict[str, Tensor], interpolation: str = "bicubic", antialias: bool = True
) -> dict[str, Tensor]:
    """Return ``state`` of a CLIP with its tables of positions resized to the model's.

    It is done by open_clip's own functions. What is no such table, or not of the model's width,
    stays for the comparison of shapes to name.
    """
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    found = dict(state)
    name = "visual.positional_embedding"
    rows = _table_like(found.get(name), getattr(model.visual, "positional_embedding", None))
    if rows > 1 and math.isqrt(rows - 1) ** 2 + 1 == rows:
        found[name] = found[name].float()
        resize_pos_embed(found, model, interpolation, antialias)
    name = "positional_embedding"
    name = name if name in found else f"text.{name}"
    text = getattr(model, "text", model)
    if _table_like(found.get(name), getattr(text, "positional_embedding", None)):
        found[name] = found[name].float()
        resize_text_pos_embed(found, model)
    return found


def _table_like(table: Tensor | None, own: Tensor | None) -> int:
    """Return the rows of a table [L, D] of positions that is as wide as the model's, else 0."""
    if table is None or own is None or table.dim() != 2 or table.shape[1:] != own.shape[1:]:
        return 0
    return len(table)
