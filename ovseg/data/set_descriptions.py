"""Descriptions of benchmarks: the files of ``data/sets``, and those of users in their form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..registration import Registry, yaml_files
from ..text_files import text_of, tree_of
from .labels import LabelSet
from .mask_files import IGNORE, MaskLayout, table_of

SETS: Registry[Path] = Registry(
    "data set", lambda: yaml_files(Path(__file__).parent / "sets"), InputError
)
MADE_ON = ("upright", "stored")


@dataclass(frozen=True)
class SetDescription:
    """A benchmark without its files.

    Attributes:
        name, title: as tables show it.
        classes: in the order of the labels.
        background: whether class 0 stands for everything else.
        unseen: classes held out in zero-shot training.
        texts: what stands for a class where its name does not.
        shares: rough shares of the labelled pixels of some classes, by which shifted labels are
            found.
        tree: the description as read.
        foreground: whether the classes are asked for alone, and pixels of anything else are not
            counted.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    background: bool
    unseen: tuple[str, ...]
    texts: dict[str, str]
    shares: dict[str, float]
    tree: dict[str, Any]
    foreground: bool = False

    @classmethod
    def of(cls, name: str, tree: dict[str, Any]) -> SetDescription:
        """Take the parts of a description; ``only`` names the classes that are asked for alone.

        Raises:
            InputError: for names in ``only`` that are none of the classes.
        """
        every = tuple(tree["classes"])
        only = tree.get("only")
        classes = every if only is None else _only(only, every, bool(tree["background"]))

        def kept(names: Any) -> list[str]:
            """Return names as they are, or those that are asked for."""
            return [one for one in names if only is None or one in classes or one not in every]

        texts = tree.get("texts", {})
        shares = tree.get("shares", {})
        return cls(
            name,
            tree["title"],
            classes,
            bool(tree["background"]) and only is None,
            tuple(kept(tree.get("unseen", ()))),
            {one: texts[one] for one in kept(texts)},
            {one: shares[one] for one in kept(shares)},
            tree,
            only is not None or bool(tree.get("foreground", False)),
        )

    def alone(self, names: Sequence[str]) -> SetDescription:
        """Return the set with some of its classes alone: every other pixel is not counted.

        Args:
            names: of classes, in any case, spaces or none between words; or their texts.

        Raises:
            InputError: for a name that is no class.
        """
        known = {_plain(text): name for name, text in self.texts.items()}
        known |= {_plain(name): name for name in self.classes}
        only = [known.get(_plain(name), name) for name in names]
        like = self.tree["like"] if "only" in self.tree else self.name
        title = f"{self.title}; {len(only)} classes alone"
        tree = {**self.tree, "only": only, "title": title, "like": like}
        return SetDescription.of(f"{self.name}_only_{len(only)}", tree)

    @property
    def label_set(self) -> LabelSet:
        """The classes as labels, without the background."""
        if not self.classes:
            raise InputError(
                f"{self.name} comes without class names; expected them in a file, --labels-file, "
                f"{self.number} classes"
            )
        return LabelSet.of(
            {name: self.texts.get(name, name) for name in self.classes[int(self.background) :]}
        )

    @property
    def number(self) -> int:
        """How many classes there are, named or not."""
        return self.tree.get("number", len(self.classes))

    @property
    def like(self) -> str | None:
        """The set of which this one asks for some classes alone, if it does."""
        return self.tree.get("like") if "only" in self.tree else None

    @property
    def masks_made_on(self) -> str | None:
        """The pixels that masks lie on where a picture has an EXIF orientation.

        ``upright``, as people see it; ``stored``, as the file has them. None: the description does
        not say, and upright is taken.
        """
        return self.tree.get("masks_made_on")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.tree["splits"])

    def layouts(self, split: str) -> list[MaskLayout]:
        """Return the ways masks of this split may be stored, the preferred one first."""
        masks = self.part(split).get("masks", self.tree["masks"])
        every = self.tree["classes"]
        number = len(every) or self.number
        found = []
        for entry in masks:
            table = table_of(entry["values"], number)
            if len(self.classes) < len(every):
                label = [self.classes.index(c) if c in self.classes else IGNORE for c in every]
                table = np.where(table >= 0, np.array(label, np.int16)[table], table)
            found.append(MaskLayout(entry["path"], table))
        return found

    def images(self, split: str) -> str:
        """Return where pictures lie below the set's folder, ``{}`` for the key."""
        return self.part(split).get("images", self.tree["images"])

    def part(self, split: str) -> dict[str, Any]:
        """Return what the description says about one split alone.

        Raises:
            InputError: if it has none of that name.
        """
        if split not in self.splits:
            raise InputError(f"split is {split!r}; {self.name} has {', '.join(self.splits)}")
        return self.tree["splits"][split]


def list_sets() -> list[str]:
    """Return the names of the benchmark sets in the package."""
    return list(SETS)


def describe(name: str) -> SetDescription:
    """Read the description of a benchmark.

    Args:
        name: of ``list_sets``, or a file of the form of those in ``data/sets``.

    Raises:
        InputError: for an unknown name, or a file that lacks something.
    """
    is_file = Path(name).suffix in (".yaml", ".yml")
    if not is_file and name not in SETS:
        raise InputError(
            f"data set is {name!r}; expected one of {list_sets()}, or a .yaml file that describes "
            "one"
        )
    path = Path(name) if is_file else SETS[name]
    try:
        tree = _read(path)
        found = SetDescription.of(path.stem, tree)
        _check_form(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} does not describe a data set: {type(error).__name__}: {error}"
        ) from error
    unknown = [c for c in (*found.unseen, *found.texts, *found.shares) if c not in found.classes]
    if unknown:
        raise InputError(f"{path}: {unknown[0]!r} is none of the classes")
    twice = [c for i, c in enumerate(found.classes) if c in found.classes[:i]]
    if twice:
        raise InputError(f"{path}: the class {twice[0]!r} stands twice")
    return found


def _plain(name: str) -> str:
    """Return a name as it is compared: "Dining table" is "diningtable"."""
    return "".join(name.lower().split())


def _only(only: Any, every: tuple[str, ...], background: bool) -> tuple[str, ...]:
    """Return the classes that are asked for alone, held to those that there are."""
    known = every[int(background) :]
    names = tuple(only) if isinstance(only, (list, tuple)) else ()
    wrong = [one for i, one in enumerate(names) if one not in known or one in names[:i]]
    if not names or wrong:
        what = f"names {wrong[0]!r}" if wrong else f"is {only!r}"
        what += " twice" if wrong and wrong[0] in known else ""
        beside = ", without the background" if background else ""
        raise InputError(
            f"only {what}; expected some of {len(known)} classes{beside}: "
            f"{', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
        )
    return names


def _check_form(found: SetDescription) -> None:
    """Raise ValueError for classes that are no texts, and for paths without a place for the key."""
    for name in found.classes:
        if not isinstance(name, str):
            raise ValueError(
                f"the class {name!r} is a {type(name).__name__}; expected a text, in YAML in "
                "quotation marks"
            )
    if found.masks_made_on not in (None, *MADE_ON):
        raise ValueError(
            f"masks_made_on is {found.masks_made_on!r}; expected one of {list(MADE_ON)}"
        )
    for split in found.splits:
        layouts = found.layouts(split)
        if any(layout.drawn for layout in layouts) and len(layouts) > 1:
            raise ValueError(
                "masks are drawn from a .json and lie in other files; expected one way"
            )
        paths = [layout.path for layout in layouts if not layout.drawn]
        for pattern in (found.images(split), *paths):
            if not pattern.count("{}") == pattern.count("{") == pattern.count("}") == 1:
                raise ValueError(
                    f"path {pattern!r} holds {pattern.count('{}')} '{{}}'; expected one, for the "
                    "key, and no other braces"
                )


def _read(path: Path, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a description with what it takes over from those that it is ``like``.

    Args:
        path: of the file.
        below: names of those that led here.
    """
    expected = "one of ovseg data list, or a .yaml file that describes one"
    try:
        tree = tree_of(text_of(path, "data set", expected, InputError))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is {error}") from error
    if not isinstance(tree, dict):
        raise InputError(
            f"{path} holds a {type(tree).__name__}; expected the description of a data set"
        )
    if "like" not in tree:
        return tree
    like = tree["like"]
    if like not in SETS or like in below:
        others = [name for name in list_sets() if name not in below]
        raise InputError(f"{path}: like is {like!r}; expected one of {others}")
    base = _read(SETS[like], (*below, like))
    return {**base, **tree, "splits": {**base["splits"], **tree.get("splits", {})}}
