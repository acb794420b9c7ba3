"""Folders of transformers' CLIP and SigLIP as open_clip writes the same models: configuration,
names, packed projections.

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

State = dict[str, torch.Tensor]
MODEL_TYPES = ("clip", "siglip")
_ACTIVATIONS: dict[str, dict[str, Any]] = {  # the activation there -> what open_clip calls it
    "quick_gelu": {"quick_gelu": True},
    "gelu": {},
    "gelu_pytorch_tanh": {"act_kwargs": {"approximate": "tanh"}},
}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
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


def transformers_config(folder: Path) -> dict[str, Any]:
    """The configuration for open_clip of a folder of transformers.

    Raises:
        CheckpointError: for another model, or one that open_clip has no word for.
    """
    config = read_json(folder / "config.json")
    return (_clip_config if _kind(folder, config) == "clip" else _siglip_config)(folder, config)


def transformers_state(folder: Path) -> State:
    """The tensors of the folder's model under open_clip's names.

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
    """The tensors of ``CLIPModel`` under the names of ``open_clip.CLIP``."""
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
    """The tensors of ``SiglipModel`` under the names of ``open_clip.CustomTextCLIP`` with timm's
    vision tower.
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
    head, pool = "vision_model.head.", "visual.trunk.attn_pool."
    for part in ("weight", "bias"):
        packed = state[f"{head}attention.in_proj_{part}"]
        third = len(packed) // 3
        found[f"{pool}q.{part}"], found[f"{pool}kv.{part}"] = packed[:third], packed[third:]
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


# Of a block: transformers' part -> open_clip's and timm's; the packed projection's weight and bias.
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


def _blocks(state: State, tower: str, target: str, names: dict[str, str]) -> State:
    found: State = {}
    prefix, index = f"{tower}encoder.layers.", 0
    while f"{prefix}{index}.layer_norm1.weight" in state:
        block, ours = f"{prefix}{index}.", f"{target}{index}."
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
    return {f"{ours}.{part}": state[f"{theirs}.{part}"] for part in ("weight", "bias")}


def _clip_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    vision, text = (
        _sizes(config, "vision_config", 12, 32, "quick_gelu", 1e-5),
        _sizes(config, "text_config", 8, 0, "quick_gelu", 1e-5),
    )
    if vision["act"] != text["act"]:
        raise CheckpointError(
            f"{folder} has activation {vision['act']} for pictures and {text['act']} for texts; "
            "expected one for both"
        )
    words = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["width"],
        "heads": text["heads"],
        "layers": text["layers"],
        "mlp_ratio": text["mlp_ratio"],
        **_norm(text, 1e-5),
    }
    if text["eos_token_id"] not in (
        2,
        text["vocab_size"] - 1,
    ):  # with 2, as the first folders say, transformers takes the largest id
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
        **_norm(vision, 1e-5),
    }
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": quick,
        "vision_cfg": {**pictures, **act},
        "text_cfg": {**words, **act},
        "preprocess_cfg": preprocess_of(folder, _CLIP_MEAN, _CLIP_STD),
    }


def _siglip_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    tanh = "gelu_pytorch_tanh"
    vision, text = (
        _sizes(config, "vision_config", 12, 16, tanh, 1e-6),
        _sizes(config, "text_config", 12, 0, tanh, 1e-6),
    )
    if (
        vision["act"] == "quick_gelu"
        or text["act"] == "quick_gelu"
        or vision["layer_norm_eps"] != 1e-6
        or not vision["vision_use_head"]
    ):
        raise CheckpointError(
            f"{folder} has activations {vision['act']}, {text['act']}, layer_norm_eps "
            f"{vision['layer_norm_eps']} and "
            f"vision_use_head {vision['vision_use_head']}; expected SigLIP's: gelu, 1e-6 and true"
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
        "act_layer": "gelu_tanh" if vision["act"] == tanh else "gelu",
    }
    words = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["width"],
        "heads": text["heads"],
        "layers": text["layers"],
        "mlp_ratio": text["mlp_ratio"],
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": text["layer_norm_eps"]},
        "tokenizer_kwargs": {"clean": "canonicalize"},
        **_ACTIVATIONS[text["act"]],
        **_tokenizer(folder),
    }
    return {
        "embed_dim": text["projection_size"] or text["width"],
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision["image_size"],
            "timm_kwargs": trunk,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": words,
        "preprocess_cfg": preprocess_of(folder, (0.5,) * 3, (0.5,) * 3),
    }


def _sizes(
    config: dict[str, Any], part: str, heads: int, patch: int, act: str, eps: float
) -> dict[str, Any]:
    """Of a tower; what the file leaves out is the default of transformers' classes."""
    clip_text = part == "text_config" and act == "quick_gelu"
    given = tower_config(config, part)
    width = given.get("hidden_size", 512 if clip_text else 768)
    inner = given.get("intermediate_size", 2048 if clip_text else 3072)
    found = {
        "width": width,
        "heads": given.get("num_attention_heads", heads),
        "layers": given.get("num_hidden_layers", 12),
        "mlp_ratio": (inner + 0.5) / width,  # the towers round down
        "image_size": given.get("image_size", 224),
        "patch_size": given.get("patch_size", patch),
        "act": given.get("hidden_act", act),
        "layer_norm_eps": given.get("layer_norm_eps", eps),
        "vision_use_head": given.get("vision_use_head", True),
        "max_position_embeddings": given.get("max_position_embeddings", 77 if clip_text else 64),
        "vocab_size": given.get("vocab_size", _BYTE_PAIRS if clip_text else 32000),
        "eos_token_id": given.get("eos_token_id", 49407),
        "projection_size": given.get("projection_size"),
    }
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
        if given.get(key) is not None and (
            type(given[key]) is not int or not 0 < given[key] <= _MOST
        ):
            raise CheckpointError(
                f"{part}.{key} is {str(given[key])[:40]!r}; expected 1 to {_MOST}"
            )
    return given


def _norm(sizes: dict[str, Any], usual: float) -> dict[str, Any]:
    return (
        {}
        if sizes["layer_norm_eps"] == usual
        else {"norm_kwargs": {"eps": sizes["layer_norm_eps"]}}
    )


def _tokenizer(folder: Path) -> dict[str, Any]:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(
            f"{folder} has a vocabulary of its own and no tokenizer; expected one of "
            f"{', '.join(_TOKENIZERS)} in it"
        )
    return {"hf_tokenizer_name": str(folder.resolve())}


def preprocess_of(folder: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """Mean and std that the folder states, else these."""
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
    """The names of the files, beside it, that an index of tensors lists.

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
    """All tensors of a folder, which may be in several files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {
            name: x for part in parts_of(index) for name, x in read_published(folder / part).items()
        }
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    return read_published(next((file for file in files if file.is_file()), files[0]))
