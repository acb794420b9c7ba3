"""The rule of semantic units: patches that look alike answer together, in as many units as the
picture has.

    s = (1 - w) cos(p, q) + w cos(m, q)        m the mean of the unit vectors of the patch's unit                (1)

then as the rule of patches goes on. ``adaptive``: neighbouring units become one while their average
link is ``merge_at`` at least (``layers/units.py``), in each window by itself; ``fixed``: ``units``
groups by k-means; ``pixel``: each patch alone, the rule of patches. One label a pixel breaks things
in pieces, a fixed number of groups puts two things in one or one in two: MGCA (arXiv:2403.03707)
names both and asks for units between them. How is not public to us; this is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import InputError
from ...nn.units import cluster, merge, unit_tokens
from ...systems import OVSegModel, PatchFeatures
from ..fields import number, one_of, option, positive
from .patches import PatchArgmax

UNITS = ("adaptive", "fixed", "pixel")


@dataclass(frozen=True)
class SemanticUnits(PatchArgmax):
    """The largest of the patches' scores, which are those of their units too.

    Attributes:
        unit: ``adaptive``, ``fixed`` or ``pixel``.
        merge_at: of adaptive: the least average link of two units that become one, a cosine; None:
            by ``merge_quantile``.
        merge_quantile: of the links of neighbouring patches of a window, which is then
            ``merge_at``.
        units: of fixed, how many.
        unit_weight: w of (1).
    """

    unit: str = option("adaptive", "adaptive, fixed or pixel: which patches answer together")
    merge_at: float | None = option(
        None,
        "adaptive units become one while their average cosine is this (default: by "
        "--merge-quantile)",
    )
    merge_quantile: float = option(
        0.05, "... or this quantile of the cosines of neighbouring patches, picture by picture"
    )
    units: int = option(8, "groups of a window where the unit is fixed")
    unit_weight: float = option(0.5, "weight of a unit's score in that of its patches, 0 to 1")

    def __post_init__(self):
        super().__post_init__()
        one_of(self, "unit", UNITS)
        number(self, "merge_at", -1, 1, "a cosine, -1 .. 1")
        number(self, "merge_quantile", 0, 1, "a share, 0 .. 1")
        number(self, "unit_weight", 0, 1, "a share, 0 .. 1")
        positive(self, "units")
        if self.unit == "fixed" and self.units is None:
            raise InputError("unit is 'fixed' and units is missing; expected a positive integer")

    def cosines(
        self, model: OVSegModel, features: PatchFeatures, texts: torch.Tensor
    ) -> torch.Tensor:
        of_patches = super().cosines(model, features, texts)
        if self.unit == "pixel" or self.unit_weight == 0:
            return of_patches
        means = unit_tokens(features.tokens, self.labels(features))
        of_units = super().cosines(
            model, replace(features, tokens=means.to(features.tokens.dtype)), texts
        )
        return torch.lerp(of_patches, of_units, self.unit_weight)

    def labels(self, features: PatchFeatures) -> torch.Tensor:
        """[n, L] int64 below L, the unit of each patch of each window."""
        tokens = features.tokens
        if self.unit == "adaptive":
            return merge(tokens, features.grid, self.merge_at, quantile=self.merge_quantile)
        if self.unit == "fixed":
            return cluster(tokens, self.units)
        return torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)

    def describe(self) -> dict[str, Any]:
        how = {
            "adaptive": f"adaptive, merged at "
            f"{self.merge_at if self.merge_at is not None else f'quantile {self.merge_quantile:g}'}",
            "fixed": f"{self.units} fixed",
            "pixel": "pixel",
        }[self.unit]
        return {**super().describe(), "units": f"{how}, weight {self.unit_weight:g}"}


Rule = SemanticUnits
