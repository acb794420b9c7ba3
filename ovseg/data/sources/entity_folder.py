"""A folder of pairs with what their captions name, by a list of entities: nouns, questions and
answers, or a second picture of the entity.

Pictures two by two need the side file of ``ovseg data cross-pairs``, and are those that have an
entity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ConfigError, DataError
from ..batches import PairBatch
from ..entities import load_entities
from ..entity_index import EntityIndex, read_index
from ..entity_pairs import GIVES, EntitySample, EntityText, EntityTexts
from . import folder
from .base import ModelInputs, PairSample


@dataclass
class Options(EntityText, folder.Options):
    """Those of both, and:

    Attributes:
        entities: a list by name, ``everyday``, or a YAML file; see ``data/entities.py``.
        index: side file of ``ovseg data cross-pairs``; needed where ``gives`` is cross, and not
            looked at elsewhere.
    """

    kind: str = "entity_folder"
    entities: str = "everyday"
    index: str | None = None


def create(
    options: Options,
    inputs: ModelInputs,
    *,
    split: str = "train",
    seed: int = 0,
    progress: bool = False,
) -> EntityFolder:
    options.check_text()
    if options.index is None and options.gives == "cross":
        raise ConfigError(
            "data.index is null; with data.gives=cross expected a file of ovseg data cross-pairs"
        )
    pairs = folder.create(options, inputs, split=split, seed=seed, progress=progress)
    texts = EntityTexts(load_entities(options.entities), inputs, options)
    index = (
        None
        if options.index is None or options.gives != "cross"
        else read_index(options.index, pairs.names, texts.entities)
    )
    return EntityFolder(pairs, texts, index)


class EntityFolder(folder.FolderPairs):
    """Pairs of a folder, and more: see ``EntityText``.

    The question and the nouns are of a picture's first text in the batch.
    """

    def __init__(
        self, pairs: folder.FolderPairs, texts: EntityTexts, index: EntityIndex | None = None
    ):
        self.__dict__.update(vars(pairs))
        self.entity_texts, self.index = texts, index
        self.batch_type = GIVES[texts.gives]  # type: ignore[misc]
        self.chosen = None if index is None else index.pictures()

    def __len__(self) -> int:
        return super().__len__() if self.chosen is None else len(self.chosen)

    def read(self, index: int, rng: torch.Generator) -> EntitySample:
        number = index if self.chosen is None else int(self.chosen[index])
        pair, every, chosen = self.pair(number, rng)
        texts, caption = self.entity_texts, every[chosen[0]]
        sample = EntitySample(**vars(pair), rows=texts.rows(caption, rng))
        if "answer_entities" in sample.rows:
            sample.image_entities = texts.named(every)
        if self.index is not None:
            entity = texts.shared(caption, every, rng)
            if entity is None:
                raise DataError(
                    f"captions of {self.names[number]} name no entity, and did when they were "
                    "indexed; expected ovseg data "
                    "cross-pairs to be run again"
                )
            sample.rows |= texts.partner_rows(
                entity, self.picture(self.index.partner(number, entity, rng), rng)[0]
            )
        return sample

    def collate(self, samples: Sequence[PairSample]) -> PairBatch:
        return self.entity_texts.collate(samples)  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        texts = self.entity_texts
        return {
            **super().describe(),
            "kind": "entity_folder",
            "pictures": len(self),
            "gives": texts.gives,
            "entities": len(texts.entities),
        }
