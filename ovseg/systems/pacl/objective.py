"""PACL's objective: the contrast by the compatibility of every text with the patches of every
picture.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

import ovseg_kernels as ok

from ...data.batches import PairBatch
from ..contrast import image_text_contrast
from ..objective import Losses, Objective, Progress, Rows


class PACLObjective(Objective):
    """Mukhoti et al., arXiv:2212.04994. Patches stay on their rank: only texts travel."""

    def encode(self, batch: PairBatch, progress: Progress) -> Rows:
        return {
            "tokens": self.model(self.images(batch)).tokens,
            "text": self.model.encode_text(batch.token_ids),
        }

    def loss(
        self, rows: Rows, batch: PairBatch, progress: Progress, group: dist.ProcessGroup | None
    ) -> Losses:
        def compatibility(tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return ok.patch_text_similarity(tokens, text, temperature=self.model.temperature)

        return {
            "total": image_text_contrast(
                rows["tokens"], rows["text"], self.model.logit_scale, batch, group, compatibility
            )
        }
