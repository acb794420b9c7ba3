"""GroupViT in transformers' layout and in NVIDIA's: names, tensors, the options of a folder.

transformers keeps q, k and v of its blocks apart; here they are packed. Its dead tensors: none. A
file may hold beside the model's own tensors the tables of positions' numbers that older versions
wrote (``*.position_ids``); it may lack the second temperature, which only training has. Nothing
else. NVIDIA's own files are read and not written. Their image tower has OVSegmentor's names; those
of the text tower are after the table by which transformers 4 converted such files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ...nn.vit_blocks import ACTIVATIONS
from ...weights.files import read_json
from ...weights.published import Published, State
from ...weights.transformers_layout import preprocess_of, tower_config
from ..grouping import convolutions, linear

_BYTE_PAIRS = 49408  # words of CLIP's own tokenizer
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SEPARATE = re.compile(r"(.+\.layers\.\d+\.self_attn)\.([qkv])_proj\.(weight|bias)")
_PACKED = re.compile(r"(.+\.layers\.\d+\.self_attn)\.qkv\.(weight|bias)")
# Theirs, ours below ``backbone.``; the first that fits, {} is a number.
_NVIDIA = (
    ("img_encoder.layers.{}.group_projector.0.", "image.layers.{}.group_projector.norm."),
    ("img_encoder.layers.{}.group_projector.1.", "image.layers.{}.group_projector.mlp."),
    ("img_encoder.", "image."),
    ("text_encoder.transformer.resblocks.{}.attn.in_proj_", "text.layers.{}.attn.qkv."),
    ("text_encoder.transformer.resblocks.{}.attn.out_proj.", "text.layers.{}.attn.proj."),
    ("text_encoder.transformer.resblocks.{}.ln_1.", "text.layers.{}.norm1."),
    ("text_encoder.transformer.resblocks.{}.ln_2.", "text.layers.{}.norm2."),
    ("text_encoder.transformer.resblocks.{}.mlp.c_fc.", "text.layers.{}.mlp.fc1."),
    ("text_encoder.transformer.resblocks.{}.mlp.c_proj.", "text.layers.{}.mlp.fc2."),
    ("text_encoder.", "text."),
    ("img_projector.", "image_projector."),
    ("text_projector.", "text_projector."),
    ("logit_scale", "logit_scale"),
)
_TRANSFORMERS = (
    ("vision_model.embeddings.position_embeddings", "image.pos_embed"),
    ("vision_model.embeddings.patch_embeddings.projection.", "image.patch_embed.proj."),
    ("vision_model.embeddings.layernorm.", "image.patch_embed.norm."),
    ("vision_model.encoder.stages.{}.layers.{}.", "image.layers.{}.blocks.{}."),
    ("vision_model.encoder.stages.{}.group_projector.0.", "image.layers.{}.group_projector.norm."),
    ("vision_model.encoder.stages.{}.group_projector.1.", "image.layers.{}.group_projector.mlp."),
    ("vision_model.encoder.stages.{}.", "image.layers.{}."),
    ("vision_model.layernorm.", "image.norm."),
    ("text_model.embeddings.token_embedding.", "text.token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
    ("text_model.encoder.layers.{}.", "text.layers.{}."),
    ("text_model.final_layer_norm.", "text.ln_final."),
    ("visual_projection.3.", "image_projector.linear_out."),
    ("text_projection.3.", "text_projector.linear_out."),
    ("visual_projection.{}.", "image_projector.linear_hidden.{}."),
    ("text_projection.{}.", "text_projector.linear_hidden.{}."),
    ("logit_scale", "logit_scale"),
)
# What follows in transformers' names, theirs and ours.
_INSIDE = (
    ("layer_norm1.", "norm1."),
    ("layer_norm2.", "norm2."),
    ("self_attn.qkv.", "attn.qkv."),
    ("self_attn.out_proj.", "attn.proj."),
    ("pre_assign_attn.attn.out_proj.", "pre_assign_attn.attn.proj."),
)


def to_ours(name: str) -> str:
    """Return our name of transformers' tensor."""
    start, rest = _split(_TRANSFORMERS, name, 0, 1)
    return start + _swapped(rest, 0, 1)


def to_theirs(name: str) -> str:
    """Invert ``to_ours``."""
    start, rest = _split(_TRANSFORMERS, name, 1, 0)
    return start + _swapped(rest, 1, 0)


def _split(rules: tuple[tuple[str, str], ...], name: str, old: int, new: int) -> tuple[str, str]:
    """Return (the beginning that the first fitting rule gives, the rest of the name as it is)."""
    for theirs, ours in rules:
        rule = (theirs, f"backbone.{ours}")
        found = re.match(re.escape(rule[old]).replace(r"\{\}", r"(\d+)"), name)
        if found:
            return rule[new].format(*found.groups()), name[found.end() :]
    return "", name


def _swapped(rest: str, old: int, new: int) -> str:
    for pair in _INSIDE:
        for outer in ("", "downsample."):
            if rest.startswith(outer + pair[old]):
                return outer + pair[new] + rest[len(outer + pair[old]) :]
    return rest


def packed(state: State) -> State:
    """Put q, k and v of the blocks in one tensor."""
    found: State = {}
    for name, tensor in state.items():
        one = _SEPARATE.fullmatch(name)
        names = [f"{one[1]}.{letter}_proj.{one[3]}" for letter in "qkv"] if one else []
        if one is not None and all(other in state for other in names):
            found[f"{one[1]}.qkv.{one[3]}"] = torch.cat([state[other] for other in names])
        else:
            found[name] = tensor
    return found


def unpacked(state: State) -> State:
    """Invert ``packed``."""
    found: State = {}
    for name, tensor in state.items():
        one = _PACKED.fullmatch(name)
        if one is None:
            found[name] = tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            found[f"{one[1]}.{letter}_proj.{one[2]}"] = part
    return found


NVIDIA = Published(
    lambda name: "".join(_split(_NVIDIA, name, 0, 1)),
    lambda name: "".join(_split(_NVIDIA, name, 1, 0)),
    "text_encoder.transformer.resblocks.",
    ("multi_label_logit_scale",),
    surplus=("multi_label_logit_scale",),
    reshape=linear,
    restore=convolutions,
)
LAYOUT = Published(
    to_ours,
    to_theirs,
    "vision_model.encoder.stages.",
    ("multi_label_logit_scale",),
    reshape=packed,
    restore=unpacked,
    surplus=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    others=(NVIDIA,),
)


def folder_options(folder: Path) -> dict[str, Any]:
    """Return the backbone's options of a folder of transformers.

    Raises:
        CheckpointError: for a model that ours does not compute.
    """
    config = read_json(folder / "config.json")
    vision = tower_config(config, "vision_config")
    text = tower_config(config, "text_config")
    width = vision.get("hidden_size", 384)
    hidden = vision.get("intermediate_size", 1536)
    _check_computed(folder, vision, text, hidden / width)
    tokens = vision.get("num_group_tokens", [64, 8, 0])
    made = vision.get("num_output_groups", [64, 8, 8])
    seen = preprocess_of(folder, *_IMAGENET)
    return {
        "width": width,
        "heads": vision.get("num_attention_heads", 6),
        "hidden": hidden,
        "depths": vision.get("depths", [6, 3, 3]),
        "group_tokens": tokens,
        "groups": [groups for groups, count in zip(made, tokens, strict=False) if count],
        "patch_norm": True,
        "image_size": vision.get("image_size", 224),
        "patch_size": vision.get("patch_size", 16),
        "embed_dim": config.get("projection_dim", 256),
        "projector": config.get("projection_intermediate_dim", 4096),
        "mean": list(seen["mean"]),
        "std": list(seen["std"]),
        "text": _text_options(folder, text),
    }


def _text_options(folder: Path, text: dict[str, Any]) -> dict[str, Any]:
    vocabulary = text.get("vocab_size", _BYTE_PAIRS)
    eos = text.get("eos_token_id", _BYTE_PAIRS - 1)
    return {
        "kind": "clip",
        "width": text.get("hidden_size", 256),
        "heads": text.get("num_attention_heads", 4),
        "act": text.get("hidden_act", "quick_gelu"),
        "depth": text.get("num_hidden_layers", 12),
        "hidden": text.get("intermediate_size", 1024),
        "vocab_size": vocabulary,
        "context_length": text.get("max_position_embeddings", 77),
        # With 2, as the first folders say, transformers takes the largest id.
        "eos_id": None if eos == 2 else eos,
        "tokenizer": str(folder.resolve()) if vocabulary != _BYTE_PAIRS else None,
    }


def _check_computed(
    folder: Path, vision: dict[str, Any], text: dict[str, Any], ratio: float
) -> None:
    """Raise CheckpointError for a GroupViT that ours does not compute."""
    expected = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "assign_eps": 1.0,
        "num_channels": 3,
        "assign_mlp_ratio": [0.5, ratio],
    }
    wrong = [
        f"vision_config.{key} is {vision[key]!r}, expected {value!r}"
        for key, value in expected.items()
        if vision.get(key, value) != value
    ]
    if text.get("layer_norm_eps", 1e-5) != 1e-5:
        wrong.append(f"text_config.layer_norm_eps is {text['layer_norm_eps']}, expected 1e-05")
    act = text.get("hidden_act", "quick_gelu")
    if act not in ACTIVATIONS:
        wrong.append(f"text_config.hidden_act is {act!r}, expected one of {list(ACTIVATIONS)}")
    if wrong:
        raise CheckpointError(
            f"{folder} holds a GroupViT that is not computed here: {'; '.join(wrong)}"
        )
