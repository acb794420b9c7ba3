"""Models by name: create, list, save, load."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..backbones.base import ClipBackbone
from ..backbones.tiny import TinyClip
from ..checkpoints.files import load_weights, save_weights
from ..checkpoints.published import is_published_segclip, load_segclip, read_published, segclip_state
from ..errors import CheckpointError
from .base import OVSegModel
from .clip_dense import ClipDense
from .pacl import PACL
from .segclip import SegCLIP

_BUNDLED = Path(__file__).parent.parent / "checkpoints" / "bundled"
_MODELS: dict[str, Callable[..., OVSegModel]] = {}


def register_model(name: str, *, override: bool = False) -> Callable:
    """Decorator: register a function that builds a model from keyword arguments."""

    def decorate(build: Callable[..., OVSegModel]) -> Callable[..., OVSegModel]:
        if name in _MODELS and not override:
            raise ValueError(f"model {name!r} is registered already; pass override=True to replace it")
        _MODELS[name] = build
        return build

    return decorate


def _open_clip(architecture: str, clip: str | None, stride: int | None, attention_backend: str) -> ClipBackbone:
    from ..backbones.open_clip import OpenClipBackbone  # imports torchvision; the tiny models do without

    return OpenClipBackbone(architecture, clip, stride, attention_backend)


def _register_vit(size: str, architecture: str) -> None:
    @register_model(f"clip_dense_{size}")
    def clip_dense(clip: str | None = None, stride: int | None = None, attention_backend: str = "sdpa", **options):
        return ClipDense(_open_clip(architecture, clip, stride, attention_backend), **options)

    @register_model(f"pacl_{size}")
    def pacl(clip: str | None = None, stride: int | None = None, attention_backend: str = "sdpa", **options):
        return PACL(_open_clip(architecture, clip, stride, attention_backend), **options)


    @register_model(f"segclip_{size}")
    def segclip(clip: str | None = None, stride: int | None = None, attention_backend: str = "sdpa", **options):
        return SegCLIP(_open_clip(architecture, clip, stride, attention_backend), **options)


_register_vit("vit_b16", "ViT-B-16-quickgelu")
_register_vit("vit_l14", "ViT-L-14-quickgelu")


@register_model("clip_dense_tiny")
def _clip_dense_tiny(backbone: dict[str, Any] | None = None, **options):
    return ClipDense(TinyClip(**(backbone or {})), **{"templates": "scenes", **options})


@register_model("pacl_tiny")
def _pacl_tiny(backbone: dict[str, Any] | None = None, **options):
    return PACL(TinyClip(**(backbone or {})), **{"templates": "scenes", "temperature": 0.1, **options})


@register_model("segclip_tiny")
def _segclip_tiny(backbone: dict[str, Any] | None = None, **options):
    small = {"second_stage": 0, "heads": 4, "templates": "scenes", "decoder": {"width": 32, "depth": 1, "heads": 4}}
    # No global block: tokens that have seen everything make all groups alike at this size.
    return SegCLIP(TinyClip(**{"depth": 0, **(backbone or {})}), **{**small, **options})


def list_models(pattern: str = "*") -> list[str]:
    """Registered names that match ``pattern`` (``*clip*``), sorted."""
    return sorted(name for name in _MODELS if fnmatch.fnmatch(name, pattern))


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
        options: of the model: ``clip`` (weights of the CLIP backbone: open_clip tag or file), ``stride``, ``tap``, ...

    Raises:
        ValueError: for an unknown name or tag; CheckpointError: for weights that are damaged or of another model.
    """
    if name not in _MODELS:
        raise ValueError(f"model is {name!r}; expected one of {list_models()}")
    folder = None
    if pretrained is not None:
        folder = _BUNDLED / f"{name}.{pretrained}"
        if not folder.is_dir():
            folder = Path(pretrained)
            if not folder.exists():
                tags = [tag for model, tag in list_pretrained() if model == name]
                raise ValueError(f"pretrained is {pretrained!r}; expected a path that exists or one of the tags {tags}")
    if folder is not None and folder.is_dir():
        saved = _read_config(folder)
        if saved["model"] != name:
            raise CheckpointError(f"{folder} holds a {saved['model']}; expected a {name}")
        options = {**saved["options"], **options}
    try:
        model = _MODELS[name](**options)
    except TypeError as error:
        raise ValueError(f"options of {name} are {sorted(options)}: {error}") from error
    model.name, model.config = name, options
    if folder is not None and folder.is_dir():
        load_weights(model, folder / "model.safetensors")
    elif folder is not None and _has_published_layout(model) and is_published_segclip(state := read_published(folder)):
        load_segclip(model, state)
    elif folder is not None:
        load_weights(model, folder)
    return model.to(device).eval()


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
    text = json.dumps({"format": 1, "model": model.name, "options": options, **facts}, indent=2)
    (folder / "config.json").write_text(text + "\n")
    save_weights(model, folder / "model.safetensors")
    return folder


def load_official_state_dict(model: OVSegModel, state: dict[str, torch.Tensor]) -> list[str]:
    """Load the tensors of a published checkpoint, strictly; returns the names of those that only training needs and that it lacks.

    Raises:
        ValueError: for a system without a published layout; CheckpointError: for tensors that are missing, unexpected or of another shape.
    """
    return _published(model)[0](model, state)


def official_state_dict(model: OVSegModel) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of the published checkpoint."""
    return _published(model)[1](model)


def _has_published_layout(model: OVSegModel) -> bool:
    return isinstance(model, SegCLIP) and hasattr(model.backbone, "clip")


def _published(model: OVSegModel) -> tuple[Callable, Callable]:
    if not _has_published_layout(model):
        raise ValueError(f"{model.name} has no published layout; expected a segclip_vit model")
    return load_segclip, segclip_state


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
