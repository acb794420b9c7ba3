"""Folders of transformers' CLIP and SigLIP, as open_clip has the same models.

transformers keeps q, k and v apart and open_clip packs them; transformers' projections are
``nn.Linear`` and CLIP's are matrices, so they are transposed. The words and the tensors are
transformers' and open_clip's own; nothing of transformers is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .files import read_json
from .pickles import read_published
from .state_dicts import State

MODEL_TYPES = ("clip", "siglip")
_TANH = "gelu_pytorch_tanh"
_ACTIVATIONS: dict[str, dict[str, Any]] = {  # the activation there -> what open_clip calls it
    "quick_gelu": {"quick_gelu": True},
    "gelu": {},
    _TANH: {"act_kwargs": {"approximate": "tanh"}},
}
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.json")
_MOST = 1_000_000  # of any size
_WHOLE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "image_size",
    "patch_size",
    "vocab_size",
    "max_position_embeddings",
    "projection_size",
)
_BYTE_PAIRS = 49408  # words of CLIP's own tokenizer, which open_clip brings along
# Parts of a block: transformers' names -> open_clip's and timm's, which pack q, k and v.
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "packed": "attn.in_proj_",
}
_TIMM = {
    "layer_norm1": "norm1",
    "self_attn.out_proj": "attn.proj",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "packed": "attn.qkv.",
}


def transformers_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a folder, as open_clip writes it.

    Raises:
        CheckpointError: for another model, or one that open_clip has no word for.
    """
    config = read_json(folder / "config.json")
    read = _clip_config if _kind(folder, config) == "clip" else _siglip_config
    return read(folder, config)


def transformers_state(folder: Path) -> State:
    """Read the tensors of a folder's model under open_clip's names.

    Raises:
        CheckpointError: for files that are missing, damaged or lack a tensor.
    """
    kind = _kind(folder, read_json(folder / "config.json"))
    try:
        return (from_clip if kind == "clip" else from_siglip)(folder_weights(folder))
    except KeyError as error:
        raise CheckpointError(
            f"{folder} has no tensor {error}; expected all of transformers' {kind}"
        ) from error


def _kind(folder: Path, config: dict[str, Any]) -> str:
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"{folder} holds transformers' {kind!r}; expected one of {list(MODEL_TYPES)}"
        )
    return kind


def from_clip(state: State) -> State:
    """Rename the tensors of ``CLIPModel`` as those of ``open_clip.CLIP``."""
    found = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T,
        "visual.proj": state["visual_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
    }
    for theirs, ours in (
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("text_model.final_layer_norm", "ln_final"),
    ):
        found |= _both(state, theirs, ours)
    found |= _blocks(state, "vision_model.", "visual.transformer.resblocks.", _OPEN_CLIP)
    return found | _blocks(state, "text_model.", "transformer.resblocks.", _OPEN_CLIP)


def from_siglip(state: State) -> State:
    """Rename the tensors of ``SiglipModel`` as those of ``open_clip.CustomTextCLIP``.

    Its vision tower is timm's.
    """
    embeddings = "vision_model.embeddings."
    found = {
        "logit_scale": state["logit_scale"].reshape(()),
        "logit_bias": state["logit_bias"].reshape(()),
        "visual.trunk.pos_embed": state[embeddings + "position_embedding.weight"][None],
        "visual.trunk.attn_pool.latent": state["vision_model.head.probe"],
        "text.token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text.positional_embedding": state["text_model.embeddings.position_embedding.weight"],
    }
    head = "vision_model.head."
    pool = "visual.trunk.attn_pool."
    for part in ("weight", "bias"):
        packed = state[f"{head}attention.in_proj_{part}"]
        third = len(packed) // 3
        found[f"{pool}q.{part}"] = packed[:third]
        found[f"{pool}kv.{part}"] = packed[third:]
    for theirs, ours in (
        (embeddings + "patch_embedding", "visual.trunk.patch_embed.proj"),
        ("vision_model.post_layernorm", "visual.trunk.norm"),
        (head + "attention.out_proj", pool + "proj"),
        (head + "layernorm", pool + "norm"),
        (head + "mlp.fc1", pool + "mlp.fc1"),
        (head + "mlp.fc2", pool + "mlp.fc2"),
        ("text_model.final_layer_norm", "text.ln_final"),
        ("text_model.head", "text.text_projection"),
    ):
        found |= _both(state, theirs, ours)
    found |= _blocks(state, "vision_model.", "visual.trunk.blocks.", _TIMM)
    return found | _blocks(state, "text_model.", "text.transformer.resblocks.", _OPEN_CLIP)


def _blocks(state: State, tower: str, target: str, names: dict[str, str]) -> State:
    """Rename and pack the blocks of a tower."""
    found: State = {}
    prefix = f"{tower}encoder.layers."
    index = 0
    while f"{prefix}{index}.layer_norm1.weight" in state:
        block = f"{prefix}{index}."
        ours = f"{target}{index}."
        for part in ("weight", "bias"):
            found[f"{ours}{names['packed']}{part}"] = torch.cat(
                [state[f"{block}self_attn.{x}_proj.{part}"] for x in "qkv"]
            )
        for theirs, name in names.items():
            if theirs != "packed":
                found |= _both(state, block + theirs, ours + name)
        index += 1
    return found


def _both(state: State, theirs: str, ours: str) -> State:
    """Rename weight and bias of a layer."""
    return {f"{ours}.{part}": state[f"{theirs}.{part}"] for part in ("weight", "bias")}


def _clip_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of CLIP."""
    vision = _sizes(config, "vision_config", heads=12, patch=32, act="quick_gelu", eps=1e-5)
    text = _sizes(config, "text_config", heads=8, patch=0, act="quick_gelu", eps=1e-5)
    if vision["act"] != text["act"]:
        raise CheckpointError(
            f"{folder} has activation {vision['act']} for pictures and {text['act']} for texts; "
            "expected one for both"
        )
    words = {**_text(text), **_norm(text)}
    # With 2, as the first folders say, transformers takes the largest id.
    if text["eos_token_id"] not in (2, text["vocab_size"] - 1):
        words |= {"pool_type": "eos", "eos_id": text["eos_token_id"]}
    if text["vocab_size"] != _BYTE_PAIRS:
        words |= _tokenizer(folder)
    act = dict(_ACTIVATIONS[vision["act"]])
    quick = act.pop("quick_gelu", False)
    pictures = {
        "image_size": vision["image_size"],
        "layers": vision["layers"],
        "width": vision["width"],
        "patch_size": vision["patch_size"],
        "head_width": vision["width"] // vision["heads"],
        "mlp_ratio": vision["mlp_ratio"],
        **_norm(vision),
    }
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": quick,
        "vision_cfg": {**pictures, **act},
        "text_cfg": {**words, **act},
        "preprocess_cfg": preprocess_of(folder, _CLIP_MEAN, _CLIP_STD),
    }


def _siglip_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of SigLIP, with the sizes of timm's tower in ``timm_kwargs``."""
    vision = _sizes(config, "vision_config", heads=12, patch=16, act=_TANH, eps=1e-6)
    text = _sizes(config, "text_config", heads=12, patch=0, act=_TANH, eps=1e-6)
    eps = vision["layer_norm_eps"]
    head = vision["vision_use_head"]
    if "quick_gelu" in (vision["act"], text["act"]) or eps != 1e-6 or not head:
        raise CheckpointError(
            f"{folder} has activations {vision['act']}, {text['act']}, layer_norm_eps {eps} and "
            f"vision_use_head {head}; expected SigLIP's: gelu, 1e-6 and true"
        )
    trunk = {
        "img_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embed_dim": vision["width"],
        "depth": vision["layers"],
        "num_heads": vision["heads"],
        "mlp_ratio": vision["mlp_ratio"],
        "class_token": False,
        "global_pool": "map",
        "act_layer": "gelu_tanh" if vision["act"] == _TANH else "gelu",
    }
    words = {
        **_text(text),
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": text["layer_norm_eps"]},
        "tokenizer_kwargs": {"clean": "canonicalize"},
        **_ACTIVATIONS[text["act"]],
        **_tokenizer(folder),
    }
    pictures = {
        "image_size": vision["image_size"],
        "timm_kwargs": trunk,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    return {
        "embed_dim": text["projection_size"] or text["width"],
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": pictures,
        "text_cfg": words,
        "preprocess_cfg": preprocess_of(folder, (0.5,) * 3, (0.5,) * 3),
    }


def _text(sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of a text tower under open_clip's names."""
    names = ("vocab_size", "width", "heads", "layers", "mlp_ratio")
    return {
        "context_length": sizes["max_position_embeddings"],
        **{name: sizes[name] for name in names},
    }


def _sizes(
    config: dict[str, Any], part: str, *, heads: int, patch: int, act: str, eps: float
) -> dict[str, Any]:
    """Return the sizes of a tower; what the file leaves out is as in transformers' classes."""
    clip_text = part == "text_config" and act == "quick_gelu"
    given = tower_config(config, part)
    width = given.get("hidden_size", 512 if clip_text else 768)
    inner = given.get("intermediate_size", 2048 if clip_text else 3072)
    found = {
        "width": width,
        "heads": given.get("num_attention_heads", heads),
        "layers": given.get("num_hidden_layers", 12),
        "mlp_ratio": (inner + 0.5) / width,  # the towers round down
        "act": given.get("hidden_act", act),
    }
    usual = {
        "image_size": 224,
        "patch_size": patch,
        "layer_norm_eps": eps,
        "vision_use_head": True,
        "max_position_embeddings": 77 if clip_text else 64,
        "vocab_size": _BYTE_PAIRS if clip_text else 32000,
        "eos_token_id": 49407,
        "projection_size": None,
    }
    found |= {key: given.get(key, value) for key, value in usual.items()}
    if found["act"] not in _ACTIVATIONS:
        raise CheckpointError(
            f"{part}.hidden_act is {found['act']!r}; expected one of {list(_ACTIVATIONS)}"
        )
    return found


def tower_config(config: dict[str, Any], part: str) -> dict[str, Any]:
    """Return what a configuration says of one tower, ``part``.

    Raises:
        CheckpointError: for a size that is none.
    """
    given = config.get(part) or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{part} is {str(given)[:40]!r}; expected names and values")
    for key in _WHOLE:
        size = given.get(key)
        if size is not None and (type(size) is not int or not 0 < size <= _MOST):
            raise CheckpointError(f"{part}.{key} is {str(size)[:40]!r}; expected 1 to {_MOST}")
    return given


def _norm(sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the epsilon of CLIP's norms, where it is not the usual one."""
    eps = sizes["layer_norm_eps"]
    return {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}


def _tokenizer(folder: Path) -> dict[str, Any]:
    """Return the folder as that of its tokenizer."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(
            f"{folder} has a vocabulary of its own and no tokenizer; expected one of "
            f"{', '.join(_TOKENIZERS)} in it"
        )
    return {"hf_tokenizer_name": str(folder.resolve())}


def preprocess_of(folder: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """Return mean and std that a folder states, else these."""
    path = folder / "preprocessor_config.json"
    given = read_json(path) if path.is_file() else {}
    found = {"mean": given.get("image_mean", mean), "std": given.get("image_std", std)}
    for name, row in found.items():
        if (
            not isinstance(row, (list, tuple))
            or len(row) != 3
            or not all(isinstance(x, (int, float)) for x in row)
        ):
            raise CheckpointError(
                f"{path}: image_{name} is {str(row)[:60]}; expected three numbers"
            )
    return {name: tuple(row) for name, row in found.items()}


def parts_of(index: Path) -> list[str]:
    """List the files, beside it, that an index of tensors names.

    Raises:
        CheckpointError: if it lists none, or a path that leads elsewhere.
    """
    names = read_json(index).get("weight_map")
    parts = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not parts or any(Path(part).name != part for part in parts):
        raise CheckpointError(
            f"{index} is damaged; expected weight_map, tensors' names and the files beside it that "
            "hold them"
        )
    return parts


def folder_weights(folder: Path) -> State:
    """Read all tensors of a folder, which may be in several files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = [read_published(folder / part) for part in parts_of(index)]
        return {name: x for part in parts for name, x in part.items()}
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    return read_published(next((file for file in files if file.is_file()), files[0]))
