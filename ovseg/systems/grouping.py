"""The parts that GroupViT and OVSegmentor share.

The model: pictures to groups, texts, what is trained; the layout of published projectors; and for
their objectives the noise of the grouping blocks, and texts that the host packs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..data.batches import PairBatch
from ..nn.grouping_towers import GroupingBackbone, GroupingViT, Projector
from ..nn.text import PackedText
from ..weights.published import State
from .base import GroupFeatures, OVSegModel, SystemOptions, parameter_group
from .checks import check_images
from .objective import Progress

PARTS = ["image", "text", "projectors", "scale"]
TEXTS = (  # of a batch; their lengths are sizes of tensors
    "token_ids",
    "noun_ids",
    "question_ids",
    "answer_ids",
    "entity_token_ids",
)
_CONVOLUTION = re.compile(r"\w+_projector\.linear_(hidden\.0|out)\.weight")


@dataclass
class GroupingSystemOptions(SystemOptions):
    """Options of both systems.

    Attributes:
        trained: all parts as published; OVSegmentor's second stage leaves ``text`` out.
    """

    backbone: dict[str, Any] = field(default_factory=lambda: {"kind": "grouping"})
    trained: list[str] = field(default_factory=lambda: list(PARTS))


class GroupingSystem(OVSegModel):
    """Base of both systems.

    Its backbone is a ``GroupingBackbone``, whose towers and projectors objectives call by
    themselves.
    """

    Options = GroupingSystemOptions
    decision = "groups"
    backbone: GroupingBackbone

    def __init__(self, options: GroupingSystemOptions):
        super().__init__(options)
        if not isinstance(self.backbone, GroupingBackbone):
            raise ValueError(
                f"backbone.kind is {options.backbone.get('kind')!r}; expected 'grouping'"
            )

    @property
    def image(self) -> GroupingViT:
        """The image tower."""
        return self.backbone.image

    @property
    def text(self) -> PackedText:
        """The text tower."""
        return self.backbone.text

    @property
    def image_projector(self) -> Projector:
        """The map of groups into the space where they meet texts."""
        return self.backbone.image_projector

    @property
    def text_projector(self) -> Projector:
        """The map of texts into that space."""
        return self.backbone.text_projector

    def encode_image(self, images: torch.Tensor) -> GroupFeatures:
        """Return ``groups`` [B, G, E] with the soft map of patches to them.

        A patch's token is that of its group.
        """
        check_images(images, self)
        found, image, groups = self.backbone.groups(images)
        index = found.index
        tokens = groups.gather(1, index[..., None].expand(-1, -1, groups.shape[2]))
        return GroupFeatures(image, tokens, found.grid, groups, index, found.soft)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return image and text tower, both projectors, and the scale."""
        projectors = [*self.image_projector.parameters(), *self.text_projector.parameters()]
        return {
            "image": list(self.image.parameters()),
            "text": self.text.trained_parameters(),
            "projectors": projectors,
            "scale": [self.backbone.logit_scale],
        }

    def parameter_groups(
        self, lr: float, weight_decay: float, lower_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Return groups as the published recipes have them: one rate.

        What has one dimension, and biases, is without weight decay; so scalars are with it.
        """
        named = self.trainable
        spared = {name for name, p in named if p.ndim == 1 or name.endswith(".bias")}
        return [
            parameter_group([p for name, p in named if name not in spared], weight_decay),
            parameter_group([p for name, p in named if name in spared], 0.0),
        ]


def linear(state: State) -> State:
    """Turn the projectors of a published file, convolutions of one pixel, into linear layers."""
    return {
        name: x[..., 0] if _CONVOLUTION.fullmatch(name) and x.dim() == 3 and x.shape[2] == 1 else x
        for name, x in state.items()
    }


def convolutions(state: State) -> State:
    """Turn linear layers of projectors into convolutions of one pixel."""
    return {name: x[..., None] if _CONVOLUTION.fullmatch(name) else x for name, x in state.items()}


def group_noises(
    model: GroupingSystem, batch: PairBatch, progress: Progress, name: str = "groups"
) -> list[torch.Tensor]:
    """Return Gumbel noise for each grouping block, or what the operator draws it from.

    Args:
        model: with the blocks.
        batch: may hold the noise, as ``name_0`` and on.
        progress: what it is drawn by otherwise.
        name: the use of the noise.
    """
    images = batch.images
    found = []
    tokens = math.prod(model.image.grid(images.shape[2:]))
    for i, block in enumerate(model.image.groupings):
        use = f"{name}_{i}"
        shape = (len(images), block.groups, tokens)
        given = batch.noise.get(use)
        found.append(progress.noise(images.device, use, shape) if given is None else given)
        tokens = block.groups  # which the next one gathers
    return found
