"""Pairs with what entities add.

Nouns for GroupViT, questions and answers for OVSegmentor, a partner that shows the same entity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..bounds import bounded
from .batches import CrossEntityBatch, EntityBatch, NounBatch, PairBatch
from .entities import Entities
from .pair_samples import PairSample, collate_pairs, without_padding
from .sampling import integer, some
from .sources.base import ModelInputs
from .templates import NAMES, templates

GIVES: dict[str, type[PairBatch]] = {
    "nouns": NounBatch,
    "masked": EntityBatch,
    "cross": CrossEntityBatch,
}
_SHARED = "A photo of {}"


@dataclass
class EntityText:
    """How captions are turned into more texts; part of the options of each kind that does.

    Attributes:
        gives: nouns: ``NounBatch``, for GroupViT's multi-label contrast; masked: ``EntityBatch``,
            OVSegmentor's first stage; cross: ``CrossEntityBatch``, its second.
        nouns: of a caption, in a batch.
        templates: a set of ``data/templates.py`` for nouns and answers; one is drawn for each.
        published: words are stripped and answers cut off as in published training
            (``Entities.question``), and a batch does not say which answers are true of other
            pictures.
    """

    gives: str = bounded("masked", one_of=tuple(GIVES))
    nouns: int = bounded(3, low=1, high=100, integer=True)
    templates: str = bounded("clip80", one_of=NAMES)
    published: bool = False


@dataclass
class EntitySample(PairSample):
    """A pair with more.

    Attributes:
        rows: by the names of the batch's attributes, one row of each.
    """

    rows: dict[str, torch.Tensor] = field(default_factory=dict)


class EntityTexts:
    """Makes more texts of captions.

    Args:
        entities: what may be named.
        inputs: of which the tokenizer is used.
        options: see ``EntityText``.
    """

    def __init__(self, entities: Entities, inputs: ModelInputs, options: EntityText):
        self.entities = entities
        self.inputs = inputs
        self.options = options
        self.gives = options.gives
        self.templates = templates(options.templates)

    def named(self, texts: Sequence[str]) -> torch.Tensor:
        """Return what any of the texts names, [K] uint8."""
        return self._marked(self._named_in(texts))

    def rows(self, caption: str, rng: torch.Generator) -> dict[str, torch.Tensor]:
        """Return what is made of a caption alone."""
        if self.gives == "nouns":
            return {"noun_ids": self._nouns(caption, rng)}
        published = self.options.published
        question, indices = self.entities.question(caption, published=published)
        answer = self.entities.answer(indices, self._template(rng), published=published)
        ids = self.inputs.tokenize([question, answer])
        rows = {"question_ids": ids[0], "answer_ids": ids[1]}
        if not published:
            rows["answer_entities"] = self._marked(indices)
        return rows

    def shared(self, caption: str, texts: Sequence[str], rng: torch.Generator) -> int | None:
        """Choose an entity to look for a partner by: of the caption, else of any text.

        Returns:
            Its index; None if nothing is named.
        """
        found = self._named_in([caption]) or self._named_in(texts)
        return found[integer(rng, 0, len(found))] if found else None

    def partner_rows(self, entity: int, partner: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what a partner [3, H, W] adds to a sample, and the prompt for what both show."""
        prompt = self.inputs.tokenize([_SHARED.format(self.entities.phrases[entity])])[0]
        return {"partner": partner, "entity_ids": torch.tensor(entity), "entity_token_ids": prompt}

    def collate(self, samples: Sequence[EntitySample]) -> PairBatch:
        """Make a batch of the kind that ``gives`` says."""
        rows: dict[str, Any] = {
            name: torch.stack([sample.rows[name] for sample in samples]) for name in samples[0].rows
        }
        for name in ("noun_ids", "question_ids", "answer_ids", "entity_token_ids"):
            if name in rows:
                rows[name] = without_padding(rows[name])
        return GIVES[self.gives](**vars(collate_pairs(samples)), **rows)

    def _nouns(self, caption: str, rng: torch.Generator) -> torch.Tensor:
        """Return the ids of prompted nouns; the caption stands for those that it does not have."""
        found = self._named_in([caption])
        wanted = self.options.nouns
        chosen = some(rng, min(wanted, len(found)), len(found)) if found else []
        said = [self._template(rng).format(self.entities.phrases[found[i]]) for i in chosen]
        return self.inputs.tokenize(said + [caption] * (wanted - len(said)))

    def _named_in(self, texts: Sequence[str]) -> list[int]:
        """Return the entities of texts in the order of their first mention, each once."""
        mentions = (mention for text in texts for mention in self.entities.find(text))
        return list(dict.fromkeys(mention.index for mention in mentions))

    def _marked(self, indices: Sequence[int]) -> torch.Tensor:
        found = torch.zeros(len(self.entities), dtype=torch.uint8)
        found[list(indices)] = 1
        return found

    def _template(self, rng: torch.Generator) -> str:
        return self.templates[integer(rng, 0, len(self.templates))]
