"""OVSegmentor's published checkpoints: names and tensors; DINO's, to begin with.

A file may lack what only training needs: the teacher ``img_encoder_momentum.*``,
``logit_scale_mask``, the decoder of entities ``multimodal_groupingblock.*`` and
``bridge_projector.*``. It may hold them where the model was built for inference or the first stage,
and BERT's table of positions' numbers (``position_ids``), which older versions of transformers
wrote: both are left out. The table of position embeddings may have two dimensions or three. Nothing
else may differ.
"""

from __future__ import annotations

import re

from ...errors import CheckpointError
from ...nn.grouping_towers import GroupingViT
from ...weights.files import check_numbers
from ...weights.published import Published, State
from ..grouping import convolutions, linear

_PREFIXES = (  # theirs, ours
    ("img_encoder_momentum.", "teacher."),
    ("img_encoder.", "backbone.image."),
    ("text_encoder.transformer.", "backbone.text.transformer."),
    ("img_projector.", "backbone.image_projector."),
    ("text_projector.", "backbone.text_projector."),
    ("multimodal_groupingblock.", "entities."),
    ("bridge_projector.", "bridge_projector."),
    ("logit_scale_mask", "logit_scale_mask"),
    ("logit_scale", "backbone.logit_scale"),
)
_TRAINING = (
    "img_encoder_momentum.",
    "logit_scale_mask",
    "multimodal_groupingblock.",
    "bridge_projector.",
)
_POSITIONS = ("img_encoder.pos_embed", "img_encoder_momentum.pos_embed")
_DINO_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_DINO_LEFT_OUT = ("cls_token", "head.", "fc_norm.")


def _renamed(name: str, old: int, new: int) -> str:
    for pair in _PREFIXES:
        if name.startswith(pair[old]):
            return pair[new] + name[len(pair[old]) :]
    return name


def _reshape(state: State) -> State:
    """Make linear layers of convolutions of one pixel, and tables of positions of rank three."""
    return {
        name: tensor[None] if name in _POSITIONS and tensor.dim() == 2 else tensor
        for name, tensor in linear(state).items()
    }


LAYOUT = Published(
    lambda name: _renamed(name, 0, 1),
    lambda name: _renamed(name, 1, 0),
    "text_encoder.transformer.embeddings.",
    _TRAINING,
    surplus=(*_TRAINING, "text_encoder.transformer.embeddings.position_ids"),
    reshape=_reshape,
    restore=convolutions,
)


def load_dino(image: GroupingViT, state: State, where: str) -> None:
    """Load blocks, patches, positions and last norm of DINO's ViT into the image tower.

    Group tokens and grouping blocks stay as they are.

    Raises:
        CheckpointError: for a ViT of another size.
    """
    own = image.state_dict()
    taken = _of_dino(state, len(image.layers[0].blocks))
    expected = [name for name in own if "downsample" not in name and "group_" not in name]
    wrong = sorted(
        name
        for name in {*expected, *taken}
        if name not in taken or name not in expected or own[name].shape != taken[name].shape
    )
    if wrong:
        shapes = [
            f"{name} {list(taken[name].shape) if name in taken else 'missing'}"
            for name in wrong[:4]
        ]
        raise CheckpointError(
            f"{where} does not fit the image tower ({len(wrong)} tensors: {', '.join(shapes)}); "
            f"expected DINO's ViT of width {own['norm.weight'].shape[0]} with as many blocks and "
            "patches"
        )
    check_numbers(where, taken, own)
    same = {name: tensor.to(own[name].dtype) for name, tensor in taken.items()}
    image.load_state_dict({**own, **same})


def _of_dino(state: State, depth: int) -> State:
    """Return DINO's tensors under the image tower's names; ``depth`` blocks are its first stage."""
    taken: State = {}
    for name, tensor in state.items():
        name = re.sub(r"^(module\.|backbone\.)+", "", name)
        if name.startswith(_DINO_LEFT_OUT):
            continue
        block = _DINO_BLOCK.fullmatch(name)
        if block:
            stage = int(int(block[1]) >= depth)
            name = f"layers.{stage}.blocks.{int(block[1]) - depth * stage}.{block[2]}"
        if name == "pos_embed":  # the first is the class token's
            tensor = tensor.reshape(1, -1, tensor.shape[-1])[:, 1:]
        taken[name] = tensor
    return taken
