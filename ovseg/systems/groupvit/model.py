"""GroupViT: semantic segmentation emerges from text supervision (Xu et al., CVPR 2022).

A ViT in three stages: 196 patches with 64 group tokens, 64 groups with 8, 8 groups; grouping blocks
between them. The picture is the mean over the last groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...weights.published import Published
from ..base import MAX_SCALE
from ..grouping import GroupingSystem, GroupingSystemOptions
from .published import LAYOUT, NVIDIA, folder_options


@dataclass
class GroupViTOptions(GroupingSystemOptions):
    """Options of GroupViT.

    Attributes:
        multi_label: whether there is a second temperature, for the contrast with nouns; trained as
            part of ``scale``.
    """

    multi_label: bool = False


class GroupViT(GroupingSystem):
    """The towers of ``GroupingBackbone``, and where asked for a temperature for nouns."""

    Options = GroupViTOptions
    objective = "groupvit"
    model_types = {"groupvit": "groupvit_vit_s16"}  # noqa: RUF012
    published_marks = (LAYOUT.mark, NVIDIA.mark)
    options: GroupViTOptions

    def __init__(self, options: GroupViTOptions):
        super().__init__(options)
        self.multi_label_logit_scale: nn.Parameter | None = None
        if options.multi_label:
            self.multi_label_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.train_parts(options.trained)

    @property
    def published(self) -> Published | None:  # type: ignore[override]
        """The layout of transformers, for models with GroupViT's own towers."""
        o = self.backbone.options
        patches = o.local_depth is None and o.patch_norm
        own = o.text.get("kind", "clip") == "clip" and patches and o.pool == "mean"
        return LAYOUT if own else None

    @classmethod
    @override
    def folder_options(cls, folder: Path) -> dict[str, Any]:
        return {"backbone": {"kind": "grouping", **folder_options(folder)}}

    @property
    def noun_scale(self) -> Tensor | None:
        """The scale of the contrast with nouns, as ``logit_scale``."""
        scale = self.multi_label_logit_scale
        return None if scale is None else scale.exp().clamp(max=MAX_SCALE)

    @override
    def parts(self) -> dict[str, list[nn.Parameter]]:
        found = super().parts()
        if self.multi_label_logit_scale is not None:
            found["scale"].append(self.multi_label_logit_scale)
        return found
