"""Models by name: which there are, and how one is built.

A name is a preset, an entry of the ``preset.yaml`` of a system, which is a folder beside this file;
a function of a caller's, ``register_model``; or an architecture of open_clip's, which stands for
``clip_dense`` on it. Where weights come from is said in ``weight_sources.py``.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from ..nn.clip_architectures import architectures, import_open_clip, supported
from ..options import options_of, unknown_key
from ..registration import Registry, folders, table
from .backbones import BACKBONES
from .base import OVSegModel, SystemOptions
from .sizes import MOST_PARAMETERS, check_sizes

CLIP_SYSTEM = "clip_dense"  # what segments with a CLIP as it is
SYSTEMS: Registry[Any] = Registry("system", lambda: folders(__package__))
_WEIGHTS = ("clip", "dino", "weights")  # options that name some


def files_of_systems(kind: str) -> list[Path]:
    """Return what is called ``kind``, ``recipes`` or ``demo.yaml``, in the systems that have it."""
    places = (_folder(system) / kind for system in SYSTEMS)
    return [place for place in places if place.exists()]


def _folder(system: str) -> Path:
    """Return where a system lies, without importing it."""
    spec = find_spec(f"{__package__}.{system}")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """Return system, backbone and options of every preset by its name."""
    found: dict[str, dict[str, Any]] = {}
    for system in SYSTEMS:
        path = _folder(system) / "preset.yaml"
        for name, preset in yaml.safe_load(path.read_text("utf-8")).items():
            if name in found:
                raise ConfigError(f"{path} has {name}, a preset of {found[name]['system']} already")
            found[name] = {"system": system, **preset}
    return found


# Presets, as mappings with a "system"; and functions, which callers have registered.
MODELS: Registry[Any] = Registry("model", lambda: table(presets()))


def system_type(system: str) -> type[OVSegModel]:
    """Return the class of a system's models."""
    return SYSTEMS[system].System


def system_of_folder(model_type: str | None) -> type[OVSegModel] | None:
    """Return the system whose models transformers calls ``model_type``, or None."""
    kinds = map(system_type, SYSTEMS) if model_type else ()
    return next((kind for kind in kinds if model_type in kind.model_types), None)


def register_model(name: str, *, override: bool = False) -> Callable:
    """Register the decorated function, which builds a model from keyword arguments."""
    return lambda build: MODELS.register(name, build, override=override)


def list_models(pattern: str = "*") -> list[str]:
    """List the names that match ``pattern``, such as ``*clip*``.

    The architectures of open_clip are names too; ``list_pretrained`` lists them.
    """
    return fnmatch.filter(MODELS, pattern)


def is_name(name: str) -> bool:
    """Return whether ``build`` knows the name."""
    return name in MODELS or name == CLIP_SYSTEM or name in architectures()


def preset_of(name: str) -> dict[str, Any] | None:
    """Return system, backbone and options of a name; None for that of a function."""
    if name in MODELS:
        found = MODELS[name]
        return None if callable(found) else dict(found)
    named = {} if name == CLIP_SYSTEM else {"architecture": name}
    return {"system": CLIP_SYSTEM, "backbone": {"kind": "open_clip", **named}}


def system_of(name: str) -> str | None:
    """Return the system of a name's models; None for that of a function."""
    preset = preset_of(name)
    return None if preset is None else preset["system"]


def architecture_of(name: str) -> str | None:
    """Return open_clip's architecture below a name.

    The tiny models and functions have none, and ``clip_dense`` goes on any.
    """
    backbone = (preset_of(name) or {}).get("backbone", {})
    return backbone.get("architecture") if backbone.get("kind") == "open_clip" else None


def has_published_layout(name: str) -> bool:
    """Return whether checkpoints of the authors may be read; functions are asked later."""
    system = system_of(name)
    return system is None or bool(system_type(system).published_marks)


def bundled_weights() -> dict[tuple[str, str], Path]:
    """Return the folders of weights inside the package by (model, tag)."""
    found = {}
    for place in files_of_systems("bundled"):
        for file in place.glob("*.*/model.safetensors"):
            name, tag = file.parent.name.split(".")[:2]
            found[name, tag] = file.parent
    return dict(sorted(found.items()))


def list_bundled() -> list[tuple[str, str]]:
    """List (model, tag) of the weights inside the package.

    Those of the tag ``digits`` know the words of the synthetic scenes only.
    """
    return list(bundled_weights())


def list_pretrained() -> list[tuple[str, str]]:
    """List (model, tag) of the weights that can be named.

    First those inside the package, then open_clip's for each of its architectures that can be
    walked, if open_clip can be imported.
    """
    try:
        theirs = import_open_clip().list_pretrained()
    except ImportError:  # the tiny models do without
        return list_bundled()
    known = functools.cache(supported)
    return list_bundled() + [(name, tag) for name, tag in theirs if known(name)]


def build(
    name: str,
    options: Mapping[str, Any],
    *,
    preset: Mapping[str, Any] | None = None,
    most: int = MOST_PARAMETERS,
) -> OVSegModel:
    """Build a model with random weights, or those that its options name.

    Args:
        name: one that ``is_name`` knows, unless there is a ``preset``.
        options: of its system or its backbone, over those of the preset.
        preset: system, backbone and options that a saved folder holds, in place of the name's.
        most: how many numbers the model may have, if ``options`` or the folder hold sizes.

    Raises:
        ConfigError: for an unknown option, or a value that makes no model; SizeError: for sizes
            beyond the limits, before they are built.
    """
    base = preset_of(name) if preset is None else preset
    if base is None:
        model = MODELS[name](**options)
        model.config = dict(options)
    else:
        kind = system_type(base["system"])
        where = f"options of {name}"
        chosen = _over(base, options, kind.Options, where)
        check_sizes(
            options if preset is None else chosen,
            lambda: kind(_complete(kind.Options, _without_weights(chosen), where)),
            where,
            most,
        )
        complete = _complete(kind.Options, chosen, where)
        config = asdict(complete)  # before the model, which may note in its options what it does
        model = kind(complete)
        model.config = config
    model.name = name
    model.system = None if base is None else base["system"]
    return model


def _over(
    base: Mapping[str, Any], options: Mapping[str, Any], schema: type[SystemOptions], where: str
) -> dict[str, Any]:
    """Lay the options of a call, of the system or its backbone, over those of a preset."""
    own = {field.name for field in fields(schema)}
    backbone = {**base.get("backbone", {}), **options.get("backbone", {})}
    of_backbone: set[str] = set()
    if "kind" in backbone:
        of_backbone = {field.name for field in fields(BACKBONES[backbone["kind"]].Options)}
    for key in options:
        if key not in own | of_backbone:
            raise unknown_key(key, own | of_backbone, f"{where}: ", schema.moved)
    backbone |= {key: value for key, value in options.items() if key in of_backbone - own}
    of_system = {key: value for key, value in options.items() if key in own}
    found = {**base, **of_system, "backbone": backbone}
    del found["system"]
    return found


def _complete(schema: type[SystemOptions], given: dict[str, Any], where: str) -> SystemOptions:
    """Check options; those that are not given, of parts too, take their defaults."""
    options = options_of(schema, given, where)
    options.complete()
    return options


def _without_weights(options: Any) -> Any:
    """Copy a model's options, without those that name weights from elsewhere."""
    if not isinstance(options, dict):
        return deepcopy(options)
    return {key: _without_weights(value) for key, value in options.items() if key not in _WEIGHTS}
