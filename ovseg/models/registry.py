"""Models by name: create, list, save, load. A name is a preset, ``presets.yaml``, of a system, a folder beside this file."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from ..backbones import options_type
from ..checkpoints.files import load_weights, save_weights
from ..checkpoints.published import read_published
from ..errors import CheckpointError, ConfigError
from ..options import options_of, unknown_key
from .base import OVSegModel
from .published import Published

_BUNDLED = Path(__file__).parent.parent / "checkpoints" / "bundled"
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


def list_models(pattern: str = "*") -> list[str]:
    """Names that match ``pattern`` (``*clip*``), sorted."""
    return sorted(name for name in {*presets(), *_BUILDERS} if fnmatch.fnmatch(name, pattern))


def list_pretrained() -> list[tuple[str, str]]:
    """(model, tag) of the weights inside the package. They know the words of the synthetic scenes only."""
    return sorted((path.parent.name.split(".")[0], path.parent.name.split(".")[1]) for path in _BUNDLED.glob("*.*/model.safetensors"))


def create_model(name: str, pretrained: str | None = None, *, device: str | torch.device = "cpu", **options: Any) -> OVSegModel:
    """Build a model by name, in eval mode.

    Args:
        name: one of ``list_models()``.
        pretrained: a tag of ``list_pretrained()``, a folder written by ``save_pretrained``, a safetensors file or the system's
            published checkpoint; None for random weights.
        device: where it goes.
        options: of the system or of its backbone: ``clip`` (weights of the CLIP: open_clip tag or file), ``stride``, ``tap``, ...

    Raises:
        ValueError: for an unknown name, tag or option; CheckpointError: for weights that are damaged or of another model.
    """
    if name not in (*presets(), *_BUILDERS):
        raise ValueError(f"model is {name!r}; expected one of {list_models()}")
    source = None if pretrained is None else _source(name, pretrained)
    if source is not None and source.is_dir():
        saved = _read_config(source)
        if saved["model"] != name:
            raise CheckpointError(f"{source} holds a {saved['model']}; expected a {name}")
        options = {**saved["options"], **options}
    model = _build(name, options)
    if source is not None:
        _load(model, source)
    return model.to(device).eval()


def _source(name: str, pretrained: str) -> Path:
    bundled = _BUNDLED / f"{name}.{pretrained}"
    found = bundled if bundled.is_dir() else Path(pretrained)
    if not found.exists():
        tags = [tag for model, tag in list_pretrained() if model == name]
        raise ValueError(f"pretrained is {pretrained!r}; expected a path that exists or one of the tags {tags}")
    return found


def _build(name: str, options: dict[str, Any]) -> OVSegModel:
    if name in _BUILDERS:
        model = _BUILDERS[name](**options)
    else:
        preset = dict(presets()[name])
        kind = system_type(preset.pop("system"))
        options = kind.Options.upgrade(options)
        own = {field.name for field in fields(kind.Options)}
        backbone = {**preset.pop("backbone", {}), **options.get("backbone", {})}
        of_backbone = {field.name for field in fields(options_type(backbone["kind"]))} if "kind" in backbone else set()
        for key in options:
            if key not in own | of_backbone:
                raise unknown_key(key, own | of_backbone, f"options of {name}: ")
        backbone |= {key: value for key, value in options.items() if key in of_backbone - own}
        chosen = {**preset, **{key: value for key, value in options.items() if key in own}, "backbone": backbone}
        model = kind(options_of(kind.Options, chosen, f"options of {name}"))
    model.name, model.config = name, options
    return model


def _load(model: OVSegModel, source: Path) -> None:
    if source.is_dir():
        load_weights(model, source / "model.safetensors")
    elif model.published is not None and model.published.recognises(state := read_published(source)):
        model.published.load(model, state)
    else:
        load_weights(model, source)


def from_pretrained(folder: str | Path, *, device: str | torch.device = "cpu", **options: Any) -> OVSegModel:
    """The model that ``save_pretrained`` wrote into ``folder``; ``options`` change how it was built (``readout``, ``stride``)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected one written by save_pretrained")
    return create_model(_read_config(folder)["model"], str(folder.resolve()), device=device, **options)


def save_pretrained(model: OVSegModel, folder: str | Path, **facts: Any) -> Path:
    """Write ``config.json`` and ``model.safetensors``. ``facts`` (metrics, seed, ...) go into the config as they are."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = {key: value for key, value in model.config.items() if key != "clip"}  # the weights are all in the file
    if isinstance(options.get("backbone"), dict):
        options["backbone"] = {key: value for key, value in options["backbone"].items() if key != "clip"}
    text = json.dumps({"format": 1, "model": model.name, "options": options, **facts}, indent=2)
    (folder / "config.json").write_text(text + "\n")
    save_weights(model, folder / "model.safetensors")
    return folder


def load_official_state_dict(model: OVSegModel, state: dict[str, torch.Tensor]) -> list[str]:
    """Load the tensors of a published checkpoint, strictly; returns the names of those that only training needs and that it lacks.

    Raises:
        ValueError: for a system without a published layout; CheckpointError: for tensors that are missing, unexpected or of another shape.
    """
    return _published(model).load(model, state)


def official_state_dict(model: OVSegModel) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of the published checkpoint."""
    return _published(model).state(model)


def _published(model: OVSegModel) -> Published:
    if model.published is None:
        raise ValueError(f"{model.name} has no published layout; expected a model of a system that has one, on its published backbone")
    return model.published


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config["model"], str) or not isinstance(config["options"], dict):
            raise KeyError("model, options")
        return config
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no config.json; expected a folder written by save_pretrained") from error
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); expected JSON with 'model' and 'options'") from error
