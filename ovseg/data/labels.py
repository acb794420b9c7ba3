"""Label sets: the classes of a label map, each with the texts that stand for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class LabelSet:
    """Classes in the order of a label map's integers.

    Attributes:
        names: of the classes.
        texts: for each class what is asked for, at least one text; several are synonyms.
        templates: prompt templates of this set, a name or format strings; None leaves them to the model.
    """

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    templates: str | tuple[str, ...] | None = None

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
    def of(cls, labels: LabelSet | Mapping[str, str | Sequence[str]] | Sequence[str] | str) -> LabelSet:
        """From names, one name, or ``{name: texts}``.

        Raises:
            InputError: for an empty set, a name or text that is no string or blank, or one that occurs twice.
        """
        if isinstance(labels, LabelSet):
            return labels
        if isinstance(labels, Mapping):
            names = check_labels(list(labels))
            texts = tuple(tuple([given] if isinstance(given, str) else given or [name]) for name, given in
                          zip(names, labels.values(), strict=True))
        else:
            names = check_labels(labels)
            texts = tuple((name,) for name in names)
        found = cls(tuple(names), tuple(tuple(check_labels(list(group))) for group in texts))
        seen: dict[str, int] = {}
        for query, owner in zip(found.queries, found.owners, strict=True):
            if query in seen:
                raise InputError(f"text {query!r} stands for both {names[seen[query]]!r} and {names[owner]!r}; expected one class")
            seen[query] = owner
        return found

    @classmethod
    def read(cls, path: str | Path) -> LabelSet:
        """From a file.

        ``.txt``: a class on each line, its texts separated by commas, the first one its name; ``#`` begins a comment.
        ``.yaml``, ``.json``: a list of names; or ``{name: texts}``; or ``{templates: ..., labels: one of these}``.

        Raises:
            InputError: for a file that is missing or of another kind, and as ``of`` does.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"label file {str(path)!r} does not exist; expected .txt (a class on each line), .yaml or .json")
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"label file {str(path)!r} is no UTF-8 text: {error}") from error
        try:
            return cls.of(_lines(text)) if path.suffix.lower() not in (".yaml", ".yml", ".json") else cls._from_tree(text)
        except InputError as error:
            raise InputError(f"label file {str(path)!r}: {error}") from error

    @classmethod
    def _from_tree(cls, text: str) -> LabelSet:
        import yaml  # JSON is YAML

        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"no YAML: {error}") from error
        templates = None
        if isinstance(tree, dict) and "labels" in tree and set(tree) <= {"labels", "templates"}:
            templates, tree = tree.get("templates"), tree["labels"]
        if not isinstance(tree, (list, dict)):
            raise InputError(f"a {type(tree).__name__} stands where a list of names or {{name: texts}} is expected")
        found = cls.of(tree)
        return cls(found.names, found.texts, tuple(templates) if isinstance(templates, list) else templates)

    @classmethod
    def parse(cls, line: str) -> LabelSet:
        """From a command line: classes separated by commas, synonyms by ``|``: ``person|man|woman,road``."""
        return cls.of(_groups(group.split("|") for group in line.split(",")))


def _lines(text: str) -> dict[str, list[str]]:
    lines = (line.split("#", 1)[0].strip() for line in text.splitlines())
    return _groups(re.split(r"[,|]", line) for line in lines if line)


def _groups(groups: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for i, group in enumerate(groups):
        texts = [text.strip() for text in group if text.strip()]
        if not texts:
            raise InputError(f"labels[{i}] is blank; expected a name")
        if texts[0] in found:
            raise InputError(f"labels[{i}] and labels[{list(found).index(texts[0])}] are both {texts[0]!r}; expected distinct labels")
        found[texts[0]] = texts
    if not found:
        raise InputError('labels is empty; expected at least one name, e.g. labels=["cat"]')
    return found


def check_labels(labels: Sequence[str] | str) -> list[str]:
    """A list of distinct, non-blank labels. A single string is one label."""
    labels = [labels] if isinstance(labels, str) else list(labels)
    if not labels:
        raise InputError('labels is empty; expected at least one name, e.g. labels=["cat"]')
    seen: dict[str, int] = {}
    for i, label in enumerate(labels):
        if not isinstance(label, str):
            raise InputError(f"labels[{i}] is a {type(label).__name__}; expected a string")
        if not label.strip():
            raise InputError(f"labels[{i}] is blank; expected a name")
        key = " ".join(label.split())
        if key in seen:
            raise InputError(f"labels[{i}] and labels[{seen[key]}] are both {key!r}; expected distinct labels")
        seen[key] = i
    return list(seen)
