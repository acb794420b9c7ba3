"""GroupViT: semantic segmentation emerges from text supervision (Xu et al., CVPR 2022).

A ViT in three stages: 196 patches with 64 group tokens, 64 groups with 8, 8 groups; grouping blocks
between them. The picture is the mean over the last groups. ``objectives/groupvit.py`` trains it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...weights.published import Published
from ..base import MAX_SCALE
from ..grouping import GroupingSystem, GroupingSystemOptions
from .published import LAYOUT, NVIDIA, folder_options


@dataclass
class GroupViTOptions(GroupingSystemOptions):
    """Attributes:
    multi_label: whether there is a second temperature, for the contrast with nouns; trained as part
        of ``scale``.
    """

    multi_label: bool = False


class GroupViT(GroupingSystem):
    Options = GroupViTOptions
    objective = "groupvit"
    model_types = {"groupvit": "groupvit_vit_s16"}  # noqa: RUF012
    published_marks = (LAYOUT.mark, NVIDIA.mark)
    options: GroupViTOptions

    def __init__(self, options: GroupViTOptions):
        super().__init__(options)
        self.multi_label_logit_scale = (
            nn.Parameter(torch.tensor(math.log(1 / 0.07))) if options.multi_label else None
        )
        self.train_parts(options.trained)

    @property
    def published(self) -> Published | None:  # type: ignore[override]
        """transformers' layout, of models with GroupViT's own towers."""
        o = self.backbone.options
        return (
            LAYOUT
            if o.text.get("kind", "clip") == "clip"
            and o.local_depth is None
            and o.patch_norm
            and o.pool == "mean"
            else None
        )

    @classmethod
    def folder_options(cls, folder: Path) -> dict[str, Any]:
        return {"backbone": {"kind": "grouping", **folder_options(folder)}}

    @property
    def noun_scale(self) -> torch.Tensor | None:
        """As ``logit_scale``, for the contrast with nouns."""
        return (
            None
            if self.multi_label_logit_scale is None
            else self.multi_label_logit_scale.exp().clamp(max=MAX_SCALE)
        )

    def parts(self) -> dict[str, list[nn.Parameter]]:
        found = super().parts()
        if self.multi_label_logit_scale is not None:
            found["scale"].append(self.multi_label_logit_scale)
        return found
