"""Words that a model with a vocabulary of its own does not know, and what is said about them.

Also what is said where such a model answers in place of the default one.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from ..errors import InputError
from ..systems import DEFAULT_MODEL, PHOTO_MODEL, OVSegModel
from .queries import Queries

_NAMES = 20  # of a vocabulary in a message
logger = logging.getLogger(__name__)


def check_words(model: OVSegModel, queries: Queries) -> None:
    """Refuse words that a model with a vocabulary of its own does not know.

    Another word is the same to it as any other.

    Raises:
        InputError: naming the words that ``model`` does not know.
    """
    words = unknown_words(model, queries)
    if not words:
        return
    tokenizer: Any = model.tokenizer
    shown = ", ".join(words)
    known = f"was trained on synthetic scenes and knows their words: {', '.join(tokenizer.words)}"
    if hasattr(tokenizer, "nearest"):
        shown = ", ".join(map(partial(_with_nearest, tokenizer), words))
        few = ", ".join(tokenizer.words[:_NAMES])
        more = ", ..." if len(tokenizer.words) > _NAMES else ""
        known = f"knows {len(tokenizer.words)} names and what else they are called: {few}{more}"
        known += _where_listed(model)
    ways = f"Any words: -m {DEFAULT_MODEL} (600 MB, once)"
    if model.missing is not None:
        ways = f"It answers in place of {DEFAULT_MODEL}, which knows any words: {model.missing}"
    raise InputError(
        f"{model.name} does not know: {shown}; it {known}. {ways}, or allow_unknown "
        "(--allow-unknown)"
    )


def unknown_words(model: OVSegModel, queries: Queries) -> list[str]:
    """List the words that a model does not know; none of a model that reads any word."""
    tokenizer: Any = model.tokenizer
    if not hasattr(tokenizer, "unknown") or queries.labels is None:
        return []
    texts = (*queries.labels.queries, *queries.background)
    return sorted({word for text in texts for word in tokenizer.unknown(text)})


def tell_stand_in(model: OVSegModel) -> None:
    """Say which model answers in place of the default one, and how to get that."""
    if model.missing is None:
        return
    words = getattr(model.tokenizer, "words", [])
    logger.warning(
        "%s answers, a small bundled model that knows %d names%s: %s, which is better and knows "
        "any words, is not in the cache and cannot be fetched: %s; with a network the same command "
        "fetches it (600 MB, once)",
        PHOTO_MODEL,
        len(words),
        _where_listed(model),
        DEFAULT_MODEL,
        model.missing.why,
    )


def _where_listed(model: OVSegModel) -> str:
    """Say where all words of the bundled model are listed."""
    name, _, tag = PHOTO_MODEL.partition(":")
    bundled = model.name == name and model.source in (name, tag, PHOTO_MODEL)
    return f" (all: ovseg models {name})" if bundled else ""


def _with_nearest(tokenizer: Any, word: str) -> str:
    """Return a word with the known ones that are written most like it."""
    close = tokenizer.nearest(word)
    return f"{word} (nearest: {', '.join(close)})" if close else word
