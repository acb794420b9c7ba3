"""Files of published checkpoints, read without running code: ``.safetensors``, or torch's own
format with ``weights_only=True``, without a fallback; settings that lie beside the tensors are left
out, ``stubs.py``. What their names mean is ``models/<system>/published.py``."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..errors import CheckpointError, first_line
from ..replacing import replacing
from .file_kinds import SAFETENSORS, weights_format
from .files import load_tensors, save_tensors
from .state_dicts import plain_names, state_of, whole_tensor
from .stubs import known_names, load_with_stubs, refused_names


def write_published(state: dict[str, torch.Tensor], path: Path) -> None:
    """A bare state dict under plain names, by rename: ``.safetensors``, or torch's format under any
    other suffix."""
    state = plain_names(state)
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(state, path)
        return
    with replacing(path) as part:
        torch.save(
            {name: whole_tensor(tensor).contiguous().clone() for name, tensor in state.items()},
            part,
        )


def read_published(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of anybody's under plain names: a state dict, alone or in what a
    training wraps around it (``state_dicts.py``), in either format whatever the suffix says.

    Raises:
        CheckpointError: if it is missing, damaged, holds more than tensors, or would run code.
    """
    path = Path(path)
    if weights_format(path) == SAFETENSORS:
        return state_of(load_tensors(path), path)
    try:
        with open(path, "rb") as file:  # of a path torch would look at the suffix
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        tree = _without_settings(path, error)
    except Exception as error:  # a damaged or hostile file fails in torch's unpickler in any way it likes
        raise _unreadable(path, error) from error
    return state_of(tree, path)


def _without_settings(path: Path, error: UnpicklingError) -> Any:
    """Return what lies in a file that torch's reader refuses, if the classes that it refuses are those of
    settings."""
    names = known_names(path)
    if names is None:
        raise _unreadable(path, error) from error
    try:
        return load_with_stubs(path, names)
    except Exception as again:  # as above
        raise _unreadable(path, again) from again


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """Why a file is not read, in words of our own: torch's advise to run the code that is in it."""
    start = f"{path} cannot be read without running code, or is damaged"
    names = refused_names(path) if isinstance(error, UnpicklingError) else []
    if names:
        what = f"it names {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        return CheckpointError(
            f"{start}: {what}; expected names and tensors alone, as torch.save(model.state_dict(), "
            f"PATH) writes them"
        )
    if isinstance(error, UnpicklingError) or "weights_only" in str(error):
        return CheckpointError(
            f"{start}: it holds more than tensors, or is no checkpoint of torch's; expected names "
            f"and tensors alone"
        )
    return CheckpointError(f"{start}: {first_line(error)}")
