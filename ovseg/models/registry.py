"""Models by name: list and build. A name is a preset, ``presets.yaml``, of a system, a folder beside this file; or an architecture of
open_clip's, which stands for ``clip_dense`` on it. Weights are ``loading.py``'s."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import pkgutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ..backbones import options_type
from ..backbones.clip_architectures import architectures, import_open_clip, supported
from ..errors import ConfigError
from ..options import options_of, unknown_key
from .base import OVSegModel
from .limits import MOST_PARAMETERS, check_sizes

BUNDLED = Path(__file__).parent.parent / "checkpoints" / "bundled"
CLIP_SYSTEM = "clip_dense"  # what segments with a CLIP as it is
_WEIGHTS = ("clip", "dino", "weights")  # options that name some
_BUILDERS: dict[str, Callable[..., OVSegModel]] = {}


def register_model(name: str, *, override: bool = False) -> Callable:
    """Decorator: register a function that builds a model from keyword arguments, beside the presets."""

    def decorate(build: Callable[..., OVSegModel]) -> Callable[..., OVSegModel]:
        if name in (*presets(), *_BUILDERS) and not override:
            raise ValueError(f"model {name!r} is registered already; pass override=True to replace it")
        _BUILDERS[name] = build
        return build

    return decorate


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """Name -> system, backbone and options."""
    return yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text("utf-8"))


def systems() -> list[str]:
    """The folders beside this file."""
    package = importlib.import_module(__package__)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg)


def system_type(system: str) -> type[OVSegModel]:
    if system not in systems():
        raise ConfigError(f"system is {system!r}; expected one of {systems()}")
    return importlib.import_module(f".{system}", __package__).System


def system_of_folder(model_type: str | None) -> type[OVSegModel] | None:
    """The system whose models transformers calls so; None for CLIPs and what is not known."""
    kinds = map(system_type, systems()) if model_type else ()
    return next((kind for kind in kinds if model_type in kind.model_types), None)


def list_models(pattern: str = "*") -> list[str]:
    """Names that match ``pattern`` (``*clip*``), sorted; open_clip's architectures are names too, see ``list_pretrained``."""
    return sorted(name for name in {*presets(), *_BUILDERS} if fnmatch.fnmatch(name, pattern))


def is_name(name: str) -> bool:
    """Whether ``build`` knows it: a preset, a registered name, a system of CLIPs or an architecture of open_clip's."""
    return name in presets() or name in _BUILDERS or name == CLIP_SYSTEM or name in architectures()


def preset_of(name: str) -> dict[str, Any]:
    """System, backbone and options of a name that is not registered as a function."""
    if name in presets():
        return dict(presets()[name])
    backbone = {"kind": "open_clip"} if name == CLIP_SYSTEM else {"kind": "open_clip", "architecture": name}
    return {"system": CLIP_SYSTEM, "backbone": backbone}


def architecture_of(name: str) -> str | None:
    """open_clip's architecture below a name; None for the tiny models, registered functions, and ``clip_dense``, which goes on any."""
    return None if name in _BUILDERS else preset_of(name)["backbone"].get("architecture")


def has_published_layout(name: str) -> bool:
    """Whether checkpoints that its authors published may be read into it; registered functions are asked later."""
    return name in _BUILDERS or bool(system_type(preset_of(name)["system"]).published_marks)


def list_bundled() -> list[tuple[str, str]]:
    """(model, tag) of the weights inside the package. They know the words of the synthetic scenes only."""
    found = (path.parent.name for path in BUNDLED.glob("*.*/model.safetensors"))
    return sorted((name.split(".")[0], name.split(".")[1]) for name in found)


def list_pretrained() -> list[tuple[str, str]]:
    """(model, tag) of the weights that can be named: those inside the package, then open_clip's, if it can be imported, for each of its
    architectures that can be walked."""
    try:
        theirs = import_open_clip().list_pretrained()
    except ImportError:  # not installed, or a torchvision that does not fit: the tiny models do without
        return list_bundled()
    known = functools.cache(supported)
    return list_bundled() + [(name, tag) for name, tag in theirs if known(name)]


def upgraded(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a saved folder as the present version calls them."""
    if name in _BUILDERS:
        return options
    return system_type(preset_of(name)["system"]).Options.upgrade(options)


def build(name: str, options: dict[str, Any], *, most: int = MOST_PARAMETERS) -> OVSegModel:
    """A model with random weights, or those that its options name. Of ``most`` numbers, if
    ``options`` hold sizes.

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
        of_backbone = {field.name for field in fields(options_type(backbone["kind"]))} if "kind" in backbone else set()
        for key in options:
            if key not in own | of_backbone:
                raise unknown_key(key, own | of_backbone, f"options of {name}: ", kind.Options.moved)
        backbone |= {key: value for key, value in options.items() if key in of_backbone - own}
        chosen = {**preset, **{key: value for key, value in options.items() if key in own}, "backbone": backbone}
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
