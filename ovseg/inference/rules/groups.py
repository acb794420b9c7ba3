"""The rule of grouping systems: a pixel takes the class of the group that owns it.

    P_gt = softmax_T(s e_g . t) * softmax_K(s e_g . t)                                           (1)
    background: 1 where max_T P_g < min(background_threshold, max_gT P), else 0                  (2)
    z(pixel) = row of its group in each window, their mean on the canvas, resized to the picture (3)
    label = class of argmax (z + bias), -1 where the background is the largest                   (4)

K in (1) are the ``top_classes`` texts that are the most similar to the embedding of the window.
Sources: GroupViT (arXiv:2202.11094), SegCLIP (arXiv:2211.14813), OVSegmentor (arXiv:2301.09121).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import ovseg_kernels as ok

from ...bounds import POSITIVE, Bound, bounded
from ...errors import InputError
from ...nn.tensors import at_least_float32
from ...systems import GroupFeatures
from .base import BIAS, SCALE, Decision, take_back


@dataclass(frozen=True)
class GroupTables(Decision):
    """The class of the pixel's group; each field says what it does."""

    scale: float | None = bounded(
        None, SCALE, "multiplies the cosines (groups: the model's own logit scale)"
    )
    top_classes: int = bounded(
        5, POSITIVE, "only so many texts, the most similar to the whole window, may label a group"
    )
    background_threshold: float | None = bounded(
        None,
        Bound(low=0, high=1, form="one", expected="what group tables hold, 0 .. 1"),
        "groups whose best label scores less get none: relative to the window's best group, 0 to 1",
    )
    bias: dict[str, float] | None = bounded(None, BIAS)

    def label_map(self, model, features, queries, placement, *, allowed=None, picture=None):
        """Label by (1) to (4); see ``Decision``."""
        if not isinstance(features, GroupFeatures):
            raise InputError(
                f"the features of {model.name} hold no groups; expected a model that gathers "
                "patches in groups"
            )
        tables = group_tables(
            features,
            queries.texts,
            model.logit_scale if self.scale is None else self.scale,
            self.top_classes,
            self.background_threshold,
        )
        owners = queries.owners
        offsets = queries.offsets(self.bias, allowed, tables.dtype)
        if self.background_threshold is not None:
            owners = F.pad(owners, (1, 0), value=-1)
            offsets = None if offsets is None else F.pad(offsets, (1, 0))
        origins, *sizes = placement.windows
        labels, value = ok.window_argmax(
            features.soft.unflatten(2, features.grid),
            origins,
            *sizes,
            tables=tables,
            class_labels=owners,
            bias=offsets,
            label_type=queries.label_type,
            return_value=True,
        )
        take_back(labels, value, allowed=allowed)
        return labels, value

    def background_rules(self) -> list[str]:
        """Name the threshold of (2)."""
        limit = self.background_threshold
        return [] if limit is None else [f"the winner scores below {limit}"]

    def describe(self) -> dict[str, Any]:
        """Describe every choice."""
        scale = "the model's logit scale" if self.scale is None else f"{self.scale:g}"
        return {
            "scores": f"group tables, cosines times {scale}, the {self.top_classes} best texts of "
            "the window",
            "bias": self.bias or {},
        }


def group_tables(
    features: GroupFeatures,
    texts: torch.Tensor,
    scale: float | torch.Tensor,
    top: int,
    background_threshold: float | None,
) -> torch.Tensor:
    """Return what each class scores in each group of each window, (1): [n, G, T].

    With a threshold it is [n, G, 1 + T], the background of (2) first.
    """
    groups, embedding, texts = (
        F.normalize(at_least_float32(x), dim=-1)
        for x in (features.groups, features.embedding, texts)
    )
    logits = scale * groups @ texts.T
    of_window = embedding @ texts.T
    kept = of_window.topk(min(top, len(texts)), dim=-1).indices
    among = torch.full_like(of_window, -torch.inf).scatter(1, kept, 0.0)
    table = logits.softmax(-1) * (logits + among[:, None]).softmax(-1)
    if background_threshold is None:
        return table
    limit = table.amax((1, 2)).clamp(max=background_threshold)
    return torch.cat([(table.amax(-1) < limit[:, None])[..., None].to(table.dtype), table], -1)


Rule = GroupTables
