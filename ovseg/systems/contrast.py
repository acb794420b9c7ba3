"""The contrast of pictures with texts, once for all objectives, exact over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

import ovseg_kernels as ok
from ovseg_kernels.distributed import gather_rows

from ..data.batches import PairBatch, TagBatch
from ..data.pair_samples import countable_pairs
from ..nn.tensors import at_least_float32
from .base import cosines

Similarity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def image_text_contrast(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    batch: PairBatch | TagBatch,
    group: dist.ProcessGroup | None,
    similarity: Similarity = cosines,
) -> torch.Tensor:
    """Return symmetric InfoNCE of this rank's pictures and texts among those of all ranks.

    Equal ids are positives. Pictures stay where they are: texts and, where a similarity matrix is
    needed, their entities are gathered. A vocabulary is the same everywhere and need not travel:
    each picture has several positives among its words.

    Args:
        image: [B, ...], what ``similarity`` takes.
        text: [T, E].
        logit_scale: multiplies the similarity; gets a gradient.
        batch: ids and entities, or which words are true.
        group: of the ranks; None for one process.
        similarity: of all pictures with all texts, [B, T].
    """
    image = at_least_float32(image)
    text = at_least_float32(text)
    if isinstance(batch, TagBatch):
        positives = batch.positives
        if batch.weights is not None:
            positives = positives * batch.weights
        return ok.similarity_contrastive_loss(
            similarity(image, text),
            logit_scale,
            positives=positives,
            pair_mask=batch.counted,
            group=group,
        )
    if similarity is cosines and batch.text_entities is None:
        return ok.contrastive_loss(
            image,
            text,
            logit_scale,
            image_ids=batch.image_ids,
            text_ids=batch.text_ids,
            group=group,
        )
    text_ids = batch.text_ids
    entities = batch.text_entities
    if group is not None:
        text = gather_rows(text, group)
        text_ids = gather_rows(text_ids, group)
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
    """Return the mean of one number a picture, [B], over the pictures of all ranks.

    Gradients are for the mean over ranks that follows.
    """
    if group is None:
        return values.mean()
    count = values.new_full((), len(values))
    dist.all_reduce(count, group=group)
    return sum_of_rows(values, group) / count


def sum_of_rows(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the sum of one number a picture, [B], as ``mean_of_rows`` does it."""
    if group is None:
        return values.sum()
    whole = values.detach().sum()
    dist.all_reduce(whole, group=group)
    share = dist.get_world_size(group) * values.sum()
    return share + (whole - share).detach()
