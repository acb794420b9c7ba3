"""CLIP's own objective: the contrast of whole pictures with texts.

Radford et al., arXiv:2103.00020. It says nothing about where things are.
"""

from __future__ import annotations

from typing_extensions import override

from ...data.batches import PairBatch, TagBatch
from ..contrast import image_text_contrast
from ..objective import Losses, Objective, Progress, Ranks, Rows


class ClipDenseObjective(Objective):
    """The contrast of all pairs of the batch."""

    batch_types = (PairBatch, TagBatch)
    takes_features = True

    @override
    def encode(self, batch: PairBatch | TagBatch, progress: Progress) -> Rows:
        image = self.encoded(batch).embedding
        return {"image": image, **self.own_texts(batch)}

    @override
    def loss(
        self, rows: Rows, batch: PairBatch | TagBatch, progress: Progress, group: Ranks
    ) -> Losses:
        scale = self.model.logit_scale
        text = self.all_texts(rows, batch)
        return {"total": image_text_contrast(rows["image"], text, scale, batch, group)}
