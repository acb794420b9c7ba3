"""The architectures of open_clip: their names, configurations, pretrained tags and sizes.

An architecture is a name of open_clip's or its configuration, a dictionary as ``model_cfg`` in
``open_clip_config.json``, with two keys more: ``preprocess_cfg`` (mean and std) beside the towers,
and ``timm_kwargs`` in ``vision_cfg``, a ViT of timm of any size.

Positions of a CLIP of one resolution and context for a model of another.
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

from ..errors import InputError, first_line
from ..weights.state_dicts import State

Architecture = str | dict[str, Any]
QUICK = "-quickgelu"  # how open_clip names an architecture with OpenAI's activation


def import_open_clip() -> ModuleType:
    """open_clip, or an error that names the usual cause: a torchvision that does not match torch."""
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"open_clip does not import ({first_line(error)}). It needs open_clip_torch and a "
            "torchvision built for torch "
            f"{torch.__version__}: pip install 'ovseg-kernels[models]', with torch and "
            "torchvision of one release "
            "(torchvision has no CPU wheel on PyPI; the CUDA build of torch runs without a GPU)"
        ) from error
    return open_clip


def architectures() -> list[str]:
    """open_clip's names, without importing it; none where it is not installed."""
    loaded = sys.modules.get("open_clip")
    if loaded is not None:
        return loaded.list_models()
    spec = find_spec("open_clip")
    return (
        sorted(path.stem for path in (Path(spec.origin).parent / "model_configs").glob("*.json"))
        if spec and spec.origin
        else []
    )


def supported(architecture: str) -> bool:
    """Return whether ``OpenClipBackbone`` can walk it."""
    tower = (
        import_open_clip().get_model_config(architecture)["vision_cfg"].get("timm_model_name", "")
    )
    return (
        not tower.startswith("swin") and "relpos" not in tower
    )  # their tables of positions are those of one picture size


def tags_of(architecture: str) -> dict[str, dict[str, Any]]:
    """open_clip's pretrained tags of an architecture: tag -> its facts.

    Those of both activations: the tag decides between them.
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
    """The architecture for pictures of so many pixels a side and texts of so many tokens; None
    leaves them as they are.

    Raises:
        InputError: for a size that it cannot have.
    """
    if image_size is None and context_length is None:
        return architecture
    config = configuration(architecture)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if image_size is not None:
        patch = vision.get("patch_size", 16)
        if (
            not isinstance(vision.get("layers", 12), int)
            or {"timm_model_name", "timm_kwargs"} & vision.keys()
        ):
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
    """A copy of the configuration, with ``preprocess_cfg``."""
    if isinstance(architecture, dict):
        return deepcopy(architecture)
    open_clip = import_open_clip()
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(
            f"architecture is {architecture!r}; expected one of open_clip.list_models()"
        )
    seen = [(tuple(facts["mean"]), tuple(facts["std"])) for facts in tags_of(architecture).values()]
    mean, std = (
        max(seen, key=seen.count)
        if seen
        else (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return {**config, "preprocess_cfg": {"mean": mean, "std": std}}


def of_activation(architecture: str, facts: dict[str, Any]) -> Architecture:
    """The architecture with the activation that the tag was trained with. open_clip's names of
    OpenAI's models leave it out.
    """
    if facts.get("quick_gelu") and not is_quick(architecture):
        quick = architecture + QUICK
        return (
            quick
            if quick in import_open_clip().list_models()
            else {**configuration(architecture), "quick_gelu": True}
        )
    return architecture if facts.get("quick_gelu") else architecture.removesuffix(QUICK)


def is_quick(architecture: Architecture) -> bool:
    """Return whether its activation is OpenAI's QuickGELU."""
    return bool(configuration(architecture).get("quick_gelu"))


def title(architecture: Architecture) -> str:
    """Return what messages call it."""
    return repr(architecture) if isinstance(architecture, str) else "a configuration of its own"


def resize_clip_positions(
    model: Any, state: State, interpolation: str = "bicubic", antialias: bool = True
) -> State:
    """``state`` of a CLIP with its tables of positions resized to the model's by open_clip's own
    functions. What is no such table, or not of the model's width, stays for the comparison of
    shapes to name."""
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    found = dict(state)
    table = found.get("visual.positional_embedding")
    own = getattr(model.visual, "positional_embedding", None)
    if (
        table is not None
        and own is not None
        and table.dim() == 2
        and table.shape[1:] == own.shape[1:]
        and len(table) > 1
        and (math.isqrt(len(table) - 1) ** 2 + 1 == len(table))
    ):
        found["visual.positional_embedding"] = table.float()
        resize_pos_embed(found, model, interpolation, antialias)
    name = (
        "positional_embedding" if "positional_embedding" in found else "text.positional_embedding"
    )
    words = found.get(name)
    own = getattr(getattr(model, "text", model), "positional_embedding", None)
    if (
        words is not None
        and own is not None
        and words.dim() == 2
        and words.shape[1:] == own.shape[1:]
    ):
        found[name] = words.float()
        resize_text_pos_embed(found, model)
    return found
