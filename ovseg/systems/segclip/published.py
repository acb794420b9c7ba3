"""Names in the published checkpoint of SegCLIP."""

from __future__ import annotations

import re

import torch

from ...weights.published import Published

_BLOCK = re.compile(r"clip\.visual\.transformer\.layers(0|2)\.(\d+)\.(.+)")
_OURS = re.compile(r"backbone\.clip\.visual\.transformer\.resblocks\.(\d+)\.(.+)")
_PREFIXES = (  # published, ours
    ("clip.visual.transformer.semantic_layer2.", "groups."),
    ("clip.visual.transformer.layers_mae2.", "mae_blocks."),
    ("clip.visual.transformer.reconstruct_layer2.rec_proj_a.a_fc.", "reconstruct."),
    ("vis_mae_decoder.", "decoder."),
    ("clip.", "backbone.clip."),
)
_OPTIONAL = (
    "vis_mae_decoder.",
    "clip.visual.transformer.layers_mae2.",
    "clip.visual.transformer.reconstruct_layer2.",
)
MARK = "clip.visual.transformer.semantic_layer2."
POSITIONS = "vis_mae_decoder.decoder_pos_embed"  # a fixed table


def to_ours(name: str, first_stage: int) -> str:
    """Return our name of a published tensor; ``first_stage`` blocks lie before the groups."""
    found = _BLOCK.fullmatch(name)
    if found:
        index = int(found[2]) + (first_stage if found[1] == "2" else 0)
        return f"backbone.clip.visual.transformer.resblocks.{index}.{found[3]}"
    for published, ours in _PREFIXES:
        if name.startswith(published):
            return ours + name[len(published) :]
    return name


def to_theirs(name: str, first_stage: int) -> str:
    """Invert ``to_ours``."""
    found = _OURS.fullmatch(name)
    if found:
        index = int(found[1])
        layer = f"layers0.{index}" if index < first_stage else f"layers2.{index - first_stage}"
        return f"clip.visual.transformer.{layer}.{found[2]}"
    for published, ours in _PREFIXES:
        if name.startswith(ours):
            return published + name[len(ours) :]
    return name


def layout(first_stage: int, positions: torch.Tensor) -> Published:
    """Return the layout of a model.

    Args:
        first_stage: how many blocks lie before the groups.
        positions: the decoder's table at the training size.
    """
    return Published(
        lambda name: to_ours(name, first_stage),
        lambda name: to_theirs(name, first_stage),
        MARK,
        _OPTIONAL,
        {POSITIONS: lambda: positions},
    )
