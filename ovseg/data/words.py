"""The words of the scenes, and a tokenizer over known words: what the tiny models read."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from .scenes import ONE_ENTITY, SEVERAL, VOCABULARIES
from .templates import TEMPLATES

PAD, START, END, UNKNOWN = 0, 1, 2, 3
_WORD = re.compile(r"[a-z0-9]+")


def scene_words() -> list[str]:
    """Return all words that captions of the scenes and the tiny templates can hold, sorted."""
    text = " ".join((*ONE_ENTITY, *SEVERAL, *TEMPLATES["scenes"]))
    for slot in ("{list}", "{a}", "{}"):
        text = text.replace(slot, "")
    words = set(_WORD.findall(text.lower())) | {"a", "an", "and", "on"}
    for vocabulary in VOCABULARIES.values():
        words.update(vocabulary.colours, vocabulary.kinds, vocabulary.stuff)
    return sorted(words)


class WordTokenizer:
    """One id per known word; ``[T, context_length]`` int64, padded with 0.

    Unknown words share one id.

    Args:
        words: the known words; by default those of the scenes.
        context_length: longest text in tokens, start and end included; longer texts are cut.

    Attributes:
        end: the id that ends a text.
    """

    end = END

    def __init__(self, words: Sequence[str] | None = None, context_length: int = 16):
        self.words = list(words) if words is not None else scene_words()
        self.context_length = context_length
        self._id = {word: i + UNKNOWN + 1 for i, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        """Ids, special ones included."""
        return UNKNOWN + 1 + len(self.words)

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Return the ids [T, context_length] of texts."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens = [self._id.get(word, UNKNOWN) for word in _WORD.findall(text.lower())]
            tokens = [START, *tokens[: self.context_length - 2], END]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Return which of ``texts`` are longer than the context."""
        return [len(_WORD.findall(text.lower())) > self.context_length - 2 for text in texts]

    def unknown(self, text: str) -> list[str]:
        """Return the words of ``text`` that this tokenizer does not know."""
        return [word for word in _WORD.findall(text.lower()) if word not in self._id]
