"""Training checkpoints: complete or absent, safetensors and JSON, newest complete one wins."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.files import load_tensors, load_weights, save_tensors, save_weights
from ..errors import CheckpointError

_MARK = "COMPLETE"


def save(folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Write ``folder/step_N`` under another name, mark it complete, rename it, then drop the oldest beyond ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    target, part = folder / f"step_{step:08d}", folder / f"step_{step:08d}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    save_weights(model, part / "model.safetensors")
    state = optimizer.state_dict()
    tensors = {f"{i}.{key}": torch.as_tensor(value) for i, entry in state["state"].items() for key, value in entry.items()}
    tensors["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    save_tensors(tensors, part / "optimizer.safetensors")
    (part / "state.json").write_text(json.dumps({"step": step}))
    (part / _MARK).write_text("")
    if target.exists():
        shutil.rmtree(target)
    os.replace(part, target)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{_MARK}") if path.parent.suffix != ".part")


def restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load one checkpoint into model and optimizer; returns the number of steps done.

    Raises:
        CheckpointError: if a file is damaged or belongs to another model.
    """
    load_weights(model, path / "model.safetensors")
    tensors = load_tensors(path / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng.torch"))
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    if len(state) != sum(len(group["params"]) for group in groups):
        raise CheckpointError(f"{path} holds the state of {len(state)} parameters; the recipe trains another number")
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    try:
        return int(json.loads((path / "state.json").read_text())["step"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path / 'state.json'} is damaged: {error}") from error
