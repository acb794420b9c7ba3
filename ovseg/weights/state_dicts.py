"""Names and tensors, out of what other software wraps around them: the mapping that holds them, and
the prefixes of their names.

A training's file keeps its weights under a key, beside an optimizer and counters; a module that was
wrapped (``torch.compile``, ``DistributedDataParallel``, ``DataParallel``, FSDP, ``AveragedModel``)
has names that begin with the wrapper's. Here both are taken off what is read, and what is written
never has them."""

from __future__ import annotations

from collections.abc import Mapping
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
_WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)  # nobody calls a module so
_OUTER = ("module.", "model.")  # off only if all names begin so
_COUNTER = "n_averaged"  # of AveragedModel, beside what it averages
_NAMED = 4  # keys in a message


def state_of(tree: Any, path: str | Path) -> State:
    """The tensors of what a file holds, under plain names.

    Raises:
        CheckpointError: if it is no mapping of names to tensors, alone or in one of ``CONTAINERS``;
            naming what is there.
    """
    for _ in range(_DEPTH):
        inner = (
            next(
                (
                    tree[key]
                    for key in CONTAINERS
                    if isinstance(tree.get(key), Mapping) and tree[key]
                ),
                None,
            )
            if isinstance(tree, Mapping)
            else None
        )
        if inner is None:
            break
        tree = inner
    if (
        not isinstance(tree, Mapping)
        or not tree
        or not any(isinstance(value, torch.Tensor) for value in tree.values())
    ):
        raise CheckpointError(
            f"{path} holds no state dict but {_described(tree)}; expected names and tensors, alone "
            "or under "
            f"{', '.join(CONTAINERS)}"
        )
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} holds no state dict: beside tensors, {name!r} is a {type(value).__name__} "
                f"(of {len(tree)} "
                f"keys); expected names and tensors, alone or under {', '.join(CONTAINERS)}"
            )
        if (problem := _no_numbers(value)) is not None:
            raise CheckpointError(f"{path}: {name} is {problem}; expected a plain tensor")
    return plain_names({name: value.detach() for name, value in tree.items()})


def plain_names(state: Mapping[str, torch.Tensor]) -> State:
    """``state`` without the prefixes of wrappers."""
    found = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): x
        for name, x in state.items()
    }
    if len(found) != len(state):
        return dict(state)  # two would share a name
    while True:
        named = [name for name in found if name != _COUNTER]
        outer = next(
            (
                outer
                for outer in _OUTER
                if named
                and all(len(name) > len(outer) and name.startswith(outer) for name in named)
            ),
            None,
        )
        if outer is None:
            return found
        found = without_prefix({name: found[name] for name in named}, outer)


def without_prefix(state: State, prefix: str) -> State:
    """``state`` with the prefix off its names if all of them have it, else as it is."""
    if not state or not all(name.startswith(prefix) and len(name) > len(prefix) for name in state):
        return state
    return {name.removeprefix(prefix): x for name, x in state.items()}


def unwrapped(module: Any) -> Any:
    """The module inside of DDP, DataParallel, FSDP and ``AveragedModel``.

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
    """The state dict of a module that may be wrapped, or have wrapped parts, under the names of the
    bare one."""
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
    """On the CPU, put together where it is sharded; all processes have to ask then."""
    full = (
        tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    )  # a DTensor, without importing what it comes from
    return full.detach().cpu()


def _place(module: nn.Module) -> str | None:
    """The name of what ``module`` wraps, or None."""
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
    keys = [str(key)[:60] for key in list(tree)[:_NAMED]]
    return (
        f"a mapping of {len(tree)} keys ({', '.join(keys)}{', ...' if len(tree) > _NAMED else ''})"
        if tree
        else "an empty mapping"
    )
