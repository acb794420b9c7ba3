"""Bounds on the sizes of a model, looked at before anything is made, because they may come from a
file that somebody else wrote.

Models by name: list and build. A name is a preset, ``presets.yaml``, of a system, a folder beside
this file; or an architecture of open_clip's, which stands for ``clip_dense`` on it. Weights are
``loading.py``'s.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ..errors import ConfigError, first_line
from ..nn.backbone import BACKBONES
from ..nn.clip_architectures import architectures, import_open_clip, supported
from ..options import options_of, unknown_key
from ..registration import Registry, folders
from .base import OVSegModel

MOST = 1_000_000  # of any number: words of a vocabulary
MOST_PARAMETERS = 20_000_000_000
_MOST = {  # of those by these names, also in lists and mappings of them
    **dict.fromkeys(
        (
            "layers",
            "depth",
            "depths",
            "local_depth",
            "text_depth",
            "decoder_layers",
            "cross_layers",
            "second_stage",
        ),
        1000,
    ),
    **dict.fromkeys(("image_size", "img_size"), 16_384),
    "context_length": 65_536,
    "doublings": 20,
    "patch_size": 1024,
}
_TEXTS = (
    "clip",
    "dino",
    "weights",
    "tokenizer",
    "hf_tokenizer_name",
    "templates",
    "name",
    "architecture",
)  # paths may be digits


class SizeError(ConfigError):
    """Options that make no model, or one that is too large."""


def check_sizes(
    options: Mapping[str, Any],
    make: Callable[[], nn.Module],
    where: str,
    most: int = MOST_PARAMETERS,
) -> None:
    """Refuse options that make no model, or one of more than ``most`` numbers: by their values,
    then by building it without memory.

    Args:
        options: of a model, with those of its parts in them.
        make: builds it, without weights from elsewhere.
        where: before the names in messages.

    Raises:
        SizeError: naming the option, or saying how many numbers the model would have.
    """
    numbers = list(_numbers(options))
    for name, value in numbers:
        key = next((part for part in reversed(name.split(".")) if part in _MOST), "")
        limit = _MOST.get(key, MOST)
        if limit < abs(value) < math.inf:  # what is not finite is the options' to name
            shown = str(value) if abs(value) < 10**20 else f"above {10**20:.0e}"
            raise SizeError(f"{where}: {name} is {shown}; expected at most {limit}")
    if not numbers:
        return
    try:
        with torch.device("meta"):
            model = make()
    except (
        AssertionError,
        ArithmeticError,
        TypeError,
        LookupError,
        AttributeError,
        MemoryError,
        RuntimeError,
    ) as error:
        if "meta" in str(
            error
        ):  # a part that cannot be built without memory; its sizes are bounded
            return
        what = f"{type(error).__name__}: {first_line(error)}"
        raise SizeError(
            f"{where} make no model ({what}); expected sizes that fit each other"
        ) from error
    count = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if count > most:
        raise SizeError(f"{where} make a model of {count:.3g} numbers; expected at most {most:.3g}")


def _numbers(options: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of all numbers in options, also those that are written as text where no text
    is expected."""
    if isinstance(options, Mapping):
        for key, value in options.items():
            yield from _numbers(value, f"{name}.{key}".lstrip("."))
    elif isinstance(options, (list, tuple)):
        for index, value in enumerate(options):
            yield from _numbers(value, f"{name}.{index}")
    elif isinstance(options, (int, float)) and not isinstance(options, bool):
        yield name, options
    elif isinstance(options, str) and name.rsplit(".", 1)[-1] not in _TEXTS:
        digits = options.strip().replace("_", "").lstrip("+-")
        if digits.isdecimal():
            yield name, int(digits[:30])


SYSTEMS: Registry[Any] = Registry("system", lambda: folders(__package__))
_FOLDER = Path(__file__).parent
CLIP_SYSTEM = "clip_dense"  # what segments with a CLIP as it is
_WEIGHTS = ("clip", "dino", "weights")  # options that name some
_BUILDERS: dict[str, Callable[..., OVSegModel]] = {}


def files_of_systems(kind: str) -> list[Path]:
    """Return what is called ``kind``, ``recipes`` or ``demo.yaml``, in the systems that have it."""
    return [_FOLDER / system / kind for system in SYSTEMS if (_FOLDER / system / kind).exists()]


def register_model(name: str, *, override: bool = False) -> Callable:
    """Decorator: register a function that builds a model from keyword arguments, beside the
    presets.
    """

    def decorate(build: Callable[..., OVSegModel]) -> Callable[..., OVSegModel]:
        if name in (*presets(), *_BUILDERS) and not override:
            raise ValueError(
                f"model {name!r} is registered already; pass override=True to replace it"
            )
        _BUILDERS[name] = build
        return build

    return decorate


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """Name -> system, backbone and options, of the ``preset.yaml`` of every system."""
    found: dict[str, dict[str, Any]] = {}
    for system in SYSTEMS:
        path = _FOLDER / system / "preset.yaml"
        for name, preset in yaml.safe_load(path.read_text("utf-8")).items():
            if name in found:
                raise ConfigError(f"{path} has {name}, a preset of {found[name]['system']} already")
            found[name] = {"system": system, **preset}
    return found


def system_type(system: str) -> type[OVSegModel]:
    """Return the class of a system's models."""
    return SYSTEMS[system].System


def system_of_folder(model_type: str | None) -> type[OVSegModel] | None:
    """The system whose models transformers calls so; None for CLIPs and what is not known."""
    kinds = map(system_type, SYSTEMS) if model_type else ()
    return next((kind for kind in kinds if model_type in kind.model_types), None)


def list_models(pattern: str = "*") -> list[str]:
    """Names that match ``pattern`` (``*clip*``), sorted; open_clip's architectures are names too,
    see ``list_pretrained``.
    """
    return sorted(name for name in {*presets(), *_BUILDERS} if fnmatch.fnmatch(name, pattern))


def is_name(name: str) -> bool:
    """Whether ``build`` knows it: a preset, a registered name, a system of CLIPs or an architecture
    of open_clip's.
    """
    return name in presets() or name in _BUILDERS or name == CLIP_SYSTEM or name in architectures()


def preset_of(name: str) -> dict[str, Any]:
    """System, backbone and options of a name that is not registered as a function."""
    if name in presets():
        return dict(presets()[name])
    backbone = (
        {"kind": "open_clip"}
        if name == CLIP_SYSTEM
        else {"kind": "open_clip", "architecture": name}
    )
    return {"system": CLIP_SYSTEM, "backbone": backbone}


def architecture_of(name: str) -> str | None:
    """open_clip's architecture below a name; None for the tiny models, registered functions, and
    ``clip_dense``, which goes on any.
    """
    return None if name in _BUILDERS else preset_of(name)["backbone"].get("architecture")


def has_published_layout(name: str) -> bool:
    """Whether checkpoints that its authors published may be read into it; registered functions are
    asked later.
    """
    return name in _BUILDERS or bool(system_type(preset_of(name)["system"]).published_marks)


def list_bundled() -> list[tuple[str, str]]:
    """(model, tag) of the weights inside the package.

    They know the words of the synthetic scenes only.
    """
    places = files_of_systems("bundled")
    found = [path.parent.name for place in places for path in place.glob("*.*/model.safetensors")]
    return sorted((name.split(".")[0], name.split(".")[1]) for name in found)


def bundled(name: str | None, tag: str) -> Path | None:
    """Return the folder of weights inside the package; None if there are none of this name."""
    if name is None or (name, tag) not in list_bundled():
        return None
    return _FOLDER / preset_of(name)["system"] / "bundled" / f"{name}.{tag}"


def list_pretrained() -> list[tuple[str, str]]:
    """(model, tag) of the weights that can be named: those inside the package, then open_clip's, if
    it can be imported, for each of its architectures that can be walked.
    """
    try:
        theirs = import_open_clip().list_pretrained()
    except (
        ImportError
    ):  # not installed, or a torchvision that does not fit: the tiny models do without
        return list_bundled()
    known = functools.cache(supported)
    return list_bundled() + [(name, tag) for name, tag in theirs if known(name)]


def upgraded(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a saved folder as the present version calls them."""
    if name in _BUILDERS:
        return options
    return system_type(preset_of(name)["system"]).Options.upgrade(options)


def build(name: str, options: dict[str, Any], *, most: int = MOST_PARAMETERS) -> OVSegModel:
    """A model with random weights, or those that its options name.

    Of ``most`` numbers, if ``options`` hold sizes.

    Raises:
        ConfigError: for an unknown option, or a value that makes no model; SizeError: for sizes
            beyond the limits, before they are built.
    """
    if name in _BUILDERS:
        model = _BUILDERS[name](**options)
    else:
        preset = preset_of(name)
        kind = system_type(preset.pop("system"))
        own = {field.name for field in fields(kind.Options)}
        backbone = {**preset.pop("backbone", {}), **options.get("backbone", {})}
        of_backbone = (
            {field.name for field in fields(BACKBONES[backbone["kind"]].Options)}
            if "kind" in backbone
            else set()
        )
        for key in options:
            if key not in own | of_backbone:
                raise unknown_key(
                    key, own | of_backbone, f"options of {name}: ", kind.Options.moved
                )
        backbone |= {key: value for key, value in options.items() if key in of_backbone - own}
        chosen = {
            **preset,
            **{key: value for key, value in options.items() if key in own},
            "backbone": backbone,
        }
        where = f"options of {name}"
        check_sizes(
            options,
            lambda: kind(options_of(kind.Options, _without_weights(chosen), where)),
            where,
            most,
        )
        model = kind(options_of(kind.Options, chosen, where))
    model.name, model.config = name, options
    return model


def _without_weights(options: Any) -> Any:
    """A copy of a model's options that names no weights from elsewhere."""
    if not isinstance(options, dict):
        return deepcopy(options)
    return {key: _without_weights(value) for key, value in options.items() if key not in _WEIGHTS}
