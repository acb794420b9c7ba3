"""Positions of a CLIP of one resolution and context for a model of another."""

from __future__ import annotations

import math
from typing import Any

from ..checkpoints.state_dicts import State


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
