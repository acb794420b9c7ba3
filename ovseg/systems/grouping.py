"""What GroupViT and OVSegmentor share: pictures to groups, texts, what is trained.

A system is a folder beside this file.

What the objectives of the grouping systems share: the noise of their grouping blocks, and texts
that are packed by the host.
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
from .base import GroupFeatures, OVSegModel, SystemOptions
from .checks import check_images
from .objective import Progress

PARTS = ["image", "text", "projectors", "scale"]
_CONVOLUTION = re.compile(r"\w+_projector\.linear_(hidden\.0|out)\.weight")


@dataclass
class GroupingSystemOptions(SystemOptions):
    """Attributes:
    trained: all parts as published; OVSegmentor's second stage leaves ``text`` out.
    """

    backbone: dict[str, Any] = field(default_factory=lambda: {"kind": "grouping"})
    trained: list[str] = field(default_factory=lambda: list(PARTS))


class GroupingSystem(OVSegModel):
    """Base of both.

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
        return self.backbone.image

    @property
    def text(self) -> PackedText:
        return self.backbone.text

    @property
    def image_projector(self) -> Projector:
        return self.backbone.image_projector

    @property
    def text_projector(self) -> Projector:
        return self.backbone.text_projector

    def encode_image(self, images: torch.Tensor) -> GroupFeatures:
        """``groups`` [B, G, E] with the soft map of patches to them; a patch's token is that of its
        group.
        """
        check_images(images, self)
        found, image, groups = self.backbone.groups(images)
        index = found.index
        tokens = groups.gather(1, index[..., None].expand(-1, -1, groups.shape[2]))
        return GroupFeatures(image, tokens, found.grid, groups, index, found.soft)

    def parts(self) -> dict[str, list[nn.Parameter]]:
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
        """The published recipes: one rate; what has one dimension and biases without weight decay,
        so scalars with it.
        """
        named = self.trainable
        spared = {name for name, p in named if p.ndim == 1 or name.endswith(".bias")}
        return [
            {
                "params": [p for name, p in named if name not in spared],
                "lr_scale": 1.0,
                "weight_decay": weight_decay,
            },
            {
                "params": [p for name, p in named if name in spared],
                "lr_scale": 1.0,
                "weight_decay": 0.0,
            },
        ]


def linear(state: State) -> State:
    """Published projectors are convolutions of one pixel; these, as linear layers."""
    return {
        name: x[..., 0] if _CONVOLUTION.fullmatch(name) and x.dim() == 3 and x.shape[2] == 1 else x
        for name, x in state.items()
    }


def convolutions(state: State) -> State:
    """The inverse of ``linear``."""
    return {name: x[..., None] if _CONVOLUTION.fullmatch(name) else x for name, x in state.items()}


TEXTS = (
    "token_ids",
    "noun_ids",
    "question_ids",
    "answer_ids",
    "entity_token_ids",
)  # their lengths are sizes of tensors


def group_noises(
    model: GroupingSystem, batch: PairBatch, progress: Progress, name: str = "groups"
) -> list[torch.Tensor]:
    """For each grouping block Gumbel noise that the batch holds, ``name_0`` and on, or what the
    operator draws it from.
    """
    images, found = batch.images, []
    tokens = math.prod(model.image.grid(images.shape[2:]))
    for i, block in enumerate(model.image.groupings):
        use, shape = f"{name}_{i}", (len(images), block.groups, tokens)
        found.append(
            batch.noise[use] if use in batch.noise else progress.noise(images.device, use, shape)
        )
        tokens = block.groups  # which the next one gathers
    return found
