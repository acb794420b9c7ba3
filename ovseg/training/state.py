"""Checkpoints: what a run is in the middle of, on disk.

They are complete or absent, safetensors and JSON; the newest intact one wins. A checkpoint holds
whole tensors whatever shards them, under the names of the parameters: model, average, what else the
objective has, the optimizer; and for every process its position in the data and its random states.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel

from .. import distributed
from ..data.loader import Loader
from ..data.sources.base import SkipLimit
from ..errors import CheckpointError, first_line
from ..paths import read_bounded
from ..replacing import part_of, remove_parts
from ..systems.objective import Objective
from ..weights.files import MOST, check_fit, file_hash, load_json, load_tensors, save_tensors
from .gradients import LossScaler

_MARK = "COMPLETE"  # holds the hash of every other file
_FORMAT = 3
_ASIDE = (".part", ".damaged")
_FACTS = (
    *("format", "stage", "step", "done", "recipe", "hash"),
    *("processes", "scaler", "skips", "averaged"),
)


@dataclass
class State:
    """Everything of a run that changes from step to step.

    Attributes:
        average: of the objective's model, where the recipe asks for one.
        stage, step: where training stands: ``step`` steps of the stage are done.
        done: steps of the stages before this one.
        of: steps of the stage.
    """

    objective: Objective
    optimizer: torch.optim.Optimizer
    loader: Loader
    skips: SkipLimit
    scaler: LossScaler
    average: AveragedModel | None = None
    stage: int = 0
    step: int = 0
    done: int = 0
    of: int | None = None


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(
        path.parent for path in folder.glob(f"step_*/{_MARK}") if path.parent.suffix not in _ASIDE
    )


def damage(path: Path) -> str:
    """Say which file of a complete checkpoint is not what was written; "" if all are."""
    try:
        mark = read_bounded(path / _MARK, MOST)
        # Of an earlier version, without hashes: the files are whole, at least.
        if not mark and facts_of(path)["format"] < 3:
            for file in sorted(path.glob("*.safetensors")):
                load_tensors(file)
            return ""
        for name, expected in json.loads(mark)["blake2b"].items():
            if not (path / name).is_file():
                return f"{path / name} is missing"
            if file_hash(path / name) != expected:
                return (
                    f"{path / name} ({(path / name).stat().st_size} bytes) is not what was written"
                )
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path / _MARK} is damaged: {first_line(error)}"
    return ""


def facts_of(path: Path) -> dict[str, Any]:
    """Read ``state.json`` of a checkpoint: stage, steps, recipe, number of processes.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        facts = load_json(path / "state.json")
        # Earlier versions do not write "of".
        return {**{key: facts[key] for key in _FACTS}, "of": facts.get("of")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'state.json'} is damaged: {error!r}") from error


def save(folder: Path, state: State, recipe: dict[str, Any], key: str, keep: int) -> Path:
    """Write ``folder/step_N`` under another name, mark it complete, and rename it.

    Called by all processes; rank 0 writes.

    Args:
        folder: of the checkpoints.
        state: what is saved.
        recipe: of the run, so that going on with another one is noticed.
        key: the hash of the recipe.
        keep: checkpoints that are kept; the oldest beyond are dropped.
    """
    target = folder / f"step_{state.done + state.step:08d}"
    model, rest = _parts(whole(state.objective))
    average = {} if state.average is None else whole(state.average.module)
    optimizer = _optimizer_tensors(state)
    position = {"loader": state.loader.state_dict(), "random": random_state()}
    ranks = distributed.gather_strings([json.dumps(position)])
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        remove_parts(folder.iterdir())  # of a run that was killed while it saved
        part = part_of(target)
        part.mkdir()
        # Seals are for what is read elsewhere too.
        _save_tensors(model, part / "model.safetensors", sealed=True)
        if rest:
            _save_tensors(rest, part / "objective.safetensors", sealed=True)
        if average:
            _save_tensors(average, part / "ema.safetensors", sealed=True)
        _save_tensors(optimizer, part / "optimizer.safetensors", sealed=False)
        _write(part / "state.json", json.dumps(_facts(state, recipe, key)))
        _write(part / "ranks.jsonl", "".join(line + "\n" for line in ranks))
        hashes = {path.name: file_hash(path) for path in sorted(part.iterdir())}
        _write(part / _MARK, json.dumps({"blake2b": hashes}))
        _sync_folder(part)
        if target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
        _sync_folder(folder)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return target


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path, *, sealed: bool) -> None:
    save_tensors(tensors, path, {"format": "pt"}, sealed=sealed)


def _facts(state: State, recipe: dict[str, Any], key: str) -> dict[str, Any]:
    """Return what ``state.json`` holds."""
    return {
        "format": _FORMAT,
        "stage": state.stage,
        "step": state.step,
        "of": state.of,
        "done": state.done,
        "processes": distributed.world_size(),
        "scaler": state.scaler.state_dict(),
        "skips": state.skips.state_dict(),
        "hash": key,
        "recipe": recipe,
        "averaged": None if state.average is None else int(state.average.n_averaged),
    }


def restore(path: Path, state: State) -> None:
    """Load one checkpoint into everything that ``state`` names. All processes read the files.

    Raises:
        CheckpointError: if a file is damaged or belongs to another model.
    """
    facts = facts_of(path)
    model, rest = _parts(state.objective.state_dict())
    _load(path / "model.safetensors", model)
    if rest:
        _load(path / "objective.safetensors", rest)
    if state.average is not None:
        if facts["averaged"] is None:
            raise CheckpointError(
                f"{path} holds no average of the weights and train.ema asks for one"
            )
        _load(path / "ema.safetensors", state.average.module.state_dict())
        state.average.n_averaged.fill_(facts["averaged"])
    _restore_optimizer(path / "optimizer.safetensors", state)
    state.scaler.load_state_dict(facts["scaler"])
    state.skips.load_state_dict(facts["skips"])
    state.stage = facts["stage"]
    state.step = facts["step"]
    state.done = facts["done"]
    try:
        lines = read_bounded(path / "ranks.jsonl", MOST).decode().splitlines()
        ranks = [json.loads(line) for line in lines]
        # With another number of processes (which has to be allowed) all go to one position, with
        # fresh random states.
        mine = {"loader": ranks[0]["loader"]}
        if len(ranks) == distributed.world_size():
            mine = ranks[distributed.rank()]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path / 'ranks.jsonl'} is damaged: {error!r}") from error
    state.loader.load_state_dict(mine["loader"])
    if "random" in mine:
        set_random_state(mine["random"])


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's tensors on the CPU, put together where they are sharded.

    On rank 0; elsewhere there are none.
    """
    found = {}
    for name, tensor in module.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if distributed.is_main():
            found[name] = full.detach().cpu()
    return found


def fill(own: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if isinstance(own, DTensor):
        value = distribute_tensor(value.to(own.device, own.dtype), own.device_mesh, own.placements)
    own.detach().copy_(value)


def _parts(
    tensors: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split the tensors of an objective into the model's, under its own names, and the others."""
    own = "model."
    model = {name.removeprefix(own): x for name, x in tensors.items() if name.startswith(own)}
    return model, {name: x for name, x in tensors.items() if not name.startswith(own)}


def _load(path: Path, own: dict[str, torch.Tensor]) -> None:
    found = load_tensors(path)
    check_fit(path, found, own)
    for name, value in found.items():
        fill(own[name], value)


def _named_trained(state: State) -> Iterator[tuple[str, nn.Parameter]]:
    given = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    return ((name, p) for name, p in state.objective.named_parameters() if id(p) in given)


def _optimizer_tensors(state: State) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors as ``key/parameter``; without a gradient there are none."""
    found = {}
    for name, parameter in _named_trained(state):
        for key, value in state.optimizer.state.get(parameter, {}).items():
            full = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
            if distributed.is_main():
                found[f"{key}/{name}"] = full.detach().cpu()
    return found


def _restore_optimizer(path: Path, state: State) -> None:
    """Load what ``_optimizer_tensors`` returned; CheckpointError if it does not fit."""
    named = dict(_named_trained(state))
    for place, value in load_tensors(path).items():
        key, name = place.split("/", 1)
        parameter = named.get(name)
        if parameter is None:
            raise CheckpointError(
                f"{path} holds the state of {name}, which the recipe does not train"
            )
        entry = state.optimizer.state[parameter]
        if key == "step":  # torch's optimizers keep it on the CPU
            entry[key] = value
        elif value.shape != parameter.shape:
            raise CheckpointError(
                f"{path}: {place} is {list(value.shape)}; expected {list(parameter.shape)}"
            )
        else:
            entry[key] = torch.zeros_like(parameter)
            fill(entry[key], value)


def random_state() -> dict[str, Any]:
    """Return where torch, Python and numpy stand in their random numbers."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "torch": _text(torch.get_rng_state()),
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
    }
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    return states


def set_random_state(states: dict[str, Any]) -> None:
    """Go back to where ``random_state`` was called."""
    torch.set_rng_state(_bytes(states["torch"]))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
