"""A tokenizer over a list of entities: a text becomes the names that stand in it."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import torch

from .entities import Entities, words_of
from .templates import TEMPLATES

# "s" is what a possessive leaves behind its word.
_IGNORED = frozenset(
    {"a", "an", "the", "and", "or", "of", "in", "on", "with", "some", "s"}
    | {word for formats in TEMPLATES.values() for text in formats for word in words_of(text)}
)


class EntityTokenizer:
    """Ids of the entities that a text names, 1 + their indices; [T, context_length] int64.

    Longest names first, in the singular or plural, by any of their synonyms (``Entities.find``).
    Each counts once and the ids are sorted: a text is the set of what it names. 0 is padding.

    Args:
        entities: the names and what else they are called.
        context_length: names of a text that count, the first in it; others are cut.

    Attributes:
        words: the names, in the order of their indices.
    """

    def __init__(self, entities: Entities, context_length: int = 16):
        self.entities = entities
        self.context_length = context_length
        self.words = list(entities.names)

    @property
    def vocab_size(self) -> int:
        """Ids, padding included."""
        return 1 + len(self.words)

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Return the ids [T, context_length] of texts."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            found = sorted(self._named(text)[: self.context_length])
            ids[row, : len(found)] = torch.tensor(found, dtype=torch.int64) + 1
        return ids

    def _named(self, text: str) -> list[int]:
        """Return the indices of what a text names, each once, in its order."""
        return list(dict.fromkeys(mention.index for mention in self.entities.find(text)))

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Return which of ``texts`` name more than the context holds."""
        return [len(self._named(text)) > self.context_length for text in texts]

    def unknown(self, text: str) -> list[str]:
        """Return the words of ``text`` that name nothing, without those of prompts and articles."""
        rest = ""
        at = 0
        for mention in self.entities.find(text):
            rest += f"{text[at : mention.start]} "
            at = mention.end
        return [word for word in words_of(rest + text[at:]) if word not in _IGNORED]

    def nearest(self, word: str, count: int = 3) -> list[str]:
        """Return the names and synonyms that are written most like ``word``."""
        return get_close_matches(word.lower(), self.entities.surface, count, 0.6)
