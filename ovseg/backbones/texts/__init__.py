"""Text towers of the grouping systems by kind: ``bert`` (transformers), ``clip`` (a causal transformer over byte pairs), ``words`` (of the
tiny models). All run packed: padding costs nothing."""

from __future__ import annotations

from typing import Any

from ...options import options_of
from .base import PackedText, TextStates
from .clip import ClipText, ClipTextOptions
from .words import Words, WordsOptions

__all__ = ["KINDS", "PackedText", "TextStates", "build_text"]
KINDS = ("bert", "clip", "words")


def build_text(kind: str = "clip", **options: Any) -> PackedText:
    """A text tower of random weights, or with those that its options name."""
    if kind not in KINDS:
        raise ValueError(f"text.kind is {kind!r}; expected one of {list(KINDS)}")
    if kind == "bert":
        from .bert import Bert, BertOptions  # transformers

        return Bert(options_of(BertOptions, options, "text"))
    if kind == "clip":
        return ClipText(options_of(ClipTextOptions, options, "text"))
    return Words(options_of(WordsOptions, options, "text"))
