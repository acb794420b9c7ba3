"""What the objectives of the grouping systems share: the noise of their grouping blocks, and texts that are packed by the host."""

from __future__ import annotations

import math

import torch

from ..data.batch_types import PairBatch
from ..models.grouping import GroupingSystem
from .base import Progress

TEXTS = ("token_ids", "noun_ids", "question_ids", "answer_ids", "entity_token_ids")  # their lengths are sizes of tensors


def group_noises(model: GroupingSystem, batch: PairBatch, progress: Progress, name: str = "groups") -> list[torch.Tensor]:
    """For each grouping block Gumbel noise that the batch holds, ``name_0`` and on, or what the operator draws it from."""
    images, found = batch.images, []
    tokens = math.prod(model.image.grid(images.shape[2:]))
    for i, block in enumerate(model.image.groupings):
        use, shape = f"{name}_{i}", (len(images), block.groups, tokens)
        found.append(batch.noise[use] if use in batch.noise else progress.noise(images.device, use, shape))
        tokens = block.groups  # which the next one gathers
    return found
