"""Entities: what captions name, from a list of words.

A caption becomes a question, its entities masked, and an answer that names them. No part-of-speech
tagger and no dictionary of lemmas is needed: a word is what the list says, or a plural of it by the
rules of ``singulars``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..registration import Registry, yaml_files
from ..text_files import text_of, tree_of
from .templates import invisible_in

ENTITY_LISTS: Registry[Path] = Registry(
    "list of entities", lambda: yaml_files(Path(__file__).parent / "entity_lists")
)
MASK = "[MASK]"
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")  # a possessive's ending is no part of it
# Published training takes any of these letters off both ends of a word: "sheep" becomes "heep".
_STRIPPED = "'s"
# Endings of plurals, and what stands in their place in the singular.
_PLURALS = (("ies", ("y", "ie")), ("ves", ("f", "fe", "ve")), ("es", ("", "e")), ("s", ("",)))
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "mice": "mouse",
    "oxen": "ox",
}


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _WORD.findall(text.lower())


def singulars(word: str) -> list[str]:
    """Return what a word in lower case may be the plural of, the word itself first.

    Most of them are no words.
    """
    found = [word]
    if word in _IRREGULAR:
        found.append(_IRREGULAR[word])
    for ending, others in _PLURALS:
        if word.endswith(ending) and len(word) > len(ending) + 1:
            found += [word[: -len(ending)] + other for other in others]
    return found


@dataclass(frozen=True)
class Mention:
    """Entity ``index`` in a text, at ``start:end``."""

    start: int
    end: int
    index: int


class Entities:
    """A list of entities.

    Args:
        words: name of each entity -> what else it is called; one or more words each.
        phrases: name -> how a prompt says it; the name, if it is missing.

    Attributes:
        names: in the order of their indices.
        surface: what captions may say, in lower case -> index.
    """

    def __init__(
        self, words: Mapping[str, Sequence[str]], phrases: Mapping[str, str] | None = None
    ):
        self.names = tuple(words)
        self.phrases = tuple((phrases or {}).get(name, name) for name in self.names)
        self.surface: dict[str, int] = {}
        for index, (name, others) in enumerate(words.items()):
            for word in (name, *others):
                if (hidden := invisible_in(word)) is not None:
                    raise ConfigError(
                        f"entity {name!r} is called {word!r}, which holds {hidden}; expected a "
                        "word without it"
                    )
                key = " ".join(words_of(word))
                if not key:
                    raise ConfigError(
                        f"entity {name!r} is called {word!r}; expected letters or digits"
                    )
                if self.surface.setdefault(key, index) != index:
                    raise ConfigError(
                        f"the word {word!r} stands for {self.names[self.surface[key]]!r} and "
                        f"{name!r}; expected one entity a word"
                    )
        if not self.names:
            raise ConfigError("the list of entities is empty; expected at least one name")
        self._longest = max(key.count(" ") for key in self.surface) + 1

    def __len__(self) -> int:
        return len(self.names)

    @property
    def words(self) -> dict[str, list[str]]:
        """The names in their order -> what captions may say for each, in lower case."""
        found: dict[str, list[str]] = {name: [] for name in self.names}
        for word, index in self.surface.items():
            found[self.names[index]].append(word)
        return found

    def index_of(self, words: Sequence[str]) -> int | None:
        """Return the entity that words in lower case name, the last in the singular or plural."""
        before = " ".join(words[:-1])
        for last in singulars(words[-1]):
            if (found := self.surface.get(f"{before} {last}".lstrip())) is not None:
                return found
        return None

    def find(self, text: str) -> list[Mention]:
        """Find where entities are named, the longest name first, in the order of the text."""
        words = [
            (match.start(), match.end(), match.group().lower()) for match in _WORD.finditer(text)
        ]
        found = []
        at = 0
        while at < len(words):
            for count in range(min(self._longest, len(words) - at), 0, -1):
                part = words[at : at + count]
                if (index := self.index_of([word for *_, word in part])) is not None:
                    found.append(Mention(part[0][0], part[-1][1], index))
                    at += count
                    break
            else:
                at += 1
        return found

    def question(self, text: str, *, published: bool = False) -> tuple[str, list[int]]:
        """Mask what names an entity.

        Args:
            text: a caption.
            published: as OVSegmentor was trained. Words are what stands between spaces, in lower
                case, without any "'" and "s" at both ends, so that those that begin or end with one
                are damaged and, where they name an entity, not found.

        Returns:
            The text with ``[MASK]`` in their place, and the entities, each once.
        """
        if published:
            words = [word.strip(_STRIPPED) for word in text.lower().split()]
            indices = [self.index_of([word]) if word else None for word in words]
            asked = " ".join(
                word if index is None else MASK for word, index in zip(words, indices, strict=True)
            )
            return asked, list(dict.fromkeys(index for index in indices if index is not None))
        asked = ""
        at = 0
        found = self.find(text)
        for mention in found:
            asked += text[at : mention.start] + MASK
            at = mention.end
        return asked + text[at:], list(dict.fromkeys(mention.index for mention in found))

    def answer(self, indices: Sequence[int], template: str, *, published: bool = False) -> str:
        """Name these entities, joined by "and".

        Args:
            indices: of the entities; of none what stands before the place of the template is left.
            template: with one ``{}``.
            published: whether what comes after the place is lost.
        """
        before, _, after = template.partition("{}")
        named = " and ".join(self.phrases[index] for index in indices)
        return f"{before}{named}{'' if published or not indices else after}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.words, self.phrases)


def _again(words: dict[str, list[str]], phrases: tuple[str, ...]) -> Entities:
    return Entities(words, dict(zip(words, phrases, strict=True)))


def list_entities() -> list[str]:
    """Return the names of the lists of entities in the package."""
    return list(ENTITY_LISTS)


def load_entities(which: str) -> Entities:
    """Load a list by name, or from a YAML file.

    A file maps each entity to a list of what else it is called, or to nothing.

    Raises:
        ConfigError: for a list that is not there or says nothing of the kind.
    """
    path = ENTITY_LISTS[which] if which in ENTITY_LISTS else Path(which)
    expected = (
        f"one of {list_entities()} or a YAML file of entities, each with a list of what else it is "
        "called"
    )
    try:
        tree = tree_of(text_of(path, "list of entities", expected, ConfigError))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"list of entities {which!r} is {error}; expected {expected}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"list of entities {which!r} holds {type(tree).__name__}; expected {expected}"
        )
    return entities_of(tree, f"list of entities {which!r}")


def entities_of(tree: Mapping[Any, Any], where: str) -> Entities:
    """Return the list that a mapping of each entity to what else it is called stands for.

    Args:
        tree: name -> a list of words, or None.
        where: it stands, for messages.

    Raises:
        ConfigError: for anything else inside it.
    """
    for name, others in tree.items():
        words = [] if others is None else others
        if not isinstance(words, list) or not all(isinstance(one, str) for one in (name, *words)):
            raise ConfigError(
                f"{where}: {name!r} is {others!r}; expected words, and in a list what else they "
                "are called"
            )
    return Entities({name: others or () for name, others in tree.items()})
