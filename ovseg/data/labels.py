"""Label sets: the classes of a label map, each with the texts that stand for it."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from .label_files import by_number, grouped, read_labels, split_line
from .templates import check_templates, invisible_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelSet:
    """Classes in the order of a label map's integers.

    Attributes:
        names: of the classes.
        texts: for each class what is asked for, at least one text; several are synonyms.
        templates: prompt templates of this set, a name or format strings; None leaves them to the
            model.
    """

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    templates: str | tuple[str, ...] | None = None

    def __post_init__(self):
        if len(self.names) != len(self.texts):
            raise InputError(
                f"names holds {len(self.names)} classes and texts {len(self.texts)}; expected a "
                "group of texts for each name"
            )
        for i, name in enumerate(self.names):
            _check_text(f"labels[{i}]", name)
        for name, group in zip(self.names, self.texts, strict=True):
            for i, text in enumerate(group):
                _check_text(f"text {i} of {name!r}", text)

    @property
    def queries(self) -> list[str]:
        """All texts, class by class."""
        return [text for group in self.texts for text in group]

    @property
    def owners(self) -> list[int]:
        """The class of each query."""
        return [i for i, group in enumerate(self.texts) for _ in group]

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, labels: LabelSet | Mapping[Any, Any] | Sequence[str] | str) -> LabelSet:
        """Make a label set of names, one name, or ``{name: texts}``.

        Names by number, as ``id2label`` and ``label2id`` have them, will do as well. A text that
        stands for several classes counts for the one whose name it is, else for the first; the
        others lose it, which is told. Space around a name or text is left out, and any space inside
        is one blank.

        Raises:
            InputError: for an empty set, a name or text that is no string, blank, or holds a line
                break or another invisible character, a name that occurs twice, numbers with gaps, a
                Python set, which has no order, or a class all of whose texts belong to others.
        """
        if isinstance(labels, LabelSet):
            return labels
        if isinstance(labels, Mapping):
            try:
                labels = by_number(labels) or labels
            except ValueError as error:
                raise InputError(f"labels: {error}") from error
        if isinstance(labels, Mapping):
            names = check_labels(list(labels))
            texts = [
                _texts_of(name, given) for name, given in zip(names, labels.values(), strict=True)
            ]
        else:
            names = check_labels(labels)
            texts = [(name,) for name in names]
        return cls(tuple(names), _one_owner(names, texts))

    @classmethod
    def read(cls, path: str | Path) -> LabelSet:
        """Read a label set from a file.

        ``.txt``: a class on each line, its texts separated by commas or semicolons, the first one
        its name; ``#`` begins a comment at the beginning of a line and after a blank. ``.csv``,
        ``.tsv``: with a header; a column ``name``, and ``idx`` and ``synonyms`` if there are.
        ``.yaml``, ``.json``: a list of names; ``{name: texts}``; ``{id: name}`` or ``{name: id}``;
        or ``{templates: ..., labels: one of these}``.

        Raises:
            InputError: for a file that is missing or of another kind, templates that cannot be, and
                as ``of`` does.
        """
        path = Path(path)
        labels, templates = read_labels(path)
        try:
            if templates is not None:
                check_templates(templates)
            templates = tuple(templates) if isinstance(templates, list) else templates
            return replace(cls.of(labels), templates=templates)
        except InputError as error:
            raise InputError(f"label file {str(path)!r}: {error}") from error

    @classmethod
    def parse(cls, line: str) -> LabelSet:
        """Read a label set from a command line: ``person|man|woman,road``.

        Classes are separated by commas, synonyms by ``|`` or ``;``.

        Raises:
            InputError: for a blank class or synonym, a name in quotation marks, and as ``of`` does.
        """
        return cls.of(grouped(split_line(line)))


def _texts_of(name: str, given: Any) -> tuple[str, ...]:
    """Return what stands for a class: a text, or several; the name where nothing is given."""
    if given is None or given == []:
        return (name,)
    if not isinstance(given, (str, list, tuple)):
        raise InputError(
            f"the texts of {name!r} are a {type(given).__name__}, {given!r}; expected a text or a "
            "list of them"
        )
    texts = []
    for i, text in enumerate([given] if isinstance(given, str) else given):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"text {i} of {name!r} is {text!r}; expected a text that is not blank")
        _check_text(f"text {i} of {name!r}", text)
        texts.append(" ".join(text.split()))
    return tuple(texts)


def _one_owner(
    names: Sequence[str], texts: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], ...]:
    """Give each text to one class; published lists have ``ground`` for earth and for land."""
    owner: dict[str, int] = {}
    for i, name in enumerate(names):
        if name in texts[i]:
            owner[name] = i
    for i, group in enumerate(texts):
        for text in group:
            owner.setdefault(text, i)
    kept = tuple(
        tuple(text for text in dict.fromkeys(group) if owner[text] == i)
        for i, group in enumerate(texts)
    )
    lost = [
        (text, i)
        for i, group in enumerate(texts)
        for text in dict.fromkeys(group)
        if owner[text] != i
    ]
    for text, i in lost:
        if not kept[i]:
            raise InputError(
                f"text {text!r} stands for both {names[owner[text]]!r} and {names[i]!r}, which "
                "has no other; expected one class"
            )
    if lost:
        told = ", ".join(
            f"{text!r} (for {names[owner[text]]!r}, not {names[i]!r})" for text, i in lost[:6]
        )
        logger.warning(
            "%d texts stand for several classes and count for one: %s%s",
            len(lost),
            told,
            ", ..." if len(lost) > 6 else "",
        )
    return kept


def check_labels(labels: Sequence[str] | str) -> list[str]:
    """Return a list of distinct, non-blank labels without invisible characters.

    A single string is one label.
    """
    if isinstance(labels, (set, frozenset)):
        raise InputError(
            "labels is a set, whose order is chance; expected a list: a label map's numbers "
            "follow it"
        )
    if not isinstance(labels, Iterable):
        raise InputError(f"labels is a {type(labels).__name__}; expected a list of names")
    labels = [labels] if isinstance(labels, str) else list(labels)
    if not labels:
        raise InputError('labels is empty; expected at least one name, e.g. labels=["cat"]')
    found: list[str] = []
    seen: dict[str, int] = {}
    for i, label in enumerate(labels):
        if not isinstance(label, str):
            raise InputError(f"labels[{i}] is a {type(label).__name__}; expected a string")
        if not label.strip():
            raise InputError(f"labels[{i}] is blank; expected a name")
        _check_text(f"labels[{i}]", label)
        name = " ".join(label.split())
        key = unicodedata.normalize("NFC", name)  # two ways to write one sign look alike
        if key in seen:
            raise InputError(
                f"labels[{i}] and labels[{seen[key]}] are both {name!r}; expected distinct labels"
            )
        seen[key] = i
        found.append(name)
    return found


def _check_text(what: str, text: str) -> None:
    """Refuse a name or text of a class that is none or holds what nobody sees."""
    if not isinstance(text, str):
        raise InputError(f"{what} is a {type(text).__name__}; expected a string")
    if (hidden := invisible_in(text)) is not None:
        raise InputError(f"{what} is {text!r}, which holds {hidden}; expected a name without it")
