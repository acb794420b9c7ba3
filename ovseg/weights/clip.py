"""CLIPs of open_clip with their weights: found, read, and loaded into a model that fits.

They are named by architecture and tag, by a repository of the Hub, a file or a folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, InputError, WeightsError
from ..nn.clip_architectures import (
    Architecture,
    configuration,
    import_open_clip,
    is_quick,
    of_activation,
    resize_clip_positions,
    sized,
    tags_of,
    title,
)
from ..paths import address, no_file, no_folder
from .files import check_fit, load_json
from .hub import CLIP_FILES, PREFIX, fetch
from .pickles import read_published
from .state_dicts import State, plain_names, without_prefix
from .tokenizers import TOKENIZER_FILES, fetch_optional
from .transformers_layout import MODEL_TYPES, parts_of, transformers_config, transformers_state

# OpenAI's state dicts hold them as tensors.
_NUMBERS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class ClipSource:
    """Weights of a CLIP that have been found.

    Attributes:
        read: gives the tensors under open_clip's names.
        where: for messages.
        architecture: what they belong to; None where the file does not say.
        preprocess: mean and std that they were trained with, where that is known.
    """

    read: Callable[[], dict[str, torch.Tensor]]
    where: str
    architecture: Architecture | None = None
    preprocess: dict[str, Any] | None = None


def find_clip(weights: str, architecture: Architecture | None = None) -> ClipSource:
    """Find weights; those that are not here are fetched.

    Args:
        weights: a pretrained tag of open_clip's for ``architecture``; ``hf-hub:owner/name``; a
            checkpoint of open_clip's, ``.safetensors``, ``.pt`` or ``.bin``; a folder of
            open_clip's or of transformers' CLIP or SigLIP.
        architecture: for a tag, and for the message where a file cannot be told.

    Raises:
        InputError: for a name that is none of these; WeightsError: for weights that cannot be had.
    """
    if weights.startswith(PREFIX):
        return clip_of_folder(fetch_folder(weights.removeprefix(PREFIX)), weights)
    tags = tags_of(architecture) if isinstance(architecture, str) else {}
    if isinstance(architecture, str) and weights in tags:
        return clip_of_tag(architecture, weights, tags[weights])
    path = Path(weights)
    if is_clip_file(path):
        path = path.parent
    if no_folder(path) is None:
        return clip_of_folder(path, str(path))
    if (what := no_file(path)) is None:
        return ClipSource(lambda: read_clip(path), str(path))
    known = f" or one of the tags {sorted(tags)}" if isinstance(architecture, str) else ""
    there = f", which {what}" if os.path.lexists(path) or address(weights) else ""
    raise InputError(
        f"clip is {weights!r}{there}; expected a file or folder that exists, "
        f"{PREFIX}owner/name{known}"
    )


def clip_of_tag(architecture: str, tag: str, facts: dict[str, Any]) -> ClipSource:
    """Fetch the weights of a tag, of which ``tags_of`` gives the facts."""
    path = _fetch_tag(facts, f" and -m {architecture}:FILE" if "/" not in architecture else "")
    return ClipSource(
        lambda: read_clip(path),
        f"{architecture}:{tag}",
        of_activation(architecture, facts),
        {key: tuple(facts[key]) for key in ("mean", "std")},
    )


def fetch_folder(repo: str) -> Path:
    """Fetch the configuration and weights of a repository; return their folder in the cache.

    It is one of open_clip's, transformers' or ``save_pretrained``.
    """
    names = ("open_clip_config.json", "config.json")
    config = fetch(repo, names, ways=", with its weights in a folder that -m names")
    files: Sequence[str] = CLIP_FILES
    if config.name == "config.json":
        files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        if _kind(config) is None:
            raise CheckpointError(
                f"{PREFIX}{repo} holds no CLIP of open_clip's or transformers' and no model of "
                "ovseg; expected open_clip_config.json, or a config.json with model_type or model"
            )
    path = fetch(repo, files, ways=f", beside {config.name} in a folder that -m names")
    if path.name.endswith(".index.json"):
        for part in parts_of(path):
            fetch(repo, (part,))
    if path.parent != config.parent:  # the repository moved on since the configuration was cached
        fetch(repo, (config.name,))
    if model_type_of(path.parent):
        for others in (("preprocessor_config.json",), *TOKENIZER_FILES):
            fetch_optional(repo, others)
    return path.parent


def clip_of_folder(folder: Path, where: str) -> ClipSource:
    """Find the CLIP of a folder of open_clip's or transformers'.

    Args:
        folder: the folder.
        where: its name for messages.

    Raises:
        CheckpointError: for a folder of something else, a damaged one, and one without weights.
    """
    if (folder / "open_clip_config.json").is_file():
        config = _open_clip_config(folder)
        files = [folder / name for name in CLIP_FILES if (folder / name).is_file()]
        if not files:
            raise CheckpointError(f"{folder} has no weights; expected {' or '.join(CLIP_FILES)}")
        return ClipSource(lambda: read_clip(files[0]), where, config)
    if model_type_of(folder) is None:
        raise CheckpointError(
            f"{folder} holds no CLIP; expected open_clip_config.json, or config.json of "
            f"transformers' {MODEL_TYPES}"
        )
    return ClipSource(lambda: transformers_state(folder), where, transformers_config(folder))


def _open_clip_config(folder: Path) -> dict[str, Any]:
    """Read the architecture of a folder of open_clip's."""
    path = folder / "open_clip_config.json"
    try:
        tree = load_json(path)
        model = tree["model_cfg"]
        seen = tree["preprocess_cfg"]
        config = {
            **model,
            "vision_cfg": {**model["vision_cfg"]},
            "text_cfg": {**model["text_cfg"]},
            "preprocess_cfg": {key: tuple(seen[key]) for key in ("mean", "std")},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); expected JSON with model_cfg and preprocess_cfg"
        ) from error
    text = config["text_cfg"]
    _check_text(text, str(path))
    if (folder / "tokenizer.json").is_file() and text.get("hf_tokenizer_name"):
        text["hf_tokenizer_name"] = str(folder.resolve())
    return config


def _check_text(text: dict[str, Any], where: str) -> None:
    """Refuse a text tower of transformers that no model of open_clip's has.

    Its repository may hold code.
    """
    name = text.get("hf_model_name")
    if name is None:
        return
    open_clip = import_open_clip()
    texts = [open_clip.get_model_config(one)["text_cfg"] for one in open_clip.list_models()]
    known = {one.get("hf_model_name") for one in texts} - {None}
    if name not in known:
        raise CheckpointError(
            f"{where} has transformers' {name!r} as text tower; expected one of {sorted(known)}"
        )


def is_clip_folder(folder: Path) -> bool:
    """Return whether open_clip or transformers wrote a folder."""
    return (folder / "open_clip_config.json").is_file() or model_type_of(folder) is not None


def is_clip_file(path: Path) -> bool:
    """Return whether a file is the weights of such a folder, which says what they are."""
    return (
        no_file(path) is None
        and path.name in (*CLIP_FILES, "model.safetensors", "pytorch_model.bin")
        and is_clip_folder(path.parent)
    )


def read_clip(path: Path) -> State:
    """Read the tensors of a CLIP, which may be a part called ``clip`` of what was saved."""
    return clip_names(read_published(path))


def clip_names(state: State) -> State:
    """Rename the tensors of a CLIP as those of one that stands alone."""
    return plain_names(without_prefix(state, "clip."))


def _kind(config: Path, keys: Sequence[str] = ("model_type", "model")) -> str | None:
    try:
        tree = load_json(config)
        found = next((tree[key] for key in keys if key in tree), None)
        return found if isinstance(found, str) else None
    except (OSError, ValueError, TypeError):
        return None


def model_type_of(folder: Path) -> str | None:
    """Return what transformers calls the model of a folder; None if it is none of theirs."""
    return _kind(folder / "config.json", ("model_type",))


def _fetch_tag(facts: dict[str, Any], ways: str) -> Path:
    if "file" in facts:
        return Path(facts["file"])
    repo, _, file = facts.get("hf_hub", "").rpartition("/")
    if not repo:
        raise WeightsError(
            f"open_clip has these weights at {facts.get('url')} only; fetch the file and give its "
            f"path{ways}"
        )
    return fetch(repo, (file,) if file else CLIP_FILES, ways=ways)


def create_clip(
    architecture: Architecture,
    weights: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
) -> nn.Module:
    """Build an open_clip model, with weights if some are named.

    Args:
        architecture: as in ``OpenClipOptions``.
        weights: its ``clip``.
        image_size: as there; positions of the weights are resized to it.
        context_length: likewise.
    """
    smaller = sized(architecture, image_size, context_length)
    if weights is None:
        return _build(smaller)
    source = find_clip(weights, architecture)
    if source.architecture is not None and is_quick(source.architecture) != is_quick(architecture):
        with_or_without = "with" if is_quick(source.architecture) else "without"
        raise ValueError(
            f"clip is {weights!r}, trained {with_or_without} QuickGELU, and architecture "
            f"{title(architecture)}; expected architecture={title(source.architecture)}"
        )
    model = _build(smaller, source.preprocess)
    load_clip(model, source, resize=(image_size, context_length) != (None, None))
    return model


def load_clip(model: nn.Module, source: ClipSource, *, resize: bool = False) -> None:
    """Load weights into an open_clip model, strictly.

    Args:
        model: of open_clip's.
        source: the weights.
        resize: whether positions of another resolution or context are resized to the model's; they
            are refused else.

    Raises:
        CheckpointError: for files that are damaged, and weights of another architecture.
    """
    state = _state_for(model, source.read())
    if resize:
        state = resize_clip_positions(model, state)
    check_fit(source.where, state, model.state_dict())
    model.load_state_dict(state)


def settled(source: ClipSource, architecture: Architecture | None) -> Architecture:
    """Return the architecture to build for weights, and to write down beside them.

    It is ``architecture`` with the activation of the weights, else their own, else the one they
    fit.

    Raises:
        InputError: if they fit none of open_clip's, or several.
    """
    own = source.architecture
    if isinstance(architecture, str) and isinstance(own, dict):
        own = of_activation(architecture, own)
    found = own or architecture
    if found is None:
        fits = fitting(source.read())
        if len(fits) != 1:
            ways = " or ".join(f"{name}:{source.where}" for name in fits)
            ways = ways or "NAME:PATH with the name of its architecture (ovseg models)"
            raise InputError(
                f"{source.where} fits {len(fits)} architectures of open_clip and does not say "
                f"which; expected -m {ways}"
            )
        found = fits[0]
    if source.preprocess and source.preprocess != configuration(found)["preprocess_cfg"]:
        return {**configuration(found), "preprocess_cfg": source.preprocess}
    return found


def fitting(state: State) -> list[str]:
    """List the architectures of open_clip whose tensors have these names and shapes.

    Two activations look alike.
    """
    open_clip = import_open_clip()
    shapes = {name: tuple(x.shape) for name, x in state.items() if name not in _NUMBERS}
    found = []
    for name in open_clip.list_models():
        if not _may_fit(open_clip.get_model_config(name), shapes):
            continue
        with torch.device("meta"):
            own = _build(name).state_dict()
        if {key: tuple(x.shape) for key, x in own.items()} == shapes:
            found.append(name)
    return found


def _may_fit(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Return whether an architecture is worth being built to compare its tensors."""
    vision = config["vision_cfg"]
    text = config["text_cfg"]
    prefix = "text." if "text.token_embedding.weight" in shapes else ""
    words = (text.get("vocab_size", 49408), text.get("width", 512))
    if "hf_model_name" in text or shapes.get(f"{prefix}token_embedding.weight") != words:
        return False
    is_timm = "timm_model_name" in vision
    if is_timm != any(key.startswith("visual.trunk.") for key in shapes):
        return False
    if is_timm or not isinstance(vision.get("layers", 12), int):
        return True
    width = shapes.get("visual.conv1.weight", (None,))[0]
    return vision.get("width", 768) == width


def _build(architecture: Architecture, preprocess: dict[str, Any] | None = None) -> nn.Module:
    """Build a model of open_clip with random weights.

    Args:
        architecture: a name, or a configuration.
        preprocess: mean and std that its pictures are seen with, if not the configuration's.
    """
    open_clip = import_open_clip()
    config = configuration(architecture)
    known = config.pop("preprocess_cfg", None)
    vision = config["vision_cfg"]
    text = config["text_cfg"]
    kwargs = vision.pop("timm_kwargs", None)
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    if kwargs:
        # A small one, in place of which comes the tower of these sizes.
        vision |= {"timm_model_name": "test_vit", "timm_pool": "avg"}
    kind = open_clip.CLIP
    if config.pop("custom_text", False) or "hf_model_name" in text:
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    model = kind(**config)
    if kwargs:
        import timm

        model.visual.trunk = timm.models.VisionTransformer(num_classes=0, **kwargs)
    usual = vars(open_clip.transform.PreprocessCfg())
    seen = {**usual, **(known or {}), **(preprocess or {}), "size": model.visual.image_size}
    open_clip.model.set_model_preprocess_cfg(model, seen)
    return model


def _state_for(model: nn.Module, state: State) -> State:
    """Change what open_clip's own loading changes: foreign names, older names, scalars."""
    factory = import_open_clip().factory
    state = factory.convert_state_dict(model, dict(state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = factory.convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    # CoCa's decoder, which writes captions, may have been left out.
    left_out = () if hasattr(model, "text_decoder") else ("text_decoder.",)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}
    for name in (*_NUMBERS, "text.transformer.embeddings.position_ids", "attn_mask"):
        if name not in own:
            state.pop(name, None)
    for name in ("logit_scale", "logit_bias"):
        if name in own and name in state:
            state[name] = state[name].reshape(own[name].shape)
    return state
