"""The published checkpoint of ZegCLIP: its names, the tensors that it holds and never uses, and the
sizes that it tells.

Over two fifths of its head are dead: self-attention and first norm of all decoder layers are never
called, of the last layer only queries and keys have an effect, and a buffer of the loss is unused.
They are left out on reading and written as zeros and ones, so that files load there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ...errors import CheckpointError
from ...weights.published import Published, State

if TYPE_CHECKING:
    from .model import ZegCLIP

_PREFIXES = (  # published, ours
    ("text_encoder.", "backbone.clip."),
    ("backbone.prompt_proj.", "prompts.proj."),
    ("backbone.prompt_norm.", "prompts.norm."),
    ("backbone.", "backbone.clip.visual."),
    ("decode_head.q_proj.", "descriptor.proj."),
    ("decode_head.decoder_1.", "decoder."),
)
MARK = "decode_head.decoder_1."
_FIRST, _DEEP = (
    "backbone.prompt_embeddings",
    "backbone.deep_prompt_embeddings",
)  # of block 0, of the others
_PROMPTS, _POSITIONS = "prompts.embeddings", "backbone.positional_embedding"
_UNUSED = "decode_head.loss_decode.criterion.empty_weight"
_ALONE = "backbone.clip.logit_scale"  # of our names, what a published file does not have
_LAYER = "decode_head.decoder_1.layers."


def to_ours(name: str) -> str:
    for published, ours in _PREFIXES:
        if name.startswith(published):
            return ours + name[len(published) :]
    return name


def to_theirs(name: str) -> str:
    """The inverse of ``to_ours``."""
    for published, ours in sorted(_PREFIXES, key=lambda pair: -len(pair[1])):
        if name.startswith(ours):
            return published + name[len(ours) :]
    return name


def dead(layers: int, width: int, hidden: int) -> State:
    """Tensors of the head that are without effect, by published name: weights zero, norms one."""
    found: State = {}
    for i in range(layers):
        layer, last = f"{_LAYER}{i}.", i == layers - 1
        found |= {
            f"{layer}self_attn.in_proj_weight": torch.zeros(3 * width, width),
            f"{layer}self_attn.in_proj_bias": torch.zeros(3 * width),
        }
        linear = {"self_attn.out_proj": (width, width)}
        if last:
            linear |= {
                "linear1": (hidden, width),
                "linear2": (width, hidden),
                "multihead_attn.v": (width, width),
                "multihead_attn.proj": (width, width),
            }
        for part, shape in linear.items():
            found |= {
                f"{layer}{part}.weight": torch.zeros(shape),
                f"{layer}{part}.bias": torch.zeros(shape[0]),
            }
        for part in ("norm1", *(("norm2", "norm3") if last else ())):
            found |= {
                f"{layer}{part}.weight": torch.ones(width),
                f"{layer}{part}.bias": torch.zeros(width),
            }
    return found


class Layout(Published):
    """Of one model: reading changes its prompts and positions to the sizes of the file."""

    def __init__(self) -> None:
        super().__init__(to_ours, to_theirs, MARK, ("text_encoder.",))

    def load(self, model: ZegCLIP, state: State, resize: Any = None) -> list[str]:
        """As ``Published.load``; the model takes the size of the file's pictures unless ``resize``
        is given. Files without any ``text_encoder.*`` are taken: their classes come as
        embeddings.

        A CLIP that the model's options name stays named if it is the file's.
        """
        _fit(model, state, positions=resize is None)
        found = _reduced(model, state)
        text = any(name.startswith(self.optional) for name in state)
        strict = Published(
            to_ours, to_theirs, self.mark, (to_theirs(_ALONE),) if text else self.optional
        )
        named = model.options.clip
        before = "" if named is None else model.clip_hash()
        model.options.clip = None  # so that all tensors are looked at
        try:
            lacking = strict.load(model, found, resize)
        finally:
            if named is not None and model.clip_hash() == before:
                model.options.clip = named
        return [name for name in lacking if name != to_theirs(_ALONE)]

    def state(self, model: ZegCLIP, own: State | None = None) -> State:
        """The model's tensors under their names, with those that are without effect."""
        own = torch.nn.Module.state_dict(model)  # the CLIP too, whatever its state dict leaves out
        prompts = own.pop(_PROMPTS)
        found = {to_theirs(name): tensor for name, tensor in own.items() if name != _ALONE}
        unused = torch.ones(model.options.seen_classes + 1)
        unused[-1] = 0.1
        like = prompts.device, prompts.dtype
        added = {**dead(*_sizes(model)), _UNUSED: unused}
        return {
            **found,
            _FIRST: prompts[:1],
            _DEEP: prompts[1:],
            **{name: tensor.to(*like) for name, tensor in added.items()},
        }


def _fit(model: ZegCLIP, state: State, *, positions: bool) -> None:
    """Prompt tokens, position table if ``positions``, and the unused buffer of the sizes that the
    file has."""
    changed = {}
    if (
        _FIRST in state
        and state[_FIRST].dim() == 3
        and state[_FIRST].shape[1] != model.options.prompts
    ):
        changed["prompts"] = state[_FIRST].shape[1]
        model.prompts.resize(changed["prompts"])
    rows = len(state[_POSITIONS]) if _POSITIONS in state else 0
    side = math.isqrt(max(rows - 1, 0))
    if rows and side * side + 1 != rows:
        raise CheckpointError(
            f"{_POSITIONS} has {rows} rows; expected a class token and a square of patches"
        )
    if positions and rows and side * model.spec.patch_size != model.options.image_size:
        changed["image_size"] = side * model.spec.patch_size
        model.backbone.set_image_size(changed["image_size"], "bilinear")
    if _UNUSED in state and len(state[_UNUSED]) - 1 != model.options.seen_classes:
        changed["seen_classes"] = len(state[_UNUSED]) - 1
    for name, value in changed.items():
        setattr(model.options, name, value)
    model.config = {**model.config, **changed}


def _reduced(model: ZegCLIP, state: State) -> State:
    """Without what is dead, the prompts of all blocks in one, and what a published file never has
    as it is here.
    """
    without = {_UNUSED, *dead(*_sizes(model))}
    found = {
        name: tensor
        for name, tensor in state.items()
        if name not in without and name not in (_FIRST, _DEEP)
    }
    missing = [name for name in (_FIRST, _DEEP) if name not in state]
    if missing:
        raise CheckpointError(
            f"the checkpoint does not fit {model.name} ({len(missing)} missing: "
            f"{', '.join(missing)})"
        )
    first, deep = state[_FIRST], state[_DEEP]
    if first.dim() != 3 or deep.dim() != 3 or first.shape[1:] != deep.shape[1:]:
        raise CheckpointError(
            f"{_FIRST} is {list(first.shape)} and {_DEEP} {list(deep.shape)}; expected [1, T, D] "
            "and [depth - 1, T, D]"
        )
    return {**found, _PROMPTS: torch.cat([first, deep])}


def _sizes(model: ZegCLIP) -> tuple[int, int, int]:
    width = model.backbone.embed_dim
    return len(model.decoder.layers), width, model.options.hidden or 4 * width
