"""An open_clip model with its weights: by architecture and tag, from the Hub, a file or a folder,
or drawn at random.
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

_NUMBERS = (
    "input_resolution",
    "context_length",
    "vocab_size",
)  # OpenAI's state dicts hold them as tensors


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
    """The folder of the cache that holds a repository's configuration and weights, of open_clip's,
    transformers' or ``save_pretrained``.
    """
    config = fetch(
        repo,
        ("open_clip_config.json", "config.json"),
        ways=", with its weights in a folder that -m names",
    )
    ours = config.name == "config.json"
    if ours and _kind(config) is None:
        raise CheckpointError(
            f"{PREFIX}{repo} holds no CLIP of open_clip's or transformers' and no model of ovseg; "
            "expected "
            "open_clip_config.json, or a config.json with model_type or model"
        )
    files = (
        ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        if ours
        else CLIP_FILES
    )
    path = fetch(repo, files, ways=f", beside {config.name} in a folder that -m names")
    if path.name.endswith(".index.json"):
        for part in parts_of(path):
            fetch(repo, (part,))
    if (
        path.parent != config.parent
    ):  # the repository has moved on since the configuration was cached
        fetch(repo, (config.name,))
    for names in (
        (("preprocessor_config.json",), *TOKENIZER_FILES) if model_type_of(path.parent) else ()
    ):
        fetch_optional(repo, names)
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
        model, seen = tree["model_cfg"], tree["preprocess_cfg"]
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
    """Whether open_clip or transformers wrote it."""
    return (folder / "open_clip_config.json").is_file() or model_type_of(folder) is not None


def is_clip_file(path: Path) -> bool:
    """Whether it is the file of weights of such a folder, which says what they are."""
    return (
        no_file(path) is None
        and path.name in (*CLIP_FILES, "model.safetensors", "pytorch_model.bin")
        and is_clip_folder(path.parent)
    )


def read_clip(path: Path) -> State:
    """The tensors of a checkpoint of a CLIP, which may be a part called ``clip`` of what was
    saved."""
    return clip_names(read_published(path))


def clip_names(state: State) -> State:
    """``state`` under the names of a CLIP that stands alone."""
    return plain_names(without_prefix(state, "clip."))


def _kind(config: Path, keys: Sequence[str] = ("model_type", "model")) -> str | None:
    try:
        tree = load_json(config)
        found = next((tree[key] for key in keys if key in tree), None)
        return found if isinstance(found, str) else None
    except (OSError, ValueError, TypeError):
        return None


def model_type_of(folder: Path) -> str | None:
    """What transformers calls the model of a folder; None if the folder is none of theirs."""
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
    """Arguments as in ``OpenClipOptions``; ``weights`` is its ``clip``.

    With a size the positions of the weights are resized to it.
    """
    source = None if weights is None else find_clip(weights, architecture)
    if (
        source is not None
        and source.architecture is not None
        and is_quick(source.architecture) != is_quick(architecture)
    ):
        raise ValueError(
            f"clip is {weights!r}, trained with{'' if is_quick(source.architecture) else 'out'} "
            "QuickGELU, and architecture "
            f"{title(architecture)}; expected architecture={title(source.architecture)}"
        )
    model = _build(
        sized(architecture, image_size, context_length), source.preprocess if source else None
    )
    if source is not None:
        load_clip(model, source, resize=(image_size, context_length) != (None, None))
    return model


def load_clip(model: nn.Module, source: ClipSource, *, resize: bool = False) -> None:
    """Load weights into open_clip's model, strictly.

    Args:
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
    """The architecture to build for these weights, and to write down beside them: ``architecture``
    with their activation, else their own, else the one they fit.

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
            raise InputError(
                f"{source.where} fits {len(fits)} architectures of open_clip and does not say "
                "which; expected -m "
                + (ways or "NAME:PATH with the name of its architecture (ovseg models)")
            )
        found = fits[0]
    if source.preprocess and source.preprocess != configuration(found)["preprocess_cfg"]:
        return {**configuration(found), "preprocess_cfg": source.preprocess}
    return found


def fitting(state: dict[str, torch.Tensor]) -> list[str]:
    """Architectures of open_clip whose tensors have these names and shapes.

    Two activations look alike.
    """
    open_clip, shapes = (
        import_open_clip(),
        {name: tuple(x.shape) for name, x in state.items() if name not in _NUMBERS},
    )
    prefix = "text." if "text.token_embedding.weight" in shapes else ""
    words = shapes.get(f"{prefix}token_embedding.weight")
    found = []
    for name in open_clip.list_models() if words else ():
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        width = shapes.get("visual.conv1.weight", (None,))[0]
        if (text.get("vocab_size", 49408), text.get("width", 512)) != words:
            continue
        if (
            "hf_model_name" in text
            or ("timm_model_name" in vision)
            != any(key.startswith("visual.trunk.") for key in shapes)
            or (
                "timm_model_name" not in vision
                and isinstance(vision.get("layers", 12), int)
                and vision.get("width", 768) != width
            )
        ):
            continue
        with torch.device("meta"):
            own = _build(name).state_dict()
        if {key: tuple(x.shape) for key, x in own.items()} == shapes:
            found.append(name)
    return found


def _build(architecture: Architecture, preprocess: dict[str, Any] | None = None) -> nn.Module:
    open_clip, config = import_open_clip(), configuration(architecture)
    known = config.pop("preprocess_cfg", None)
    vision, text = config["vision_cfg"], config["text_cfg"]
    hf, coca, kwargs = (
        "hf_model_name" in text,
        "multimodal_cfg" in config,
        vision.pop("timm_kwargs", None),
    )
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if hf:
        text["hf_model_pretrained"] = False
    if kwargs:
        import timm

        vision |= {
            "timm_model_name": "test_vit",
            "timm_pool": "avg",
        }  # a small one, in place of which comes the tower of these sizes
    custom = config.pop("custom_text", False) or hf
    kind = (open_clip.CoCa if coca else open_clip.CustomTextCLIP) if custom else open_clip.CLIP
    model = kind(**config)
    if kwargs:
        model.visual.trunk = timm.models.VisionTransformer(num_classes=0, **kwargs)
    open_clip.model.set_model_preprocess_cfg(
        model,
        {
            **vars(open_clip.transform.PreprocessCfg()),
            **(known or {}),
            **(preprocess or {}),
            "size": model.visual.image_size,
        },
    )
    return model


def _state_for(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What open_clip's own loading changes before it loads: foreign names, older names, scalars."""
    factory = import_open_clip().factory
    state = factory.convert_state_dict(model, dict(state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = factory.convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    if not hasattr(model, "text_decoder"):  # CoCa's, which writes captions, may have been left out
        state = {
            name: tensor for name, tensor in state.items() if not name.startswith("text_decoder.")
        }
    for name in (*_NUMBERS, "text.transformer.embeddings.position_ids", "attn_mask"):
        if name not in own:
            state.pop(name, None)
    for name in ("logit_scale", "logit_bias"):
        if name in own and name in state:
            state[name] = state[name].reshape(own[name].shape)
    return state
