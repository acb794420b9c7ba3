"""An open_clip model with its weights: by architecture and tag, from the Hub, a file or a folder, or drawn at random.

An architecture is a name of open_clip's or its configuration, a dictionary as ``model_cfg`` in ``open_clip_config.json``, with two keys
more: ``preprocess_cfg`` (mean and std) beside the towers, and ``timm_kwargs`` in ``vision_cfg``, a ViT of timm of any size.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..checkpoints.files import check_fit
from ..checkpoints.hub import CLIP_FILES, PREFIX, fetch
from ..checkpoints.json_files import load_json
from ..checkpoints.published import read_published
from ..checkpoints.state_dicts import State, plain_names, without_prefix
from ..checkpoints.transformers_layout import (
    MODEL_TYPES,
    parts_of,
    transformers_config,
    transformers_state,
)
from ..errors import CheckpointError, InputError, WeightsError
from ..paths import address, no_file
from .clip_positions import resize_clip_positions

Architecture = str | dict[str, Any]
QUICK = "-quickgelu"  # how open_clip names an architecture with OpenAI's activation
_NUMBERS = ("input_resolution", "context_length", "vocab_size")  # OpenAI's state dicts hold them as tensors
_TOKENIZER_OPTIONS = (
    "clean",
    "strip_sep_token",
    "language",
    "reduction_mask",
    "additional_special_tokens",
)
_TOKENIZER_FILES = (("tokenizer.json", "spiece.model", "vocab.txt"), ("tokenizer_config.json",), ("special_tokens_map.json",))


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


def import_open_clip() -> ModuleType:
    """open_clip, or an error that names the usual cause: a torchvision that does not match torch."""
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"open_clip does not import ({error}). It needs open_clip_torch and a torchvision built for torch "
            f"{torch.__version__}: pip install 'ovseg-kernels[models]', with torch and torchvision of one release "
            "(torchvision has no CPU wheel on PyPI; the CUDA build of torch runs without a GPU)"
        ) from error
    return open_clip


def architectures() -> list[str]:
    """open_clip's names, without importing it; none where it is not installed."""
    loaded = sys.modules.get("open_clip")
    if loaded is not None:
        return loaded.list_models()
    spec = find_spec("open_clip")
    return sorted(path.stem for path in (Path(spec.origin).parent / "model_configs").glob("*.json")) if spec and spec.origin else []


def supported(architecture: str) -> bool:
    """Whether ``OpenClipBackbone`` can walk it."""
    tower = import_open_clip().get_model_config(architecture)["vision_cfg"].get("timm_model_name", "")
    return not tower.startswith("swin") and "relpos" not in tower  # their tables of positions are those of one picture size


def tags_of(architecture: str) -> dict[str, dict[str, Any]]:
    """open_clip's pretrained tags of an architecture: tag -> its facts. Those of both activations: the tag decides between them."""
    open_clip = import_open_clip()
    stem = architecture.removesuffix(QUICK)
    names = [name for name in (architecture, stem, stem + QUICK) if name in open_clip.list_models()]
    return {tag: open_clip.pretrained.get_pretrained_cfg(name, tag)
            for name in reversed(names) for tag in open_clip.pretrained.list_pretrained_tags_by_model(name)}


def find_clip(weights: str, architecture: Architecture | None = None) -> ClipSource:
    """Find weights; those that are not here are fetched.

    Args:
        weights: a pretrained tag of open_clip's for ``architecture``; ``hf-hub:owner/name``; a checkpoint of open_clip's, ``.safetensors``,
            ``.pt`` or ``.bin``; a folder of open_clip's or of transformers' CLIP or SigLIP.
        architecture: for a tag, and for the message where a file cannot be told.

    Raises:
        InputError: for a name that is none of these; WeightsError: for weights that cannot be had.
    """
    if weights.startswith(PREFIX):
        return _of_folder(fetch_folder(weights.removeprefix(PREFIX)), weights)
    if isinstance(architecture, str) and weights in (tags := tags_of(architecture)):
        facts = tags[weights]
        path = _fetch_tag(facts, f" and -m {architecture}:FILE" if "/" not in architecture else "")
        return ClipSource(
            lambda: read_clip(path),
            f"{architecture}:{weights}",
            _of_activation(architecture, facts),
            {key: tuple(facts[key]) for key in ("mean", "std")},
        )
    path = Path(weights)
    if is_clip_file(path):
        path = path.parent
    if path.is_dir():
        return _of_folder(path, str(path))
    if path.is_file():
        return ClipSource(lambda: read_clip(path), str(path))
    known = f" or one of the tags {sorted(tags_of(architecture))}" if isinstance(architecture, str) else ""
    there = f", which {no_file(path)}" if os.path.lexists(path) or address(weights) else ""
    raise InputError(f"clip is {weights!r}{there}; expected a file or folder that exists, {PREFIX}owner/name{known}")


def fetch_folder(repo: str) -> Path:
    """The folder of the cache that holds a repository's configuration and weights, of open_clip's, transformers' or ``save_pretrained``."""
    config = fetch(repo, ("open_clip_config.json", "config.json"), ways=", with its weights in a folder that -m names")
    ours = config.name == "config.json"
    if ours and _kind(config) is None:
        raise CheckpointError(f"{PREFIX}{repo} holds no CLIP of open_clip's or transformers' and no model of ovseg; expected "
                              "open_clip_config.json, or a config.json with model_type or model")
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin") if ours else CLIP_FILES
    path = fetch(repo, files, ways=f", beside {config.name} in a folder that -m names")
    if path.name.endswith(".index.json"):
        for part in parts_of(path):
            fetch(repo, (part,))
    if path.parent != config.parent:  # the repository has moved on since the configuration was cached
        fetch(repo, (config.name,))
    for names in (("preprocessor_config.json",), *_TOKENIZER_FILES) if model_type_of(path.parent) else ():
        _fetch_optional(repo, names)
    return path.parent


def is_clip_folder(folder: Path) -> bool:
    """Whether open_clip or transformers wrote it."""
    return (folder / "open_clip_config.json").is_file() or model_type_of(folder) is not None


def is_clip_file(path: Path) -> bool:
    """Whether it is the file of weights of such a folder, which says what they are."""
    return path.is_file() and path.name in (*CLIP_FILES, "model.safetensors", "pytorch_model.bin") and is_clip_folder(path.parent)


def read_clip(path: Path) -> State:
    """The tensors of a checkpoint of a CLIP, which may be a part called ``clip`` of what was
    saved."""
    return clip_names(read_published(path))


def clip_names(state: State) -> State:
    """``state`` under the names of a CLIP that stands alone."""
    return plain_names(without_prefix(state, "clip."))


def create_clip(
    architecture: Architecture,
    weights: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
) -> nn.Module:
    """Arguments as in ``OpenClipOptions``; ``weights`` is its ``clip``. With a size the positions
    of the weights are resized to it."""
    source = None if weights is None else find_clip(weights, architecture)
    if source is not None and source.architecture is not None and _quick(source.architecture) != _quick(architecture):
        raise ValueError(f"clip is {weights!r}, trained with{'' if _quick(source.architecture) else 'out'} QuickGELU, and architecture "
                         f"{_title(architecture)}; expected architecture={_title(source.architecture)}")
    model = _build(
        sized(architecture, image_size, context_length), source.preprocess if source else None
    )
    if source is not None:
        load_clip(model, source, resize=(image_size, context_length) != (None, None))
    return model


def sized(
    architecture: Architecture, image_size: int | None, context_length: int | None
) -> Architecture:
    """The architecture for pictures of so many pixels a side and texts of so many tokens; None
    leaves them as they are.

    Raises:
        InputError: for a size that it cannot have.
    """
    if image_size is None and context_length is None:
        return architecture
    config = configuration(architecture)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if image_size is not None:
        patch = vision.get("patch_size", 16)
        if (
            not isinstance(vision.get("layers", 12), int)
            or {"timm_model_name", "timm_kwargs"} & vision.keys()
        ):
            raise InputError(
                f"image_size is {image_size} and architecture {_title(architecture)}, whose image "
                "tower is not open_clip's ViT; expected None: pictures of any size are read all the same"
            )
        if not isinstance(patch, int) or image_size < patch or image_size % patch:
            raise InputError(
                f"image_size is {image_size}; expected a multiple of the patch, {patch} pixels"
            )
        vision["image_size"] = image_size
    if context_length is not None:
        if "hf_model_name" in text:
            raise InputError(
                f"context_length is {context_length} and architecture {_title(architecture)}, "
                "whose text tower is transformers'; expected None"
            )
        text["context_length"] = context_length
    return config


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


def configuration(architecture: Architecture) -> dict[str, Any]:
    """A copy of the configuration, with ``preprocess_cfg``."""
    if isinstance(architecture, dict):
        return deepcopy(architecture)
    open_clip = import_open_clip()
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(f"architecture is {architecture!r}; expected one of open_clip.list_models()")
    seen = [(tuple(facts["mean"]), tuple(facts["std"])) for facts in tags_of(architecture).values()]
    mean, std = max(seen, key=seen.count) if seen else (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    return {**config, "preprocess_cfg": {"mean": mean, "std": std}}


def settled(source: ClipSource, architecture: Architecture | None) -> Architecture:
    """The architecture to build for these weights, and to write down beside them: ``architecture`` with their activation, else their
    own, else the one they fit.

    Raises:
        InputError: if they fit none of open_clip's, or several.
    """
    own = source.architecture
    if isinstance(architecture, str) and isinstance(own, dict):
        own = _of_activation(architecture, own)
    found = own or architecture
    if found is None:
        fits = fitting(source.read())
        if len(fits) != 1:
            ways = " or ".join(f"{name}:{source.where}" for name in fits)
            raise InputError(f"{source.where} fits {len(fits)} architectures of open_clip and does not say which; expected -m "
                             + (ways or "NAME:PATH with the name of its architecture (ovseg models)"))
        found = fits[0]
    if source.preprocess and source.preprocess != configuration(found)["preprocess_cfg"]:
        return {**configuration(found), "preprocess_cfg": source.preprocess}
    return found


def fitting(state: dict[str, torch.Tensor]) -> list[str]:
    """Architectures of open_clip whose tensors have these names and shapes. Two activations look alike."""
    open_clip, shapes = import_open_clip(), {name: tuple(x.shape) for name, x in state.items() if name not in _NUMBERS}
    prefix = "text." if "text.token_embedding.weight" in shapes else ""
    words = shapes.get(f"{prefix}token_embedding.weight")
    found = []
    for name in open_clip.list_models() if words else ():
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        width = shapes.get("visual.conv1.weight", (None,))[0]
        if (text.get("vocab_size", 49408), text.get("width", 512)) != words:
            continue
        if "hf_model_name" in text or ("timm_model_name" in vision) != any(key.startswith("visual.trunk.") for key in shapes) or (
                "timm_model_name" not in vision and isinstance(vision.get("layers", 12), int) and vision.get("width", 768) != width):
            continue
        with torch.device("meta"):
            own = _build(name).state_dict()
        if {key: tuple(x.shape) for key, x in own.items()} == shapes:
            found.append(name)
    return found


def clip_tokenizer(architecture: Architecture) -> Callable[[Sequence[str]], torch.Tensor]:
    """Texts to ids [T, L]: open_clip's byte pairs, or a tokenizer of transformers whose files are fetched."""
    open_clip, text = import_open_clip(), configuration(architecture)["text_cfg"]
    length, name = text.get("context_length", 77), text.get("hf_tokenizer_name")
    if not name:
        if isinstance(architecture, str):
            return open_clip.get_tokenizer(architecture)
        return open_clip.tokenizer.SimpleTokenizer(
            context_length=length, **_tokenizer_options(text)
        )
    folder = Path(name)
    if not folder.is_dir():
        folder = fetch(name, _TOKENIZER_FILES[0], ways=f", with tokenizer_config.json, into {name} below the present folder").parent
        for files in _TOKENIZER_FILES[1:]:
            _fetch_optional(name, files)
    try:
        # None, transformers' default, would ask on the terminal whether to run a folder's code.
        return open_clip.tokenizer.HFTokenizer(str(folder), context_length=length, tokenizer_mode=text.get("tokenizer_mode"),
                                               **_tokenizer_options(text), trust_remote_code=False)
    except ImportError as error:
        raise ImportError(f"the words of {_title(architecture)} need transformers ({error}): pip install transformers") from error


def _tokenizer_options(text: dict[str, Any]) -> dict[str, Any]:
    """What a configuration, which may come from anybody, says about how texts are cut."""
    given = text.get("tokenizer_kwargs") or {}
    for key in given:
        if key not in _TOKENIZER_OPTIONS:
            raise CheckpointError(
                f"text_cfg.tokenizer_kwargs holds {key!r}; expected some of "
                f"{list(_TOKENIZER_OPTIONS)}"
            )
    return dict(given)


def _check_text(config: dict[str, Any], where: str) -> None:
    """Raises CheckpointError for a text tower of transformers that none of open_clip's own models
    has: its repository may hold code."""
    name = config["text_cfg"].get("hf_model_name")
    if name is None:
        return
    open_clip = import_open_clip()
    known = {
        open_clip.get_model_config(one)["text_cfg"].get("hf_model_name")
        for one in open_clip.list_models()
    } - {None}
    if name not in known:
        raise CheckpointError(
            f"{where} has transformers' {name!r} as text tower; expected one of {sorted(known)}"
        )


def _build(architecture: Architecture, preprocess: dict[str, Any] | None = None) -> nn.Module:
    open_clip, config = import_open_clip(), configuration(architecture)
    known = config.pop("preprocess_cfg", None)
    vision, text = config["vision_cfg"], config["text_cfg"]
    hf, coca, kwargs = "hf_model_name" in text, "multimodal_cfg" in config, vision.pop("timm_kwargs", None)
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if hf:
        text["hf_model_pretrained"] = False
    if kwargs:
        import timm

        vision |= {"timm_model_name": "test_vit", "timm_pool": "avg"}  # a small one, in place of which comes the tower of these sizes
    custom = config.pop("custom_text", False) or hf
    kind = (open_clip.CoCa if coca else open_clip.CustomTextCLIP) if custom else open_clip.CLIP
    model = kind(**config)
    if kwargs:
        model.visual.trunk = timm.models.VisionTransformer(num_classes=0, **kwargs)
    open_clip.model.set_model_preprocess_cfg(model, {**vars(open_clip.transform.PreprocessCfg()), **(known or {}), **(preprocess or {}),
                                                     "size": model.visual.image_size})
    return model


def _state_for(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What open_clip's own loading changes before it loads: foreign names, older names, scalars."""
    factory = import_open_clip().factory
    state = factory.convert_state_dict(model, dict(state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = factory.convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    if not hasattr(model, "text_decoder"):  # CoCa's, which writes captions, may have been left out
        state = {name: tensor for name, tensor in state.items() if not name.startswith("text_decoder.")}
    for name in (*_NUMBERS, "text.transformer.embeddings.position_ids", "attn_mask"):
        if name not in own:
            state.pop(name, None)
    for name in ("logit_scale", "logit_bias"):
        if name in own and name in state:
            state[name] = state[name].reshape(own[name].shape)
    return state


def _of_folder(folder: Path, where: str) -> ClipSource:
    if (folder / "open_clip_config.json").is_file():
        path = folder / "open_clip_config.json"
        try:
            tree = load_json(path)
            config = {
                **tree["model_cfg"],
                "vision_cfg": {**tree["model_cfg"]["vision_cfg"]},
                "text_cfg": {**tree["model_cfg"]["text_cfg"]},
                "preprocess_cfg": {
                    key: tuple(tree["preprocess_cfg"][key]) for key in ("mean", "std")
                },
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); expected JSON with model_cfg and preprocess_cfg"
            ) from error
        _check_text(config, str(path))
        if (folder / "tokenizer.json").is_file() and config["text_cfg"].get("hf_tokenizer_name"):
            config["text_cfg"]["hf_tokenizer_name"] = str(folder.resolve())
        files = [folder / name for name in CLIP_FILES if (folder / name).is_file()]
        if not files:
            raise CheckpointError(f"{folder} has no weights; expected {' or '.join(CLIP_FILES)}")
        return ClipSource(lambda: read_clip(files[0]), where, config)
    if model_type_of(folder) is None:
        raise CheckpointError(f"{folder} holds no CLIP; expected open_clip_config.json, or config.json of transformers' {MODEL_TYPES}")
    return ClipSource(lambda: transformers_state(folder), where, transformers_config(folder))


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
        raise WeightsError(f"open_clip has these weights at {facts.get('url')} only; fetch the file and give its path{ways}")
    return fetch(repo, (file,) if file else CLIP_FILES, ways=ways)


def _of_activation(architecture: str, facts: dict[str, Any]) -> Architecture:
    """The architecture with the activation that the tag was trained with. open_clip's names of OpenAI's models leave it out."""
    if facts.get("quick_gelu") and not _quick(architecture):
        quick = architecture + QUICK
        return quick if quick in import_open_clip().list_models() else {**configuration(architecture), "quick_gelu": True}
    return architecture if facts.get("quick_gelu") else architecture.removesuffix(QUICK)


def _quick(architecture: Architecture) -> bool:
    return bool(configuration(architecture).get("quick_gelu"))


def _title(architecture: Architecture) -> str:
    return repr(architecture) if isinstance(architecture, str) else "a configuration of its own"


def _fetch_optional(repo: str, files: Sequence[str]) -> None:
    with suppress(WeightsError):  # many models have none
        fetch(repo, files)
