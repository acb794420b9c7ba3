"""The rule of semantic units: patches that look alike answer together.

There are as many units as the picture has.

    s = (1 - w) cos(p, q) + w cos(m, q)                                                          (1)

m is the mean of the unit vectors of the patch's unit; then it goes on as the rule of patches does.
``adaptive``: neighbouring units become one while their average link is ``merge_at`` at least
(``nn/units.py``), in each window by itself; ``fixed``: ``units`` groups by k-means; ``pixel``: each
patch alone, the rule of patches. One label a pixel breaks things in pieces, a fixed number of
groups puts two things in one or one in two: MGCA (arXiv:2403.03707) names both and asks for units
between them. How is not public to us; this is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...bounds import POSITIVE, Bound, bounded, choice
from ...errors import InputError
from ...nn.units import cluster, merge, unit_tokens
from ...systems import OVSegModel, PatchFeatures
from .base import SHARE
from .patches import PatchArgmax


@dataclass(frozen=True)
class SemanticUnits(PatchArgmax):
    """The largest of the patches' scores, which are those of their units too."""

    unit: str = bounded(
        "adaptive",
        choice("adaptive", "fixed", "pixel"),
        "adaptive, fixed or pixel: which patches answer together",
    )
    merge_at: float | None = bounded(
        None,
        Bound(low=-1, high=1, form="one", expected="a cosine, -1 .. 1"),
        "adaptive units become one while their average cosine is this (default: by "
        "--merge-quantile)",
    )
    merge_quantile: float = bounded(
        0.05,
        SHARE,
        "... or this quantile of the cosines of neighbouring patches, picture by picture",
    )
    units: int = bounded(8, POSITIVE, "groups of a window where the unit is fixed")
    unit_weight: float = bounded(
        0.5, SHARE, "weight of a unit's score in that of its patches, 0 to 1"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit == "fixed" and self.units is None:
            raise InputError("unit is 'fixed' and units is missing; expected a positive integer")

    def cosines(
        self, model: OVSegModel, features: PatchFeatures, texts: torch.Tensor
    ) -> torch.Tensor:
        """Return (1), [n, T, h, w]."""
        of_patches = super().cosines(model, features, texts)
        if self.unit == "pixel" or self.unit_weight == 0:
            return of_patches
        means = unit_tokens(features.tokens, self.labels(features))
        of_units = super().cosines(
            model, replace(features, tokens=means.to(features.tokens.dtype)), texts
        )
        return torch.lerp(of_patches, of_units, self.unit_weight)

    def labels(self, features: PatchFeatures) -> torch.Tensor:
        """Return the unit of each patch of each window, [n, L] int64 below L."""
        tokens = features.tokens
        if self.unit == "adaptive":
            return merge(tokens, features.grid, self.merge_at, quantile=self.merge_quantile)
        if self.unit == "fixed":
            return cluster(tokens, self.units)
        return torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)

    def describe(self) -> dict[str, Any]:
        """Describe every choice."""
        how = self.unit
        if self.unit == "fixed":
            how = f"{self.units} fixed"
        elif self.unit == "adaptive" and self.merge_at is not None:
            how = f"adaptive, merged at {self.merge_at}"
        elif self.unit == "adaptive":
            how = f"adaptive, merged at quantile {self.merge_quantile:g}"
        return {**super().describe(), "units": f"{how}, weight {self.unit_weight:g}"}


Rule = SemanticUnits
