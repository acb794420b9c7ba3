"""The scenes with what their captions name; an entity is "red seven" or "gravel".

Batches hold nouns, questions and answers, or a second scene that shows the same entity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...bounds import bounded
from ...errors import ConfigError
from ..batches import PairBatch
from ..entities import Entities
from ..entity_index import EntityIndex
from ..entity_pairs import GIVES, EntitySample, EntityText, EntityTexts
from ..pair_samples import PairSample
from ..scenes import CAPTIONS_PER_SCENE
from ..templates import NAMES
from . import scenes
from .base import ModelInputs


@dataclass
class Options(EntityText, scenes.Options):
    """Options of the scenes and of ``EntityText``."""

    kind: str = "entity_scenes"
    templates: str = bounded("scenes", one_of=NAMES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.published:
            raise ConfigError(
                "data.published is true; expected false with the scenes: published training masks "
                "single words, and theirs are two"
            )


def create(
    options: Options,
    inputs: ModelInputs,
    *,
    split: str = "train",
    seed: int = 0,
    progress: bool = False,
) -> EntityScenes:
    """Draw the scenes of a split."""
    pairs = scenes.create(options, inputs, split=split, seed=seed, progress=progress)
    return EntityScenes(pairs, inputs, options)


class EntityScenes(scenes.ScenePairs):
    """Pairs of scenes, and more: see ``EntityText``.

    The question and the nouns are of a picture's first text.

    Args:
        pairs: the scenes, drawn.
        inputs: of which the tokenizer is used.
        options: see ``EntityText``.
    """

    def __init__(self, pairs: scenes.ScenePairs, inputs: ModelInputs, options: EntityText):
        self.__dict__.update(vars(pairs))
        words = self.scenes.vocabulary
        entities = Entities(
            dict.fromkeys(words.classes, ()),
            dict(zip(words.classes, words.prompts, strict=True)),
        )
        self.entity_texts = EntityTexts(entities, inputs, options)
        self.batch_type = GIVES[options.gives]  # type: ignore[misc]
        self.published = options.published
        self.index = EntityIndex.of(self.entities.amax(1)) if options.gives == "cross" else None

    def read(self, index: int, rng: torch.Generator) -> EntitySample:
        """Return a scene, what its first caption names, and a partner where there is an index."""
        pair, chosen = self.pair(index, rng)
        texts = self.entity_texts
        every = self.texts[index * CAPTIONS_PER_SCENE : (index + 1) * CAPTIONS_PER_SCENE]
        caption = every[chosen[0]]
        sample = EntitySample(**vars(pair), rows=texts.rows(caption, rng))
        if self.index is not None:
            entity = texts.shared(caption, every, rng)
            assert entity is not None  # every caption of a scene names something
            partner = self.images[self.index.partner(index, entity, rng)]
            sample.rows |= texts.partner_rows(entity, partner)
        return sample

    def collate(self, samples: Sequence[PairSample]) -> PairBatch:
        """Put samples together with what entities add."""
        return self.entity_texts.collate(samples)  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        """Return what was drawn and what is made of the captions."""
        return {**super().describe(), "kind": "entity_scenes", "gives": self.entity_texts.gives}
