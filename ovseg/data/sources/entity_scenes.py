"""The scenes with what their captions name: nouns, questions and answers, or a second scene that
shows the same entity.

An entity is what a caption names, "red seven" or "gravel"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ConfigError
from ..batches import PairBatch
from ..entities import Entities
from ..entity_index import EntityIndex
from ..entity_pairs import GIVES, EntitySample, EntityText, EntityTexts
from ..scenes import CAPTIONS_PER_SCENE
from . import scenes
from .base import ModelInputs, PairSample


@dataclass
class Options(EntityText, scenes.Options):
    """Those of both."""

    kind: str = "entity_scenes"
    templates: str = "scenes"


def create(
    options: Options,
    inputs: ModelInputs,
    *,
    split: str = "train",
    seed: int = 0,
    progress: bool = False,
) -> EntityScenes:
    options.check_text()
    if options.published:
        raise ConfigError(
            "data.published is true; expected false with the scenes: published training masks "
            "single words, and "
            "theirs are two"
        )
    return EntityScenes(
        scenes.create(options, inputs, split=split, seed=seed, progress=progress), inputs, options
    )


class EntityScenes(scenes.ScenePairs):
    """Pairs of scenes, and more: see ``EntityText``.

    The question and the nouns are of a picture's first text.

    Args:
        pairs: the scenes, drawn.
    """

    def __init__(self, pairs: scenes.ScenePairs, inputs: ModelInputs, options: EntityText):
        self.__dict__.update(vars(pairs))
        words = self.scenes.vocabulary
        self.entity_texts = EntityTexts(
            Entities(
                dict.fromkeys(words.classes, ()),
                dict(zip(words.classes, words.prompts, strict=True)),
            ),
            inputs,
            options,
        )
        self.batch_type = GIVES[options.gives]  # type: ignore[misc]
        self.published = options.published
        self.index = EntityIndex.of(self.entities.amax(1)) if options.gives == "cross" else None

    def read(self, index: int, rng: torch.Generator) -> EntitySample:
        pair, chosen = self.pair(index, rng)
        every = self.texts[index * CAPTIONS_PER_SCENE : (index + 1) * CAPTIONS_PER_SCENE]
        sample = EntitySample(**vars(pair), rows=self.entity_texts.rows(every[chosen[0]], rng))
        if self.index is not None:
            entity = self.entity_texts.shared(every[chosen[0]], every, rng)
            assert entity is not None  # every caption of a scene names something
            sample.rows |= self.entity_texts.partner_rows(
                entity, self.images[self.index.partner(index, entity, rng)]
            )
        return sample

    def collate(self, samples: Sequence[PairSample]) -> PairBatch:
        return self.entity_texts.collate(samples)  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "kind": "entity_scenes", "gives": self.entity_texts.gives}
