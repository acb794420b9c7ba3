"""The contrast of pictures with texts, once for all objectives, exact over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels.distributed import gather_rows

from ..data.batches import PairBatch
from ..data.pair_samples import countable_pairs
from ..nn.tensors import at_least_float32

Similarity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cosine(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """[B, T] of [B, E] and [T, E]."""
    return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def image_text_contrast(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    batch: PairBatch,
    group: dist.ProcessGroup | None,
    similarity: Similarity = cosine,
) -> torch.Tensor:
    """Symmetric InfoNCE of this rank's pictures and texts among those of all ranks; equal ids are
    positives.

    Pictures stay where they are: texts and, where a similarity matrix is needed, their entities are
    gathered.

    Args:
        image: [B, ...], what ``similarity`` takes.
        text: [T, E].
        logit_scale: multiplies the similarity; gets a gradient.
        batch: ids and entities.
        group: of the ranks; None for one process.
        similarity: of all pictures with all texts, [B, T].
    """
    image, text = at_least_float32(image), at_least_float32(text)
    if similarity is cosine and batch.text_entities is None:
        return ok.contrastive_loss(
            image,
            text,
            logit_scale,
            image_ids=batch.image_ids,
            text_ids=batch.text_ids,
            group=group,
        )
    text_ids, entities = batch.text_ids, batch.text_entities
    if group is not None:
        text, text_ids = gather_rows(text, group), gather_rows(text_ids, group)
        entities = None if entities is None else gather_rows(entities, group)
    countable = None
    if entities is not None and batch.image_entities is not None:
        countable = countable_pairs(
            entities, batch.image_entities, batch.image_ids[:, None] == text_ids
        )
    return ok.similarity_contrastive_loss(
        similarity(image, text),
        logit_scale,
        image_ids=batch.image_ids,
        text_ids=text_ids,
        pair_mask=countable,
        group=group,
    )


def mean_of_rows(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Mean of one number a picture [B] over the pictures of all ranks, with the ranks' convention
    of gradients.
    """
    if group is None:
        return values.mean()
    count = values.new_full((), len(values))
    dist.all_reduce(count, group=group)
    return sum_of_rows(values, group) / count


def sum_of_rows(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Their sum, likewise."""
    if group is None:
        return values.sum()
    whole = values.detach().sum()
    dist.all_reduce(whole, group=group)
    share = dist.get_world_size(group) * values.sum()
    return share + (whole - share).detach()
