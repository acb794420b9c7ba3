"""How units of patches cover what is there: too many units a region, and units that hold more than one region.

    over-segmentation    units a region, each unit counted for the region that is the most frequent in it                    (1)
    under-segmentation   share of pixels that are not of their unit's most frequent region                                  (2)
                         share of regions that are the most frequent of no unit                                             (3)

A region is one class's pixels in one picture. (1) is 1, (2) and (3) are 0 where units are the regions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..data.scenes import Scenes
from ..errors import InputError
from ..inference import Predictor
from ..inference.decisions.units import SemanticUnits
from ..models import OVSegModel


@dataclass
class UnitCounts:
    """Sums over pictures: of ``units`` and ``regions`` for (1), ``wrong`` of all ``pixels`` for (2), ``lost`` regions for (3)."""

    pictures: int = 0
    units: int = 0
    regions: int = 0
    wrong: int = 0
    pixels: int = 0
    lost: int = 0

    def update(self, units: np.ndarray, truth: np.ndarray) -> None:
        """One picture: ``units`` and ``truth`` [H, W] integers; truth below 0 is not counted."""
        if units.shape != truth.shape or units.ndim != 2:
            raise InputError(f"units has shape {list(units.shape)} and truth {list(truth.shape)}; expected one [H, W]")
        kept = truth >= 0
        if not kept.any():
            return
        unit, region = (np.unique(x[kept], return_inverse=True)[1].ravel() for x in (units, truth))
        table = np.zeros((unit.max() + 1, region.max() + 1), np.int64)
        np.add.at(table, (unit, region), 1)
        self.pictures += 1
        self.units += table.shape[0]
        self.regions += table.shape[1]
        self.wrong += int((table.sum(1) - table.max(1)).sum())
        self.pixels += int(table.sum())
        self.lost += table.shape[1] - len(np.unique(table.argmax(1)))

    def summary(self) -> dict[str, float]:
        """``units`` a picture, ``units_per_region`` (1), ``impure_pixels`` (2) and ``lost_regions`` (3) in percent."""
        return {"units": round(self.units / max(1, self.pictures), 2),
                "units_per_region": round(self.units / max(1, self.regions), 2),
                "impure_pixels": round(100 * self.wrong / max(1, self.pixels), 2),
                "lost_regions": round(100 * self.lost / max(1, self.regions), 2)}  # fmt: skip


@torch.no_grad()
def count_units(model: OVSegModel, scenes: Scenes, decision: SemanticUnits | None = None) -> UnitCounts:
    """Of the rule's units on scenes seen whole; those of patches are as large as a patch."""
    decision, found = decision or SemanticUnits(), UnitCounts()
    predictor = Predictor(model, decision=decision)
    for i in range(len(scenes)):
        scene = scenes[i]
        features = predictor.see([scene.image])[0].features
        units = decision.labels(features).unflatten(1, features.grid)
        whole = F.interpolate(units[None].float(), scene.mask.shape, mode="nearest")[0, 0]
        found.update(whole.long().cpu().numpy(), scene.mask.astype(np.int64))
    return found
