"""Models with weights: what was found is read, without running code, and the model built for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, InputError, WeightsError
from ..nn.clip_architectures import configuration
from ..paths import exists
from ..weights.clip import ClipSource, clip_names, load_clip, model_type_of, settled
from ..weights.files import check_fit
from ..weights.hub import CLIP_FILES, asking_seconds, fetch
from ..weights.pickles import read_published
from ..weights.published import Published, marked
from ..weights.saving import read_config
from ..weights.state_dicts import State, plain_names, plain_state, unwrapped
from ..weights.transformers_layout import folder_weights
from . import weight_sources
from .base import OVSegModel
from .checks import check_device, check_name
from .names import (
    DEFAULT_MODEL,
    DEFAULT_READOUT,
    DEFAULT_REPO,
    DEFAULT_VIEW,
    PHOTO_MODEL,
    parse,
    unknown,
)
from .registry import (
    CLIP_SYSTEM,
    MODELS,
    SYSTEMS,
    architecture_of,
    build,
    bundled_weights,
    is_name,
    list_models,
    system_of,
    system_of_folder,
    system_type,
)
from .sizes import MOST_PARAMETERS, SizeError
from .weight_sources import WeightSource, check_takes_clip, find

_SIZES = {"image_size", "context_length"}  # options by which positions are resized
_ROOM = 500_000_000  # numbers that a model may have beside those of its file
_WAYS = ", named by -m clip_dense_vit_b16:PATH; or --demo, a built-in picture with bundled weights"
Options = dict[str, Any]


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
    if pretrained is None:
        return build(name, options).to(device).eval()
    model = _load(find(name, str(pretrained)), options)
    model.source = model.source or str(pretrained)
    return model.to(device).eval()


def from_pretrained(
    source: str | Path, *, device: str | torch.device = "cpu", **options: Any
) -> OVSegModel:
    """Load a model with weights, in eval mode.

    Args:
        source: a name, a name and a tag, ``hf-hub:owner/name`` or a path: the forms of
            ``names.py``.
        device: where it goes.
        options: change how it was built (``readout``, ``stride``).
    """
    check_name("source", source)
    device = check_device(device)
    text = str(source)
    if isinstance(source, Path):
        if not exists(source):
            raise CheckpointError(
                f"{source} is not a folder; expected one written by save_pretrained"
            )
        model = _load(find(None, text), options)
    else:
        model = _load(find(*parse(text)), options)
    model.source = model.source or text
    return model.to(device).eval()


def default_model(**options: Any) -> OVSegModel:
    """Load ``names.DEFAULT_MODEL``, the model of those who name none.

    Fetched first, so that a machine without it is told at once.
    """
    fetch(DEFAULT_REPO, CLIP_FILES, ways=_WAYS)
    model = from_pretrained(DEFAULT_MODEL, **options)
    model.view = DEFAULT_VIEW
    return model


def model_at_hand(**options: Any) -> OVSegModel:
    """Load the model of those who name none, from the cache, the network or this package.

    That is the default one. Where it cannot be had, ``names.PHOTO_MODEL`` answers in its place and
    its ``missing`` says why; not where ``options`` ask for a readout, which it has not.
    """
    missing = None if options or not _has_photo_model() else _missing_default()
    if missing is None:
        return default_model(**options)
    try:
        model = from_pretrained(PHOTO_MODEL)
    except (CheckpointError, WeightsError) as error:
        raise type(error)(
            f"{PHOTO_MODEL}, which answers where {DEFAULT_MODEL} cannot be had ({missing.why}), "
            f"cannot be loaded: {error}"
        ) from error
    model.missing = missing
    return model


def _has_photo_model() -> bool:
    return tuple(PHOTO_MODEL.split(":")) in bundled_weights()


def _missing_default() -> WeightsError | None:
    """Fetch the default model; return why it cannot be had, after a short wait."""
    try:
        # Little more than one read may take: the client tries all addresses of a host, and each
        # that leads nowhere takes as long.
        fetch(DEFAULT_REPO, CLIP_FILES, ways=_WAYS, patience=1.5 * asking_seconds())
    except WeightsError as error:
        return error
    return None


def load_official_state_dict(model: OVSegModel, state: dict[str, torch.Tensor]) -> list[str]:
    """Load the tensors of a published checkpoint, strictly.

    Return the names of those that only training needs and that it lacks.

    Raises:
        ValueError: for a system without a published layout; CheckpointError: for tensors that are
            missing, unexpected or of another shape.
    """
    inner = unwrapped(model)
    return _published(inner).load(inner, plain_names(state))


def official_state_dict(model: OVSegModel) -> dict[str, torch.Tensor]:
    """Return the model's tensors under the names of the published checkpoint."""
    inner = unwrapped(model)
    return _published(inner).state(inner, plain_state(model))


def _published(model: OVSegModel) -> Published:
    if model.published is None:
        raise ValueError(
            f"{model.name} has no published layout; expected a model of a system that has one, on "
            "its published backbone"
        )
    return model.published


def asks_size(options: Options) -> bool:
    """Return whether the caller asks for pictures or texts of another size."""
    return bool(_SIZES & ({*options} | {*(options.get("backbone") or {})}))


def _load(source: WeightSource, options: Options) -> OVSegModel:
    """Build the model that the weights belong to, and load them."""
    loaders: dict[str, Callable[[WeightSource, Options], OVSegModel]] = {
        weight_sources.SAVED: _load_saved,
        weight_sources.THEIRS: _load_theirs,
        weight_sources.CLIP: _load_clip,
        weight_sources.FILE: _load_file,
    }
    return loaders[source.kind](source, options)


def _load_saved(source: WeightSource, options: Options) -> OVSegModel:
    """Load a folder of ``save_pretrained``."""
    folder = source.path
    assert folder is not None
    config = read_config(folder)
    if source.name not in (None, config["model"]):
        raise CheckpointError(f"{folder} holds a {config['model']}; expected a {source.name}")
    path = folder / "model.safetensors"
    weights = read_published(path)
    model = _build_saved(folder / "config.json", config, options, weights)
    if asks_size(options):
        weights = model.resize_positions(weights)
    own = model.state_dict()
    if model.training_only:
        weights = {
            name: x
            for name, x in weights.items()
            if name in own or not name.startswith(model.training_only)
        }
    check_fit(path, weights, own)
    model.load_state_dict(weights)
    named = model.named_weights
    known = config.get(named.hash_key) if named is not None else None
    if named and known and model.weights_hash(known.partition(":")[0]) != known:
        raise CheckpointError(
            f"{folder} was trained on another {named.what} than {named.source!r} is now; expected "
            f"that one as it was, or {named.option}=SOURCE with it"
        )
    return model


def _build_saved(path: Path, config: Options, options: Options, weights: State) -> OVSegModel:
    """Build the model of a saved folder; ``path``: its config, for messages."""
    name = config["model"]
    system = config["system"]
    saved = config["options"]
    if system is not None:
        if system not in SYSTEMS:
            raise CheckpointError(f"{path}: {SYSTEMS.unknown(system)}")
        preset = {"system": system, **system_type(system).Options.upgrade(saved)}
        return _bounded(name, options, path, weights, asked=bool(options), preset=preset)
    if config["format"] > 1 and (name not in MODELS or not callable(MODELS[name])):
        raise CheckpointError(
            f"{path} is of {name!r}, which a function built; expected that function under "
            "register_model"
        )
    if (system := system_of(name)) is not None:  # format 1: above the preset
        saved = system_type(system).Options.upgrade(saved)
    return _bounded(name, {**saved, **options}, path, weights, asked=bool(options))


def _bounded(
    name: str,
    options: Options,
    path: Path,
    weights: State,
    *,
    asked: bool,
    preset: Options | None = None,
) -> OVSegModel:
    """Build the model of a folder, if its configuration makes one of about the size of its weights.

    Args:
        name: as of ``build``.
        options: as of ``build``.
        path: where the sizes come from, for messages.
        weights: the tensors of the folder.
        asked: whether the caller has put options over those of the folder.
        preset: as of ``build``.
    """
    given = {**(preset or {}), **options}
    # Frozen weights that the folder names are not among its own.
    backbone = given.get("backbone") or {}
    named = given.get("clip") or backbone.get("clip") or backbone.get("weights")
    try:
        return build(
            name, options, preset=preset, most=MOST_PARAMETERS if named else _most(weights)
        )
    except SizeError as error:
        if asked:
            raise
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _most(weights: State) -> int:
    """Return how many numbers a model may have that these are the weights of."""
    return min(_ROOM + 4 * sum(tensor.numel() for tensor in weights.values()), MOST_PARAMETERS)


def _load_theirs(source: WeightSource, options: Options) -> OVSegModel:
    """Load a folder of transformers, of a system that transformers has too, in its own sizes."""
    folder = source.path
    assert folder is not None
    kind = str(model_type_of(folder))
    system = system_of_folder(kind)
    assert system is not None
    preset = system.model_types[kind]
    name = source.name or preset
    of_name = system_of(name) if name in list_models() else None
    if of_name is None or system_type(of_name) is not system:
        raise InputError(
            f"pretrained is {str(folder)!r}, which holds transformers' {kind}, and the model is "
            f"{name}; expected {preset}, or weights of {name}"
        )
    own = system.folder_options(folder)
    backbone = {**own.get("backbone", {}), **options.get("backbone", {})}
    together = {**own, **options, "backbone": backbone}
    weights = folder_weights(folder)
    model = _bounded(name, together, folder / "config.json", weights, asked=bool(options))
    if model.published is None:
        raise InputError(
            f"{name} with {options} is no model of transformers' {kind}; expected other options"
        )
    try:
        model.published.load(model, weights, _resize(model, options))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return model


def _resize(model: OVSegModel, options: Options) -> Callable[[State], State] | None:
    """Return what resizes positions, if the caller asks for another size."""
    return model.resize_positions if asks_size(options) else None


def _load_file(source: WeightSource, options: Options) -> OVSegModel:
    """Load a file of weights: of a CLIP, a published checkpoint or tensors of the model itself."""
    path = source.path
    assert path is not None
    state = read_published(path)
    if _is_clip(state):
        check_takes_clip(source.name, source.text)
        clip = ClipSource(lambda: clip_names(state), str(path))
        return _load_clip(replace(source, clip=clip), options)
    if source.name is None:
        return _load_published(path, state, options)
    model = build(source.name, options)
    resize = _resize(model, options)
    if model.published is not None and model.published.recognises(state):
        model.published.load(model, state, resize)
    else:
        state = state if resize is None else resize(state)
        check_fit(path, state, model.state_dict())
        model.load_state_dict(state)
    return model


def _is_clip(state: State) -> bool:
    """Return whether tensors are a CLIP alone, or all in a part called ``clip`` of no system's."""
    plain = clip_names(state)
    pictures = any(name.startswith(("visual.", "image_encoder.")) for name in plain)
    if "logit_scale" not in plain or not pictures:
        return False
    return "logit_scale" in state or not any(
        marked(state, system_type(system).published_marks) for system in SYSTEMS
    )


def _load_published(path: Path, state: State, options: Options) -> OVSegModel:
    """Load a published checkpoint without the name of its model.

    Of the systems that recognise it, the preset that it fits is taken.
    """
    refusal = None
    for name in list_models():
        system = system_of(name)
        if system is None or name.endswith("_tiny"):
            continue
        if not marked(state, system_type(system).published_marks):
            continue
        model = build(name, options)
        if model.published is None or not model.published.recognises(state):
            continue
        try:
            model.published.load(model, state)
            return model
        except CheckpointError as error:
            refusal = refusal or error
    raise refusal or CheckpointError(
        f"{path} holds no CLIP and no published checkpoint that is known (tensors such as "
        f"{next(iter(state))}); expected NAME:PATH with the name of its model, or the folder with "
        "its config.json"
    )


def _load_clip(source: WeightSource, options: Options) -> OVSegModel:
    """Load a CLIP as it is, below the system that needs no more."""
    clip = source.clip
    name = source.name
    assert clip is not None
    architecture = architecture_of(name) if name else None
    asked = options.get("architecture") or (options.get("backbone") or {}).get("architecture")
    chosen = settled(clip, asked or architecture)
    if name is None or name not in list_models():
        name = chosen if isinstance(chosen, str) else CLIP_SYSTEM
    options = dict(options)
    if chosen != architecture_of(name):
        options["architecture"] = chosen
    if _is_clips_own(chosen):
        options.setdefault("readout", DEFAULT_READOUT)
    most = MOST_PARAMETERS
    if isinstance(chosen, dict):
        found = clip.read()  # once: the model may be no larger than they are
        clip = replace(clip, read=lambda: found)
        most = _most(found)
    try:
        model = build(name, options, most=most)
    except SizeError as error:
        if not isinstance(chosen, dict) or asked is not None:
            raise
        raise CheckpointError(f"{clip.where}: its configuration is damaged: {error}") from error
    load_clip(model.backbone.clip, clip, resize=asks_size(options))
    model.source = source.text
    return model


def _is_clips_own(architecture: str | dict[str, Any]) -> bool:
    """Return whether the image tower is open_clip's own transformer.

    The default readout was published for that one; timm's are read out as they are.
    """
    vision = configuration(architecture)["vision_cfg"]
    plain = isinstance(vision.get("layers", 12), int)
    return plain and not {"timm_model_name", "timm_kwargs"} & vision.keys()
