"""Published checkpoints: their names to ours and back, strictly.

Files are read without running code: ``.safetensors``, or torch's own format with ``weights_only=True``, without a fallback.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..replacing import replacing
from .files import load_tensors, save_tensors

_BLOCK = re.compile(r"clip\.visual\.transformer\.layers(0|2)\.(\d+)\.(.+)")
_OURS = re.compile(r"backbone\.clip\.visual\.transformer\.resblocks\.(\d+)\.(.+)")
_PREFIXES = (  # published, ours
    ("clip.visual.transformer.semantic_layer2.", "groups."),
    ("clip.visual.transformer.layers_mae2.", "mae_blocks."),
    ("clip.visual.transformer.reconstruct_layer2.rec_proj_a.a_fc.", "reconstruct."),
    ("vis_mae_decoder.", "decoder."),
    ("clip.", "backbone.clip."),
)
# What the published file may lack: parts that only training needs. And a fixed table that is computed here.
SEGCLIP_OPTIONAL = ("vis_mae_decoder.", "clip.visual.transformer.layers_mae2.", "clip.visual.transformer.reconstruct_layer2.")
SEGCLIP_TABLE = "vis_mae_decoder.decoder_pos_embed"


def segclip_to_ours(name: str, first_stage: int) -> str:
    """Our name of a tensor of the published SegCLIP."""
    found = _BLOCK.fullmatch(name)
    if found:
        index = int(found[2]) + (first_stage if found[1] == "2" else 0)
        return f"backbone.clip.visual.transformer.resblocks.{index}.{found[3]}"
    for published, ours in _PREFIXES:
        if name.startswith(published):
            return ours + name[len(published) :]
    return name


def segclip_to_published(name: str, first_stage: int) -> str:
    """The inverse of ``segclip_to_ours``."""
    found = _OURS.fullmatch(name)
    if found:
        index = int(found[1])
        layer = f"layers0.{index}" if index < first_stage else f"layers2.{index - first_stage}"
        return f"clip.visual.transformer.{layer}.{found[2]}"
    for published, ours in _PREFIXES:
        if name.startswith(ours):
            return published + name[len(ours) :]
    return name


def is_published_segclip(state: dict[str, torch.Tensor]) -> bool:
    return any(name.startswith("clip.visual.transformer.semantic_layer2.") for name in state)


def load_segclip(model: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """Load a published SegCLIP; returns the training-only tensors that it lacks, which stay as they are.

    Raises:
        CheckpointError: for any other missing tensor, an unexpected one, or one of another shape; naming them.
    """
    return _load(model, state, lambda name: segclip_to_ours(name, model.first_stage),
                 lambda name: segclip_to_published(name, model.first_stage), SEGCLIP_OPTIONAL, (SEGCLIP_TABLE,))


def segclip_state(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of the published layout."""
    state = {segclip_to_published(name, model.first_stage): tensor for name, tensor in model.state_dict().items()}
    state[SEGCLIP_TABLE] = model.decoder_positions()
    return state


def _load(model: torch.nn.Module, state: dict[str, torch.Tensor], ours: Callable[[str], str], published: Callable[[str], str],
          optional: tuple[str, ...], ignored: tuple[str, ...]) -> list[str]:
    own = model.state_dict()
    given = {ours(name): tensor for name, tensor in state.items() if name not in ignored}
    lacking = [name for name in own if name not in given]
    allowed = [name for name in lacking if published(name).startswith(optional)]
    missing = [published(name) for name in lacking if name not in allowed]
    unexpected = [published(name) for name in given if name not in own]
    reshaped = [f"{published(name)} {list(given[name].shape)} instead of {list(own[name].shape)}"
                for name in given if name in own and own[name].shape != given[name].shape]
    if missing or unexpected or reshaped:
        groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        text = "; ".join(f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in groups if names)
        raise CheckpointError(f"the checkpoint does not fit {getattr(model, 'name', '') or type(model).__name__} ({text})")
    model.load_state_dict({**own, **{name: tensor.to(own[name].dtype) for name, tensor in given.items()}})
    return [published(name) for name in allowed]


def write_published(state: dict[str, torch.Tensor], path: Path) -> None:
    """A bare state dict, by rename: ``.safetensors``, or torch's format under any other suffix."""
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(state, path)
        return
    with replacing(path) as part:
        torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, part)


def read_published(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a foreign checkpoint: a state dict, alone or under ``state_dict`` or ``model``.

    Raises:
        CheckpointError: if it is missing, damaged, holds more than tensors, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint file")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file fails in torch's unpickler in any way it likes
        raise CheckpointError(f"{path} cannot be read without running code, or is damaged: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    if not isinstance(tree, dict) or not tree or not all(isinstance(value, torch.Tensor) for value in tree.values()):
        raise CheckpointError(f"{path} holds no state dict; expected names and tensors")
    return {name.removeprefix("module."): tensor for name, tensor in tree.items()}
