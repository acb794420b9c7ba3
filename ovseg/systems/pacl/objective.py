"""PACL's objective: the contrast by the compatibility of every text with every picture's patches.

Mukhoti et al., arXiv:2212.04994.
"""

from __future__ import annotations

from typing_extensions import override

from ...data.batches import PairBatch
from ..contrast import image_text_contrast
from ..objective import Losses, Objective, Progress, Ranks, Rows
from .model import PACL


class PACLObjective(Objective):
    """The contrast of all pairs. Patches stay on their rank: only texts travel."""

    takes_features = True
    model: PACL

    @override
    def encode(self, batch: PairBatch, progress: Progress) -> Rows:
        tokens = self.encoded(batch).tokens
        return {"tokens": tokens, "text": self.model.encode_text(batch.token_ids)}

    @override
    def loss(self, rows: Rows, batch: PairBatch, progress: Progress, group: Ranks) -> Losses:
        model = self.model
        total = image_text_contrast(
            rows["tokens"], rows["text"], model.logit_scale, batch, group, model.compatibility
        )
        return {"total": total}
