"""Pairs with what entities add: nouns for GroupViT, questions and answers for OVSegmentor, a
partner that shows the same entity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ConfigError, InputError
from .batches import CrossEntityBatch, EntityBatch, NounBatch, PairBatch
from .entities import Entities
from .sampling import integer, some
from .sources.base import ModelInputs, PairSample, collate_pairs
from .templates import templates

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

    gives: str = "masked"
    nouns: int = 3
    templates: str = "clip80"
    published: bool = False

    def check_text(self) -> None:
        """ConfigError for what means nothing."""
        if self.gives not in GIVES:
            raise ConfigError(f"data.gives is {self.gives!r}; expected one of {list(GIVES)}")
        try:
            templates(self.templates)
        except InputError as error:
            raise ConfigError(f"data.{error}") from error


@dataclass
class EntitySample(PairSample):
    """A pair with more: ``rows``, by the names of the batch's attributes, one row of each."""

    rows: dict[str, torch.Tensor] = field(default_factory=dict)


class EntityTexts:
    """Makes them.

    Args:
        entities: what may be named.
        inputs: of which the tokenizer is used.
        options: see ``EntityText``.
    """

    def __init__(self, entities: Entities, inputs: ModelInputs, options: EntityText):
        options.check_text()
        self.entities, self.inputs, self.options = entities, inputs, options
        self.gives, self.templates = options.gives, templates(options.templates)

    def named(self, texts: Sequence[str]) -> torch.Tensor:
        """[K] uint8: what any of them names."""
        found = torch.zeros(len(self.entities), dtype=torch.uint8)
        found[[mention.index for text in texts for mention in self.entities.find(text)]] = 1
        return found

    def rows(self, caption: str, rng: torch.Generator) -> dict[str, torch.Tensor]:
        """What is made of a caption alone."""
        if self.gives == "nouns":
            found = list(dict.fromkeys(mention.index for mention in self.entities.find(caption)))
            chosen = (
                [found[i] for i in some(rng, min(self.options.nouns, len(found)), len(found))]
                if found
                else []
            )
            said = [self._template(rng).format(self.entities.phrases[index]) for index in chosen]
            return {
                "noun_ids": self.inputs.tokenize(
                    said + [caption] * (self.options.nouns - len(said))
                )
            }
        published = self.options.published
        question, indices = self.entities.question(caption, published=published)
        answer = self.entities.answer(indices, self._template(rng), published=published)
        ids = self.inputs.tokenize([question, answer])
        rows = {"question_ids": ids[0], "answer_ids": ids[1]}
        if not published:
            rows["answer_entities"] = torch.zeros(len(self.entities), dtype=torch.uint8)
            rows["answer_entities"][indices] = 1
        return rows

    def shared(self, caption: str, texts: Sequence[str], rng: torch.Generator) -> int | None:
        """An entity to look for a partner by: of the caption, else of any text of the picture; None
        if nothing is named.
        """
        for some_texts in ([caption], texts):
            found = list(
                dict.fromkeys(
                    mention.index for text in some_texts for mention in self.entities.find(text)
                )
            )
            if found:
                return found[integer(rng, 0, len(found))]
        return None

    def partner_rows(self, entity: int, partner: torch.Tensor) -> dict[str, torch.Tensor]:
        prompt = self.inputs.tokenize([_SHARED.format(self.entities.phrases[entity])])[0]
        return {"partner": partner, "entity_ids": torch.tensor(entity), "entity_token_ids": prompt}

    def collate(self, samples: Sequence[EntitySample]) -> PairBatch:
        """A batch of the kind that ``gives`` says."""
        rows: dict[str, Any] = {
            name: torch.stack([sample.rows[name] for sample in samples]) for name in samples[0].rows
        }
        for name in rows:
            if name.endswith("token_ids") or name in ("noun_ids", "question_ids", "answer_ids"):
                used = (rows[name] != 0).flatten(0, -2).any(0).nonzero()
                rows[name] = rows[name][..., : int(used[-1]) + 1 if len(used) else 1].contiguous()
        return GIVES[self.gives](**vars(collate_pairs(samples)), **rows)

    def _template(self, rng: torch.Generator) -> str:
        return self.templates[integer(rng, 0, len(self.templates))]
