"""Files of published checkpoints, read without running code: ``.safetensors``, or torch's own format with ``weights_only=True``, without a
fallback; settings that lie beside the tensors are left out, ``stubs.py``. What their names mean is ``models/<system>/published.py``."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch

from ..errors import CheckpointError, NoCheckpoint, first_line
from ..paths import as_given, no_file
from ..replacing import replacing
from .files import load_tensors, save_tensors
from .stubs import known_names, load_with_stubs


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
    if (what := no_file(path)) is not None:
        raise NoCheckpoint(f"{as_given(path)} {what}; expected a checkpoint file")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    if _is_script(path):
        raise CheckpointError(f"{path} is a TorchScript archive, as OpenAI published its models: it holds code, and weights are read "
                              "without running any. The same weights as safetensors: -m ViT-B-16:openai (ViT-L-14:openai, ...), or "
                              "open_clip_model.safetensors of https://huggingface.co/timm/vit_base_patch16_clip_224.openai")
    try:
        try:
            tree = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError:
            names = known_names(path)
            if names is None:
                raise
            tree = load_with_stubs(path, names)
    except Exception as error:  # a damaged or hostile file fails in torch's unpickler in any way it likes
        raise CheckpointError(f"{path} cannot be read without running code, or is damaged: {first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    if not isinstance(tree, dict) or not tree or not all(isinstance(value, torch.Tensor) for value in tree.values()):
        raise CheckpointError(f"{path} holds no state dict; expected names and tensors")
    return {name.removeprefix("module."): tensor for name, tensor in tree.items()}


def _is_script(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False
