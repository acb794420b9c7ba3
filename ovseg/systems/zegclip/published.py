"""The published checkpoint of ZegCLIP: its names, what it never uses, and the sizes that it tells.

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
_FIRST = "backbone.prompt_embeddings"  # of block 0
_DEEP = "backbone.deep_prompt_embeddings"  # of the others
_PROMPTS = "prompts.embeddings"
_POSITIONS = "backbone.positional_embedding"
_UNUSED = "decode_head.loss_decode.criterion.empty_weight"
_ALONE = "backbone.clip.logit_scale"  # of our names, what a published file does not have
_LAYER = "decode_head.decoder_1.layers."


def to_ours(name: str) -> str:
    """Return our name of a published tensor."""
    for published, ours in _PREFIXES:
        if name.startswith(published):
            return ours + name[len(published) :]
    return name


def to_theirs(name: str) -> str:
    """Invert ``to_ours``."""
    for published, ours in sorted(_PREFIXES, key=lambda pair: -len(pair[1])):
        if name.startswith(ours):
            return published + name[len(ours) :]
    return name


def dead(layers: int, width: int, hidden: int) -> State:
    """Return the tensors of the head that are without effect: weights zero, norms one.

    Args:
        layers: of the decoder.
        width: E.
        hidden: width of its MLPs.
    """
    found: State = {}
    for i in range(layers):
        layer = f"{_LAYER}{i}."
        linear = {"self_attn.out_proj": (width, width)}
        norms = ["norm1"]
        if i == layers - 1:
            norms += ["norm2", "norm3"]
            linear["linear1"] = (hidden, width)
            linear["linear2"] = (width, hidden)
            linear["multihead_attn.v"] = (width, width)
            linear["multihead_attn.proj"] = (width, width)
        found[f"{layer}self_attn.in_proj_weight"] = torch.zeros(3 * width, width)
        found[f"{layer}self_attn.in_proj_bias"] = torch.zeros(3 * width)
        for part, shape in linear.items():
            found[f"{layer}{part}.weight"] = torch.zeros(shape)
            found[f"{layer}{part}.bias"] = torch.zeros(shape[0])
        for part in norms:
            found[f"{layer}{part}.weight"] = torch.ones(width)
            found[f"{layer}{part}.bias"] = torch.zeros(width)
    return found


class Layout(Published):
    """The layout; reading changes a model's prompts and positions to the sizes of the file."""

    def __init__(self) -> None:
        super().__init__(to_ours, to_theirs, MARK, ("text_encoder.",))

    def load(self, model: ZegCLIP, state: State, resize: Any = None) -> list[str]:
        """Load as ``Published.load`` does.

        The model takes the size of the file's pictures unless ``resize`` is given. Files without
        any ``text_encoder.*`` are taken: their classes come as embeddings. A CLIP that the model's
        options name stays named if it is the file's.
        """
        _fit(model, state, positions=resize is None)
        found = _reduced(model, state)
        text = any(name.startswith(self.optional) for name in state)
        strict = Published(
            to_ours, to_theirs, self.mark, (to_theirs(_ALONE),) if text else self.optional
        )
        named = model.options.clip
        before = "" if named is None else model.weights_hash()
        model.options.clip = None  # so that all tensors are looked at
        try:
            lacking = strict.load(model, found, resize)
        finally:
            model.options.clip = named
            if named is not None and model.weights_hash() != before:
                model.options.clip = None
        return [name for name in lacking if name != to_theirs(_ALONE)]

    def state(self, model: ZegCLIP, own: State | None = None) -> State:
        """Return the model's tensors under published names, with those that are without effect."""
        own = torch.nn.Module.state_dict(model)  # the CLIP too, whatever its state dict leaves out
        prompts = own.pop(_PROMPTS)
        found = {to_theirs(name): tensor for name, tensor in own.items() if name != _ALONE}
        unused = torch.ones(model.options.seen_classes + 1)
        unused[-1] = 0.1
        added = {**dead(*_sizes(model)), _UNUSED: unused}
        added = {name: tensor.to(prompts.device, prompts.dtype) for name, tensor in added.items()}
        return {**found, _FIRST: prompts[:1], _DEEP: prompts[1:], **added}


def _fit(model: ZegCLIP, state: State, *, positions: bool) -> None:
    """Give the model the sizes of the file.

    They are those of prompts, the table of positions if ``positions``, and the unused buffer.
    """
    options = model.options
    changed = {}
    first = state.get(_FIRST)
    if first is not None and first.dim() == 3 and first.shape[1] != options.prompts:
        assert model.prompts is not None  # the layout is that of CLIPs
        changed["prompts"] = first.shape[1]
        model.prompts.resize(first.shape[1])
    rows = len(state[_POSITIONS]) if _POSITIONS in state else 0
    side = math.isqrt(max(rows - 1, 0))
    if rows and side * side + 1 != rows:
        raise CheckpointError(
            f"{_POSITIONS} has {rows} rows; expected a class token and a square of patches"
        )
    size = side * model.spec.patch_size
    if positions and rows and size != options.image_size:
        changed["image_size"] = size
        model.backbone.set_image_size(size, "bilinear")
    if _UNUSED in state and len(state[_UNUSED]) - 1 != options.seen_classes:
        changed["seen_classes"] = len(state[_UNUSED]) - 1
    for name, value in changed.items():
        setattr(options, name, value)
    model.config = {**model.config, **changed}


def _reduced(model: ZegCLIP, state: State) -> State:
    """Return the tensors that have an effect, the prompts of all blocks in one."""
    without = {_UNUSED, _FIRST, _DEEP, *dead(*_sizes(model))}
    found = {name: tensor for name, tensor in state.items() if name not in without}
    missing = [name for name in (_FIRST, _DEEP) if name not in state]
    if missing:
        raise CheckpointError(
            f"the checkpoint does not fit {model.name} ({len(missing)} missing: "
            f"{', '.join(missing)})"
        )
    first = state[_FIRST]
    deep = state[_DEEP]
    if first.dim() != 3 or deep.dim() != 3 or first.shape[1:] != deep.shape[1:]:
        raise CheckpointError(
            f"{_FIRST} is {list(first.shape)} and {_DEEP} {list(deep.shape)}; expected [1, T, D] "
            "and [depth - 1, T, D]"
        )
    return {**found, _PROMPTS: torch.cat([first, deep])}


def _sizes(model: ZegCLIP) -> tuple[int, int, int]:
    width = model.backbone.embed_dim
    return len(model.decoder.layers), width, model.options.hidden or 4 * width
