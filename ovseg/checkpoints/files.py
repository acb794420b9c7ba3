"""Weights on disk: safetensors only, read without running code, written by rename."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError
from ..paths import no_file
from ..replacing import replacing


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write, flush, then rename: a reader sees the old file or the new one."""
    with replacing(path) as part:
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, part, metadata)
        with open(part, "rb") as file:
            os.fsync(file.fileno())


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, truncated or no safetensors file.
    """
    path = Path(path)
    if (what := no_file(path)) is not None:
        raise CheckpointError(f"{path} {what}; expected a safetensors file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path} ({size} bytes) is no complete safetensors file: {error}") from error


def save_weights(model: torch.nn.Module, path: Path) -> None:
    save_tensors(model.state_dict(), path, {"format": "pt"})


def load_weights(model: torch.nn.Module, path: str | Path) -> None:
    """Strictly load ``path`` into ``model``; what does not fit is listed by kind."""
    weights = load_tensors(path)
    check_fit(path, weights, model.state_dict())
    model.load_state_dict(weights)


def check_fit(path: str | Path, weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    """Raises CheckpointError unless the names and shapes of ``weights``, from ``path``, are those of ``own``."""
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    reshaped = [
        f"{name} {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    if missing or unexpected or reshaped:
        groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        text = "; ".join(f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in groups if names)
        raise CheckpointError(f"{path} does not fit the model ({text})")
