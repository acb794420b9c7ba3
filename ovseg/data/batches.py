"""Batches, one dataclass a kind of supervision; an objective says which kind it takes.

Images are uint8 until they are on the device, where the objective normalises them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

_B = TypeVar("_B", bound="Batch")


@dataclass
class StoredFeatures:
    """Features that a frozen image tower gave of pictures, as a cache keeps them.

    Attributes:
        tokens: [B, N, D] float16, row-major over ``grid``.
        embedding: [B, E] float16.
        grid: (h, w), with h w = N.
    """

    tokens: torch.Tensor
    embedding: torch.Tensor
    grid: tuple[int, int]


@dataclass
class Batch:
    """Base of the kinds.

    Attributes:
        images: [B, 3, H, W] uint8 pixels, or floats that ``model.normalize`` made; [B, 3, 0, 0]
            where ``features`` stand in their place.
        skipped: what could not be read and was replaced, one line each.
        features: what the frozen tower of the model gave of the pictures, None where it is yet to
            see them.
    """

    images: torch.Tensor
    skipped: tuple[str, ...] = field(default=(), kw_only=True)
    features: StoredFeatures | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.images)

    def _mapped(self: _B, function: Any, but: Collection[str] = ()) -> _B:
        """Apply a function to all tensors, ``but`` those of these fields."""

        def over(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return function(value)
            if isinstance(value, dict):
                return {key: over(one) for key, one in value.items()}
            if isinstance(value, StoredFeatures):
                return replace(value, tokens=over(value.tokens), embedding=over(value.embedding))
            return value

        names = [one.name for one in fields(self) if one.name not in but]
        return replace(self, **{name: over(getattr(self, name)) for name in names})

    def split(self: _B, parts: int) -> list[_B]:
        """Split into neighbouring parts, as equal as can be; texts and other rows likewise."""
        return [
            self._mapped(lambda x, part=part: x.tensor_split(parts)[part]) for part in range(parts)
        ]

    def to(self: _B, device: torch.device | str, but: Collection[str] = ()) -> _B:
        """Copy all tensors to the device, ``but`` those of these fields."""
        return self._mapped(lambda x: x.to(device, non_blocking=True), but)

    def pin_memory(self: _B) -> _B:
        """Copy all tensors to pinned memory."""
        return self._mapped(lambda x: x.pin_memory())


@dataclass
class PairBatch(Batch):
    """Pictures and texts of one rank.

    Attributes:
        token_ids: [T, L] int64; several texts may belong to one picture.
        image_ids, text_ids: [B], [T] int64, unique over all ranks: picture and text of one id are a
            positive pair.
        image_entities, text_entities: [B, K], [T, K] 0/1, what all captions of a picture name and
            what a text names among K entities: a text of which everything is named by another
            picture's captions is no negative of it. None: every other pair is a negative.
        segments: [B, L] int64, the superpixel of each patch.
        noise: random tensors given from outside, by name, the first dimension over pictures; drawn
            where they are missing.
    """

    token_ids: torch.Tensor
    image_ids: torch.Tensor
    text_ids: torch.Tensor
    image_entities: torch.Tensor | None = None
    text_entities: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    noise: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class MaskBatch(Batch):
    """Pictures with masks.

    Attributes:
        masks: [B, H, W] int64, class indices; ``ignore_index`` where there is no label.
        ignore_index: of the masks.
    """

    masks: torch.Tensor
    ignore_index: int = 255


@dataclass
class TagBatch(Batch):
    """Pictures and the words that are true of them.

    Attributes:
        token_ids: [W, L] int64, the whole vocabulary, the same in every part and on every rank.
        positives: [B, W] bool, whether a word is true of a picture.
        counted: [B, W] bool, whether it is known which: a word that is neither true nor known to be
            false is no negative either. Positives are counted.
        weights: [W] floats, how much each word counts among those that are true of a picture; None:
            all alike.
    """

    token_ids: torch.Tensor
    positives: torch.Tensor
    counted: torch.Tensor
    weights: torch.Tensor | None = None

    def split(self, parts: int) -> list[TagBatch]:
        """Split the pictures into neighbouring parts; each has the whole vocabulary."""
        return [
            self._mapped(
                lambda x, part=part: x.tensor_split(parts)[part], but=("token_ids", "weights")
            )
            for part in range(parts)
        ]


@dataclass
class CrossImageBatch(PairBatch):
    """Pairs whose pictures come two by two.

    Attributes:
        partner: uint8 [B, 3, H, W], pictures that show the entity which both share.
        entity_ids: [B] int64, the shared entity.
    """

    partner: torch.Tensor = field(kw_only=True)
    entity_ids: torch.Tensor = field(kw_only=True)


@dataclass
class NounBatch(PairBatch):
    """Pairs, one text a picture, with what GroupViT's multi-label contrast asks for beside them.

    Attributes:
        noun_ids: [B, K, L] int64, K prompted nouns of each caption; the caption itself in place of
            nouns that it does not have.
    """

    noun_ids: torch.Tensor = field(kw_only=True)


@dataclass
class EntityBatch(PairBatch):
    """Pairs for OVSegmentor's masked entities: a question and an answer of one caption a picture.

    Texts are padded with 0; how far does not matter.

    Attributes:
        question_ids: [B, L] int64, each caption with ``[MASK]`` in place of every word that names
            an entity. The tokenizers know that word: BERT's has an id for it, the tiny models'
            reads it as an unknown word.
        answer_ids: [B, L] int64, a prompt with the entities of the caption, joined by "and".
        answer_entities: [B, K] 0/1, what each answer names among the K entities of
            ``image_entities``: an answer that is true of another picture is no negative of it.
            None: every other answer is a negative.
    """

    question_ids: torch.Tensor = field(kw_only=True)
    answer_ids: torch.Tensor = field(kw_only=True)
    answer_entities: torch.Tensor | None = field(default=None, kw_only=True)


@dataclass
class CrossEntityBatch(EntityBatch, CrossImageBatch):
    """Masked entities and pictures two by two: the second stage of OVSegmentor.

    Attributes:
        entity_token_ids: [B, L] int64, "A photo of ..." with the entity that picture and partner
            share.
    """

    entity_token_ids: torch.Tensor = field(kw_only=True)
