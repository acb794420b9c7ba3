"""Models with weights: by tag, from the Hub, a folder or a file.

All are read without running code.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, InputError
from ..nn.clip_architectures import configuration, tags_of
from ..paths import exists, no_file, no_folder
from ..weights.clip import (
    ClipSource,
    clip_names,
    fetch_folder,
    find_clip,
    is_clip_file,
    is_clip_folder,
    load_clip,
    model_type_of,
    settled,
)
from ..weights.files import check_fit
from ..weights.hub import CLIP_FILES, PREFIX, fetch
from ..weights.pickles import read_published
from ..weights.published import Published, marked
from ..weights.saving import is_saved, read_config
from ..weights.state_dicts import plain_names, plain_state, unwrapped
from ..weights.transformers_layout import folder_weights
from .base import OVSegModel
from .checks import check_device, check_name
from .names import DEFAULT_MODEL, DEFAULT_READOUT, DEFAULT_REPO, parse, unknown, unknown_tag
from .registry import (
    CLIP_SYSTEM,
    MOST_PARAMETERS,
    SYSTEMS,
    SizeError,
    architecture_of,
    build,
    bundled,
    is_name,
    list_models,
    preset_of,
    system_of_folder,
    system_type,
    upgraded,
)

_SIZES = {"image_size", "context_length"}  # options by which positions are resized
_ROOM = 500_000_000  # numbers that a model may have beside those of its file
_DEMO = ", named by -m PATH; or --demo, a built-in scene with bundled weights"


def create_model(
    name: str, pretrained: str | None = None, *, device: str | torch.device = "cpu", **options: Any
) -> OVSegModel:
    """Build a model by name, in eval mode.

    Args:
        name: one of ``list_models()``, or an architecture of open_clip's: ``clip_dense`` on it.
            Alone also whatever ``from_pretrained`` takes.
        pretrained: a tag of ``list_pretrained()``, ``hf-hub:owner/name``, a folder written by
            ``save_pretrained``, open_clip or transformers, a safetensors file, a checkpoint of
            open_clip's or the system's published one; None for random weights.
        device: where it goes.
        options: of the system or of its backbone: ``clip`` (weights of the CLIP, to train from),
            ``stride``, ``tap``, ... Weights of a CLIP that come as ``pretrained`` are read out by
            ``naclip`` unless ``readout`` is given.

    Raises:
        ValueError: for an unknown name, tag or option; CheckpointError: for weights that are
            damaged or of another model.
    """
    check_name("name", name)
    check_name("pretrained", "" if pretrained is None else pretrained)
    device = check_device(device)
    if not is_name(name):
        if pretrained is None and (":" in name or exists(name)):
            return from_pretrained(name, device=device, **options)
        raise InputError(
            f"model is {name!r}; expected one of {list_models()}, or one of open_clip's: "
            f"{unknown(name)}"
        )
    model = build(name, options) if pretrained is None else _load(name, str(pretrained), options)
    if model.source is None and pretrained is not None:
        model.source = str(pretrained)
    return model.to(device).eval()


def from_pretrained(
    source: str | Path, *, device: str | torch.device = "cpu", **options: Any
) -> OVSegModel:
    """A model with weights, in eval mode.

    Args:
        source: a name, a name and a tag, ``hf-hub:owner/name`` or a path: the forms of
            ``names.py``.
        device: where it goes.
        options: change how it was built (``readout``, ``stride``).
    """
    check_name("source", source)
    device = check_device(device)
    text = str(source)
    if isinstance(source, Path) and not exists(source):
        raise CheckpointError(f"{source} is not a folder; expected one written by save_pretrained")
    name, weights = (None, text) if isinstance(source, Path) else parse(text)
    model = _load(name, weights, options)
    if model.source is None:
        model.source = text
    return model.to(device).eval()


def default_model(**options: Any) -> OVSegModel:
    """The model of those who name none: ``names.DEFAULT_MODEL``.

    Fetched first, so that a machine without it is told at once.
    """
    fetch(DEFAULT_REPO, CLIP_FILES, ways=_DEMO.replace("PATH", "clip_dense_vit_b16:PATH"))
    return from_pretrained(DEFAULT_MODEL, **options)


def load_official_state_dict(model: OVSegModel, state: dict[str, torch.Tensor]) -> list[str]:
    """Load the tensors of a published checkpoint, strictly; returns the names of those that only
    training needs and that it lacks.

    Raises:
        ValueError: for a system without a published layout; CheckpointError: for tensors that are
            missing, unexpected or of another shape.
    """
    inner = unwrapped(model)
    return _published(inner).load(inner, plain_names(state))


def official_state_dict(model: OVSegModel) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of the published checkpoint."""
    inner = unwrapped(model)
    return _published(inner).state(inner, plain_state(model))


def _published(model: OVSegModel) -> Published:
    if model.published is None:
        raise ValueError(
            f"{model.name} has no published layout; expected a model of a system that has one, on "
            "its published backbone"
        )
    return model.published


def _load(name: str | None, weights: str, options: dict[str, Any]) -> OVSegModel:
    if (folder := bundled(name, weights)) is not None:
        return _saved(name, folder, options)
    architecture = architecture_of(name) if name else None
    if architecture is not None and weights in tags_of(architecture):
        return _clip(name, weights, options)
    if weights.startswith(PREFIX):
        path = fetch_folder(weights.removeprefix(PREFIX))
    else:
        path = Path(weights)
        if no_file(path / "model" / "config.json") is None:
            path = path / "model"  # of a run
    if (
        no_file(path) is None
        and name is None
        and path.name == "model.safetensors"
        and is_saved(path.parent)
    ):
        path = path.parent
    if no_folder(path) is None:
        if system_of_folder(model_type_of(path)) is not None:
            return _transformers_folder(name, path, options)
        if is_clip_folder(path):
            return _clip(name, weights, options, path)
        return _saved(name, path, options)
    if (what := no_file(path)) is not None:
        if os.path.lexists(path):
            raise CheckpointError(
                f"model {str(path)!r} {what}; expected a folder or a file of weights"
            )
        raise unknown_tag(name, weights)
    return _file(name, path, options)


def _saved(name: str | None, folder: Path, options: dict[str, Any]) -> OVSegModel:
    saved = read_config(folder)
    if name is not None and saved["model"] != name:
        raise CheckpointError(f"{folder} holds a {saved['model']}; expected a {name}")
    weights = read_published(folder / "model.safetensors")
    own_options = upgraded(saved["model"], saved["options"])
    model = _built(
        saved["model"], {**own_options, **options}, folder / "config.json", weights, options
    )
    if asks_size(options):
        weights = model.resize_positions(weights)
    own = model.state_dict()
    weights = {
        name: x
        for name, x in weights.items()
        if name in own or not name.startswith(model.training_only or "\0")
    }
    check_fit(folder / "model.safetensors", weights, own)
    model.load_state_dict(weights)
    known = saved.get("clip_hash")
    if known and model.named_clip and model.clip_hash(known.partition(":")[0]) != known:
        raise CheckpointError(
            f"{folder} was trained on another CLIP than {model.named_clip!r} is now; expected "
            "that one as it was, or "
            "clip=SOURCE with it"
        )
    return model


def _transformers_folder(name: str | None, folder: Path, options: dict[str, Any]) -> OVSegModel:
    """A system that transformers has too, in sizes of the folder's own."""
    kind = str(model_type_of(folder))
    system = system_of_folder(kind)
    assert system is not None
    name = name or system.model_types[kind]
    if name not in list_models() or system_type(preset_of(name)["system"]) is not system:
        raise InputError(
            f"pretrained is {str(folder)!r}, which holds transformers' {kind}, and the model is "
            f"{name}; expected "
            f"{system.model_types[kind]}, or weights of {name}"
        )
    own = system.folder_options(folder)
    backbone = {**own.get("backbone", {}), **options.get("backbone", {})}
    weights = folder_weights(folder)
    model = _built(
        name, {**own, **options, "backbone": backbone}, folder / "config.json", weights, options
    )
    if model.published is None:
        raise InputError(
            f"{name} with {options} is no model of transformers' {kind}; expected other options"
        )
    try:
        model.published.load(model, weights, model.resize_positions if asks_size(options) else None)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return model


def _file(name: str | None, path: Path, options: dict[str, Any]) -> OVSegModel:
    if is_clip_file(path):
        if system_of_folder(model_type_of(path.parent)) is not None:
            return _transformers_folder(name, path.parent, options)
        return _clip(name, str(path), options)
    state = read_published(path)
    if _is_clip(state):
        return _clip(name, str(path), options, state=clip_names(state))
    if name is None:
        return _published_file(path, state, options)
    model = build(name, options)
    resize = model.resize_positions if asks_size(options) else None
    if model.published is not None and model.published.recognises(state):
        model.published.load(model, state, resize)
    else:
        state = state if resize is None else resize(state)
        check_fit(path, state, model.state_dict())
        model.load_state_dict(state)
    return model


def _is_clip(state: dict[str, torch.Tensor]) -> bool:
    """Return whether it is a CLIP that stands alone, or all of it in a part called ``clip`` and
    nothing of a system's.
    """
    plain = clip_names(state)
    if "logit_scale" not in plain or not any(
        name.startswith(("visual.", "image_encoder.")) for name in plain
    ):
        return False
    return "logit_scale" in state or not any(
        marked(state, system_type(system).published_marks) for system in SYSTEMS
    )


def asks_size(options: dict[str, Any]) -> bool:
    """Return whether the caller asks for pictures or texts of another size."""
    return bool(_SIZES & ({*options} | {*(options.get("backbone") or {})}))


def _built(
    name: str,
    options: dict[str, Any],
    config: Path,
    weights: dict[str, torch.Tensor],
    asked: dict[str, Any],
) -> OVSegModel:
    """The model of a folder, if its configuration makes one of about the size of its weights.

    Args:
        config: where the options come from, for messages; ``asked``: those that the caller has put
            over them.
    """
    named = any(
        part.get("clip") for part in (options, options.get("backbone") or {})
    )  # a CLIP that is elsewhere
    try:
        return build(name, options, most=MOST_PARAMETERS if named else _most(weights))
    except SizeError as error:
        if asked:
            raise
        raise CheckpointError(f"{config} is damaged: {error}") from error


def _most(weights: dict[str, torch.Tensor]) -> int:
    """How many numbers a model may have that these are the weights of."""
    return min(_ROOM + 4 * sum(tensor.numel() for tensor in weights.values()), MOST_PARAMETERS)


def _published_file(
    path: Path, state: dict[str, torch.Tensor], options: dict[str, Any]
) -> OVSegModel:
    """A published checkpoint without the name of its model: of the systems that recognise it, the
    preset that it fits.
    """
    refusal = None
    for name in list_models():
        if name.endswith("_tiny") or not marked(
            state, system_type(preset_of(name)["system"]).published_marks
        ):
            continue
        model = build(name, options)
        if model.published is None or not model.published.recognises(state):
            continue
        try:
            model.published.load(model, state)
            return model
        except CheckpointError as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    raise CheckpointError(
        f"{path} holds no CLIP and no published checkpoint that is known (tensors such as "
        f"{next(iter(state))}); expected "
        "NAME:PATH with the name of its model, or the folder with its config.json"
    )


def _clip(
    name: str | None,
    weights: str,
    options: dict[str, Any],
    folder: Path | None = None,
    state: dict[str, torch.Tensor] | None = None,
) -> OVSegModel:
    """A CLIP as it is, below the system that needs no more."""
    architecture = architecture_of(name) if name else None
    if (
        name is not None
        and name != CLIP_SYSTEM
        and (architecture is None or preset_of(name)["system"] != CLIP_SYSTEM)
    ):
        raise InputError(
            f"pretrained is {weights!r}, a CLIP, and {name} is trained upon one; expected weights "
            f"of {name} itself. "
            f"create_model({name!r}, clip={weights!r}) trains from that CLIP"
        )
    source = (
        ClipSource(lambda: state, str(weights))
        if state is not None
        else find_clip(str(folder or weights), architecture)
    )
    asked = options.get("architecture") or (options.get("backbone") or {}).get("architecture")
    chosen = settled(source, asked or architecture)
    if name is None or name not in list_models():
        name = chosen if isinstance(chosen, str) else CLIP_SYSTEM
    options = dict(options)
    if chosen != architecture_of(name):
        options["architecture"] = chosen
    if _is_clips_own(chosen):
        options.setdefault("readout", DEFAULT_READOUT)
    most = MOST_PARAMETERS
    if isinstance(chosen, dict):
        found = source.read()  # once: the model may be no larger than they are
        source, most = replace(source, read=lambda: found), _most(found)
    try:
        model = build(name, options, most=most)
    except SizeError as error:
        if not isinstance(chosen, dict) or asked is not None:
            raise
        raise CheckpointError(f"{source.where}: its configuration is damaged: {error}") from error
    load_clip(model.backbone.clip, source, resize=asks_size(options))
    model.source = weights if architecture is None or folder or state else source.where
    return model


def _is_clips_own(architecture: str | dict[str, Any]) -> bool:
    """Whether the image tower is open_clip's own transformer, for which the default readout was
    published; timm's are read out as they are.
    """
    vision = configuration(architecture)["vision_cfg"]
    return (
        isinstance(vision.get("layers", 12), int)
        and not {"timm_model_name", "timm_kwargs"} & vision.keys()
    )
