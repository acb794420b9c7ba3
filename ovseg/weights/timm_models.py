"""Models of timm with weights: of a package, of the Hub, or a file, read without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, WeightsError
from ..nn.timm_architectures import import_timm
from .files import check_numbers, misfit
from .hub import fetch
from .packaged import PACKAGED, packaged_file
from .pickles import read_published
from .state_dicts import State

TIMM = "timm"


def create_timm(
    name: str, weights: str | None, *, option: str, ways: str = "", **arguments: Any
) -> Any:
    """Build timm's model, without its classifier, with the weights that are named.

    Args:
        name: timm's name.
        weights: ``timm`` for those that timm names; a key of ``PACKAGED``; a file, in timm's layout
            or in the publisher's where timm converts it; None for random ones.
        option: names them, for messages.
        ways: how else a file is named, for the message where timm's cannot be had.
        arguments: of timm's factory.

    Raises:
        WeightsError: for weights that cannot be had; CheckpointError: for those that do not fit.
    """
    timm = import_timm(option)
    if weights is None:
        return timm.create_model(name, False, None, num_classes=0, **arguments)
    where, state = read_timm(name, weights, option=option, ways=ways)
    state = _without_classifier(timm, name, state)
    try:
        model = timm.create_model(name, True, {"state_dict": state}, num_classes=0, **arguments)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where} does not fit timm's {name}: {reason[:300]}") from error
    _check_numbers(where, state, model)
    return model


def read_timm(name: str, weights: str, *, option: str, ways: str = "") -> tuple[Path, State]:
    """Read weights for timm's ``name``, its classifier's too where there are some.

    The arguments are those of ``create_timm``. Return the file, and its tensors by timm's names, or
    by the publisher's where timm converts them.
    """
    if weights in PACKAGED:
        path = packaged_file(weights, option)
        return path, _in_order(path, read_published(path), name)
    of_timm = weights == TIMM
    path = _fetch(import_timm(option), name, option, ways) if of_timm else Path(weights)
    return path, read_published(path)


def is_path(weights: str) -> bool:
    """Return whether weights are named by a path, which other machines do not have."""
    return weights != TIMM and weights not in PACKAGED


def _in_order(path: Path, state: State, name: str) -> State:
    """Rename the tensors of another implementation, which stand in the order of timm's.

    Raises:
        CheckpointError: unless each has the shape of timm's in its place.
    """
    timm = import_timm(name)
    if not timm.is_model(name):
        raise CheckpointError(
            f"{path} does not fit timm's {name!r}; expected tf_efficientnet_lite0"
        )
    with torch.device("meta"):
        own = timm.create_model(name, False).state_dict()
    pairs = list(zip(own.items(), state.values(), strict=False))
    reshaped = {key: (x, mine) for (key, mine), x in pairs if x.shape != mine.shape}
    if reshaped or len(own) != len(state):
        missing = list(own)[len(state) :]
        unexpected = list(state)[len(own) :]
        raise misfit(path, f"timm's {name}", missing, unexpected, reshaped)
    return {key: x for (key, _), x in pairs}


def _fetch(timm: Any, name: str, option: str, ways: str) -> Path:
    """Return the file that timm names, fetched as every other, with one attempt."""
    facts = timm.models.get_pretrained_cfg(name)
    repo, file = (facts.hf_hub_id, facts.hf_hub_filename) if facts is not None else (None, None)
    if not repo:
        where = f"has them at {facts.url} only" if facts is not None and facts.url else "names none"
        raise WeightsError(f"{option} is 'timm', which {where} for {name!r}; expected a file{ways}")
    return fetch(repo, (file,) if file else ("model.safetensors", "pytorch_model.bin"), ways=ways)


def _without_classifier(timm: Any, name: str, state: State) -> State:
    """Leave out the layer that was trained to name classes: features do without it."""
    facts = timm.models.get_pretrained_cfg(name)
    found = facts.classifier if facts is not None and facts.classifier else ()
    layers = tuple(f"{layer}." for layer in ([found] if isinstance(found, str) else found))
    return {key: x for key, x in state.items() if not key.startswith(layers)} if layers else state


def _check_numbers(path: Path, state: State, model: nn.Module) -> None:
    """Check weights that timm has loaded, and renamed where they are not its own.

    Kinds of numbers are compared as the file has them.
    """
    own = model.state_dict()
    counters = {name.rsplit(".", 1)[-1] for name, x in own.items() if not x.is_floating_point()}
    whole = {name: name.rsplit(".", 1)[-1] in counters for name in state}
    kinds = {
        name: torch.zeros((), dtype=torch.int64 if counter else torch.float32)
        for name, counter in whole.items()
    }
    check_numbers(str(path), state, kinds)
