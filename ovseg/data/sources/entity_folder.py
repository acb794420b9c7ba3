"""A folder of pairs with what their captions name, by a list of entities.

Batches hold nouns, questions and answers, or a second picture of the entity. Pictures two by two
need the side file of ``ovseg data cross-pairs``, and are those that have an entity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ConfigError, DataError
from ..batches import PairBatch
from ..entities import load_entities
from ..entity_index import EntityIndex, read_index
from ..entity_pairs import GIVES, EntitySample, EntityText, EntityTexts
from ..pair_samples import PairSample
from . import folder
from .base import ModelInputs


@dataclass
class Options(EntityText, folder.Options):
    """Options of a folder, of ``EntityText``, and of the list of entities.

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
    """Open the folder, the list of entities and, for pictures two by two, the index."""
    cross = options.gives == "cross"
    if options.index is None and cross:
        raise ConfigError(
            "data.index is null; with data.gives=cross expected a file of ovseg data cross-pairs"
        )
    pairs = folder.create(options, inputs, split=split, seed=seed, progress=progress)
    texts = EntityTexts(load_entities(options.entities), inputs, options)
    index = (
        read_index(options.index, pairs.names, texts.entities) if options.index and cross else None
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
        self.entity_texts = texts
        self.index = index
        self.batch_type = GIVES[texts.gives]  # type: ignore[misc]
        self.chosen = None if index is None else index.pictures()

    def __len__(self) -> int:
        return super().__len__() if self.chosen is None else len(self.chosen)

    def read(self, index: int, rng: torch.Generator) -> EntitySample:
        """Read a pair, what its first caption names, and the partner where there is an index."""
        number = index if self.chosen is None else int(self.chosen[index])
        pair, every, chosen = self.pair(number, rng)
        texts = self.entity_texts
        caption = every[chosen[0]]
        sample = EntitySample(**vars(pair), rows=texts.rows(caption, rng))
        if "answer_entities" in sample.rows:
            sample.image_entities = texts.named(every)
        if self.index is not None:
            entity = texts.shared(caption, every, rng)
            if entity is None:
                raise DataError(
                    f"captions of {self.names[number]} name no entity, and did when they were "
                    "indexed; expected ovseg data cross-pairs to be run again"
                )
            partner = self.picture(self.index.partner(number, entity, rng), rng)[0]
            sample.rows |= texts.partner_rows(entity, partner)
        return sample

    def identity(self, *, progress: bool = False) -> str:
        """Return digits of the files, and of which of them are read."""
        chosen = b"" if self.chosen is None else self.chosen.tobytes()
        which = hashlib.blake2b(chosen, digest_size=8).hexdigest()
        return f"{super().identity(progress=progress)} {which}"

    def collate(self, samples: Sequence[PairSample]) -> PairBatch:
        """Put samples together with what entities add."""
        return self.entity_texts.collate(samples)  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        """Return where the pairs lie and what is made of their captions."""
        texts = self.entity_texts
        return {
            **super().describe(),
            "kind": "entity_folder",
            "pictures": len(self),
            "gives": texts.gives,
            "entities": len(texts.entities),
        }
