"""Names and tensors, out of what other software wraps around them.

A training's file keeps its weights under a key, beside an optimizer and counters; a module that was
wrapped (``torch.compile``, ``DistributedDataParallel``, ``DataParallel``, FSDP, ``AveragedModel``)
has names that begin with the wrapper's. Here both are taken off what is read, and what is written
never has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..errors import CheckpointError

State = dict[str, torch.Tensor]
# The weights themselves before their average, which is taken where it stands alone.
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
)
_DEPTH = 4  # containers in containers
# Nobody calls a module so.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_OUTER = ("module.", "model.")  # off only if all names begin so
_COUNTER = "n_averaged"  # of AveragedModel, beside what it averages
_NAMED = 4  # keys in a message


def state_of(tree: Any, path: str | Path) -> State:
    """Return the tensors of what a file holds, under plain names.

    Args:
        tree: what it holds.
        path: of the file, for messages.

    Raises:
        CheckpointError: if it is no mapping of names to tensors, alone or in one of ``CONTAINERS``;
            naming what is there.
    """
    for _ in range(_DEPTH):
        inner = [tree.get(key) for key in CONTAINERS] if isinstance(tree, Mapping) else []
        tree = next((one for one in inner if isinstance(one, Mapping) and one), tree)
    values = tree.values() if isinstance(tree, Mapping) else ()
    if not any(isinstance(value, torch.Tensor) for value in values):
        raise CheckpointError(
            f"{path} holds no state dict but {_described(tree)}; expected names and tensors, alone "
            f"or under {', '.join(CONTAINERS)}"
        )
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} holds no state dict: beside tensors, {name!r} is a {type(value).__name__} "
                f"(of {len(tree)} keys); expected names and tensors, alone or under "
                f"{', '.join(CONTAINERS)}"
            )
        if (problem := _no_numbers(value)) is not None:
            raise CheckpointError(f"{path}: {name} is {problem}; expected a plain tensor")
    return plain_names({name: value.detach() for name, value in tree.items()})


def plain_names(state: Mapping[str, torch.Tensor]) -> State:
    """Take the prefixes of wrappers off the names."""
    found = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): x
        for name, x in state.items()
    }
    if len(found) != len(state):
        return dict(state)  # two would share a name
    while True:
        named = {name: x for name, x in found.items() if name != _COUNTER}
        outer = next((outer for outer in _OUTER if _all_begin(named, outer)), None)
        if outer is None:
            return found
        found = without_prefix(named, outer)


def without_prefix(state: State, prefix: str) -> State:
    """Take a prefix off the names if all of them have it."""
    if not _all_begin(state, prefix):
        return state
    return {name.removeprefix(prefix): x for name, x in state.items()}


def _all_begin(names: Iterable[str], prefix: str) -> bool:
    """Return whether there are names and all begin with the prefix, with something behind it."""
    found = [len(name) > len(prefix) and name.startswith(prefix) for name in names]
    return bool(found) and all(found)


def unwrapped(module: Any) -> Any:
    """Return the module inside of DDP, DataParallel, FSDP and ``AveragedModel``.

    What ``torch.compile`` gives of a bare one stays as it is: it passes attributes on by itself,
    and is meant to be called.
    """
    while isinstance(module, nn.Module) and (place := _place(module)) is not None:
        inner = module.get_submodule(place)
        if place == "_orig_mod" and _place(inner) is None:
            return module
        module = inner
    return module


def plain_state(module: nn.Module) -> State:
    """Return the state dict of a module under the names of the bare one.

    It may be wrapped, or have wrapped parts.
    """
    state = module.state_dict()
    starts = []
    for name, part in module.named_modules():
        place = _place(part)
        outer = f"{name}." if name else ""
        if place is not None:
            starts.append((f"{outer}{place}.", outer))
        if isinstance(part, AveragedModel):
            state.pop(f"{outer}{_COUNTER}", None)
    starts.sort(key=lambda pair: -len(pair[0]))  # the innermost first
    found = {}
    for name, tensor in state.items():
        plain = name
        for start, outer in starts:
            plain = outer + plain.removeprefix(start) if plain.startswith(start) else plain
        found[plain] = tensor
    return found


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU, put together where it is sharded.

    All processes have to ask then.
    """
    if hasattr(tensor, "full_tensor"):  # a DTensor, without importing what it comes from
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()


def _place(module: nn.Module) -> str | None:
    """Return the name of what ``module`` wraps, or None."""
    children = module._modules
    for name in _WRAPPERS:
        if name in children:
            return name
    kinds = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
    return "module" if isinstance(module, kinds) else None


def _no_numbers(value: torch.Tensor) -> str | None:
    """Return what is wrong with a tensor that is no plain one; None of one that is."""
    if value.layout != torch.strided:
        return f"of layout {value.layout}"
    if value.is_meta:
        return "on the meta device, without numbers"
    if value.is_nested or value.is_quantized:
        return f"{'nested' if value.is_nested else 'quantized'} ({value.dtype})"
    held = value.untyped_storage().nbytes()
    if value.numel() * value.element_size() > held:  # one number, said to be as many as one likes
        return f"of shape {list(value.shape)}, for which the file holds {held} bytes"
    return None


def _described(tree: Any) -> str:
    if not isinstance(tree, Mapping):
        return f"a {type(tree).__name__}"
    if not tree:
        return "an empty mapping"
    keys = [str(key)[:60] for key in list(tree)[:_NAMED]]
    more = ", ..." if len(tree) > _NAMED else ""
    return f"a mapping of {len(tree)} keys ({', '.join(keys)}{more})"
