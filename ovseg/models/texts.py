"""Whether a model reads labels as they were meant: a tokenizer drops signs that it does not know and what is beyond its context."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from ..backbones.base import Tokenizer
from ..errors import InputError

_SHOWN = 3


def _short(label: str) -> str:
    return repr(label if len(label) < 80 else f"{label[:40]} ... {label[-30:]}")


def check_reading(tokenizer: Tokenizer, labels: Sequence[str], owners: Sequence[int], templates: Sequence[str]) -> None:
    """Warn of labels that are cut in some template, and of those that are all alike to a model because it knows few words.

    Args:
        tokenizer: with ``cut(texts)`` it says which texts are longer than its context, with ``unknown(text)`` which words it does not know;
            one without is not asked.
        labels: texts.
        owners: the class of each; those of one class may read the same.
        templates: format strings.

    Raises:
        InputError: for a label that reads as nothing, and for two of different classes that read the same in every template, unless for
            words that the model does not know: ``check_words`` refuses those.
    """
    ids = tokenizer([*labels, ""])
    for label, row in zip(labels, ids[:-1], strict=True):
        if torch.equal(row, ids[-1]):
            raise InputError(f"label {_short(label)} reads as nothing: the model's tokenizer knows none of its signs; expected others, "
                             "or another model")
    context = ids.shape[1]
    cut = _cut(tokenizer, labels, templates, context)
    unknown: Callable[[str], list[str]] = getattr(tokenizer, "unknown", lambda label: [])
    read: dict[bytes, int] = {}
    alike: list[str] = []
    for i, label in enumerate(labels):
        # Only a label that is cut everywhere can end up as another one that differs from it when alone.
        rows = tokenizer([t.replace("{}", label) for t in templates]) if cut[i] == len(templates) else ids[i]
        first = read.setdefault(rows.numpy().tobytes(), i)
        if owners[first] != owners[i] and cut[i] < len(templates) and unknown(label) and unknown(labels[first]):
            alike += [label] if alike else [labels[first], label]
        elif owners[first] != owners[i]:
            raise InputError(f"labels {_short(labels[first])} and {_short(label)} read the same: its tokenizer makes the same tokens "
                             f"of both and reads {context} of them; expected labels that differ to it, or another model")
    named = [f"{_short(label)} (in {n} of {len(templates)} templates)" for label, n in zip(labels, cut, strict=True) if n]
    if named:
        warnings.warn(f"labels are cut, as the model reads {context} tokens: {_listed(named)}", stacklevel=2)
    if alike:
        warnings.warn(f"labels read the same, as the model knows none of their words: {_listed([_short(label) for label in alike])}",
                      stacklevel=2)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _cut(tokenizer: Tokenizer, labels: Sequence[str], templates: Sequence[str], context: int) -> list[int]:
    """In how many templates each label is cut. A token is a byte at least: short texts need not be looked at."""
    found = [0] * len(labels)
    ask = getattr(tokenizer, "cut", None)
    if ask is None:
        return found
    texts = [(i, template.replace("{}", label)) for i, label in enumerate(labels) for template in templates]
    long = [(i, text) for i, text in texts if len(text.encode()) > context - 2]
    for (i, _), is_cut in zip(long, ask([text for _, text in long]) if long else (), strict=True):
        found[i] += is_cut
    return found
