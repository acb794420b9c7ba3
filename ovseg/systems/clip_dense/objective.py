"""CLIP's own objective: the contrast of whole pictures with texts.

It says nothing about where things are.
"""

from __future__ import annotations

import torch.distributed as dist

from ...data.batches import PairBatch
from ..contrast import image_text_contrast
from ..objective import Losses, Objective, Progress, Rows


class ClipDenseObjective(Objective):
    """Radford et al., arXiv:2103.00020."""

    def encode(self, batch: PairBatch, progress: Progress) -> Rows:
        return {
            "image": self.model(self.images(batch)).embedding,
            "text": self.model.encode_text(batch.token_ids),
        }

    def loss(
        self, rows: Rows, batch: PairBatch, progress: Progress, group: dist.ProcessGroup | None
    ) -> Losses:
        return {
            "total": image_text_contrast(
                rows["image"], rows["text"], self.model.logit_scale, batch, group
            )
        }
