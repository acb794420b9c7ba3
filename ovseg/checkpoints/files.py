"""Weights on disk: safetensors only, read without running code, written by rename."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError, NoCheckpoint
from ..paths import no_file
from ..replacing import replacing

_SEAL = "blake2b"  # in the metadata


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None, *, sealed: bool = True) -> None:
    """Write, flush, then rename: a reader sees the old file or the new one.

    Args:
        sealed: a hash of the tensors goes along, by which ``load_tensors`` finds a flipped bit.
    """
    found = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    metadata = {**(metadata or {}), _SEAL: tensors_hash(found)} if sealed else metadata
    with replacing(path) as part:
        try:
            save_file(found, part, metadata)
        except SafetensorError as error:  # no space, say
            raise OSError(f"{path} cannot be written: {error}") from error
        with open(part, "r+b") as file:
            _order(file)
            os.fsync(file.fileno())


def _order(file: BinaryIO) -> None:
    """Sort the metadata, which safetensors writes in any order: the same tensors are the same bytes."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) <= length:
        file.seek(8)
        file.write(text.ljust(length))


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, kinds, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, truncated, no safetensors file, or its tensors are not those that were written.
    """
    path = Path(path)
    if (what := no_file(path)) is not None:
        raise NoCheckpoint(f"{path} {what}; expected a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            seal = (file.metadata() or {}).get(_SEAL)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if seal is not None and seal != tensors_hash(found):
            raise CheckpointError(f"{path} is damaged: its tensors are not those that were written; expected another copy of the file")
        return found
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
