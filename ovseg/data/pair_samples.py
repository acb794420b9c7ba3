"""Pairs of pictures and texts: a sample, its way into a batch, and which pairs are negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from .batches import PairBatch
from .sources.base import Sample


@dataclass
class PairSample(Sample):
    """One picture with its texts.

    Attributes:
        image: [3, H, W] uint8.
        token_ids: [C, L] int64, C texts.
        id: what picture and texts share, and pairs of other pictures only if they are positives of
            this one.
        image_entities, text_entities: [K], [C, K] uint8, see ``PairBatch``.
        segments: [N] int64, the superpixel of each patch.
    """

    image: torch.Tensor
    token_ids: torch.Tensor
    id: int
    image_entities: torch.Tensor | None = None
    text_entities: torch.Tensor | None = None
    segments: torch.Tensor | None = None


def caption_id(text: str) -> int:
    """Return a 63-bit number of a caption, the same in every process.

    Pictures with one and the same caption are positives of each other.
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def collate_pairs(samples: Sequence[PairSample]) -> PairBatch:
    """Put samples together; texts lie in the order of their pictures."""

    def rows(name: str) -> list[torch.Tensor] | None:
        """Return an attribute of all samples, None if they have none."""
        found = [getattr(sample, name) for sample in samples]
        return None if found[0] is None else found

    image_ids = torch.tensor([sample.id for sample in samples])
    texts_each = torch.tensor([len(sample.token_ids) for sample in samples])
    image_entities = rows("image_entities")
    text_entities = rows("text_entities")
    segments = rows("segments")
    return PairBatch(
        images=torch.stack([sample.image for sample in samples]),
        token_ids=without_padding(torch.cat([sample.token_ids for sample in samples])),
        image_ids=image_ids,
        text_ids=image_ids.repeat_interleave(texts_each),
        image_entities=image_entities and torch.stack(image_entities),
        text_entities=text_entities and torch.cat(text_entities),
        segments=segments and torch.stack(segments),
        skipped=tuple(line for sample in samples for line in sample.skipped),
    )


def without_padding(token_ids: torch.Tensor) -> torch.Tensor:
    """Cut off the columns [..., L] at the end that are padding (0) of every text; one is left."""
    used = (token_ids != 0).flatten(0, -2).any(0).nonzero()
    return token_ids[..., : int(used[-1]) + 1 if len(used) else 1].contiguous()


def countable_pairs(
    text_entities: torch.Tensor, image_entities: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """Return which pairs count in a contrast, [B, T] bool.

    The image's own texts do, and texts that name something which no caption of the image names. A
    foreign text of which everything is named by the image's captions is true of that image by
    accident: it is no negative and is left out. Only captions are looked at, as with real data.

    Args:
        text_entities: [T, K] 0/1, what each text names among K entities.
        image_entities: [B, K] 0/1, what all captions of each image name.
        own: [B, T] bool, which texts are captions of which image.
    """
    unnamed = (1 - image_entities.float()) @ text_entities.float().T
    return own | (unnamed > 0)
