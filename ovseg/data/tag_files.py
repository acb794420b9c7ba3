"""Files that say in words what pictures show: COCO's captions, a table of names, captions beside.

Each becomes ``Tagged``: pictures, what is said of each, and what was looked for.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, NoData
from ..paths import as_given, exists, no_file, no_folder
from ..text_files import lines_of, text_of, tree_of
from .folders import hidden
from .sources.folder import captions_of, find_pairs

logger = logging.getLogger(__name__)
NAMES_FILE = "names.tsv"
_CAPTIONS = "captions_*.json"
_LOOKED_FOR = "# looked for:"
_KEYS = ("root", "captions", "names", "images", "looked_for")
_COCO = "COCO's form: images with id and file_name, annotations with image_id and caption"
_TABLE = "on each line a picture, a tab, and the names of what it shows, separated by commas"


@dataclass
class Tagged:
    """Pictures with what is said of them.

    Attributes:
        where: the folder or file that says it.
        pictures: paths.
        texts: of each picture: captions, or names.
        looked_for: None for captions. For names, all that somebody looked for: those of them that
            a picture does not list it does not show.
    """

    where: str
    pictures: list[str]
    texts: list[list[str]]
    looked_for: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Place:
    """A folder or a file with pictures; see ``Options`` of ``sources/tags.py``."""

    root: str | None = None
    captions: str | None = None
    names: str | None = None
    images: str | None = None
    looked_for: tuple[str, ...] | None = None


def places_of(given: Any) -> list[Place]:
    """Return the places that ``data.root`` names: one, or a list of them.

    Raises:
        ConfigError: for anything but paths and mappings with the known keys.
    """
    several = given if isinstance(given, (list, tuple)) else [given]
    expected = (
        "a folder of pictures, a list of them, or mappings such as {captions: a .json, images: a "
        "folder}"
    )
    if not several or given is None:
        raise ConfigError(f"data.root is {given!r}; with data.kind=tags expected {expected}")
    return [_place(one, expected) for one in several]


def _place(given: Any, expected: str) -> Place:
    if isinstance(given, (str, Path)):
        return Place(root=str(given))
    if not isinstance(given, Mapping):
        raise ConfigError(f"data.root holds {given!r}; expected {expected}")
    for key, value in given.items():
        if key not in _KEYS:
            raise ConfigError(f"data.root: unknown key {key!r}; expected some of {list(_KEYS)}")
        listed = key == "looked_for" and isinstance(value, (list, tuple))
        texts = list(value) if listed else [value]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            kind = "a list of names" if key == "looked_for" else "a path"
            raise ConfigError(f"data.root: {key} is {value!r}; expected {kind}")
    said = [key for key in ("root", "captions", "names") if key in given]
    if len(said) != 1:
        raise ConfigError(
            f"data.root names {said or list(given)} together; expected one of root, captions and "
            "names, with the folder of the pictures under images"
        )
    sought = given.get("looked_for")
    if sought is not None and said != ["names"]:
        raise ConfigError(f"data.root has looked_for beside {said[0]}; expected it beside names")
    names = None if sought is None else tuple([sought] if isinstance(sought, str) else sought)
    return Place(**{**given, "looked_for": names})


def read_place(place: Place) -> Tagged:
    """Read what lies at a place.

    Raises:
        NoData: where nothing lies.
        DataError: for another layout, files that are damaged, and where no picture is left.
    """
    if place.captions is not None:
        return read_captions(Path(place.captions), place.images)
    if place.names is not None:
        return read_names(Path(place.names), place.images, place.looked_for)
    root = str(place.root)
    if (what := no_folder(root)) is not None:
        raise NoData(
            f"data.root {as_given(root)!r} {what}; expected a folder with annotations/{_CAPTIONS}, "
            f"with {NAMES_FILE}, or of pictures with .txt captions"
        )
    captions = sorted((Path(root) / "annotations").glob(_CAPTIONS))
    captions = [path for path in captions if not hidden(path.name)]
    table = Path(root) / NAMES_FILE
    found = [*captions, table] if exists(table) else captions
    if len(found) > 1:
        raise DataError(
            f"data.root {root!r} holds {', '.join(str(path.relative_to(root)) for path in found)}; "
            "expected one of them to be named: {captions: FILE} or {names: FILE}"
        )
    if not found:
        return _folder_of_pairs(root)
    if captions:
        return read_captions(captions[0], place.images)
    return read_names(table, place.images)


def read_captions(path: Path, images: str | None = None) -> Tagged:
    """Read captions in COCO's format.

    Args:
        path: ``annotations/captions_val2017.json``.
        images: the folder of its pictures; None: ``val2017`` beside ``annotations``.

    Raises:
        DataError: for a file of another form, an id that stands twice, and no picture with a
            caption.
    """
    tree = _json(path, _COCO)
    names: dict[Any, str] = {}
    for entry in tree["images"]:
        number, name = _fields(entry, ("id", "file_name"), path)
        if number in names:
            raise DataError(f"{path}: the image id {number!r} stands twice; expected it once")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: file_name of image {number!r} is {name!r}; expected a name")
        names[number] = name
    texts: dict[Any, list[str]] = {number: [] for number in names}
    seen: set[Any] = set()
    strangers = 0
    for entry in tree["annotations"]:
        number, caption = _fields(entry, ("image_id", "caption"), path)
        own = entry.get("id")
        if own is not None and own in seen:
            raise DataError(f"{path}: the annotation id {own!r} stands twice; expected it once")
        seen.add(own)
        if not isinstance(caption, str):
            raise DataError(f"{path}: a caption of image {number!r} is {caption!r}; expected text")
        if number in texts:
            texts[number].append(caption)
        else:
            strangers += 1
    if strangers:
        logger.warning(
            "%s: %d captions of images that it does not list are left out", path, strangers
        )
    folder = _folder(path, images, names.values())
    rows = [(name, texts[number]) for number, name in names.items()]
    return _there(str(path), folder, rows)


def read_names(
    path: Path, images: str | None = None, looked_for: Sequence[str] | None = None
) -> Tagged:
    """Read a table of names: ``picture.jpg``, a tab, ``cat, chair``.

    Args:
        path: of the table. A line "# looked for: cat, chair, dog" says what was looked for.
        images: the folder of its pictures; None: ``pictures`` or ``images`` beside it, or its own.
        looked_for: names that were looked for, in place of that line; without either, all names
            that the table holds.

    Raises:
        DataError: for lines of another form, a picture that stands twice, and no picture.
    """
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(lines_of(path, "table of names", _TABLE, DataError), 1):
        if line.startswith("#"):
            if line.startswith(_LOOKED_FOR) and looked_for is None:
                looked_for = _split(line.removeprefix(_LOOKED_FOR))
            continue
        name, tab, listed = line.partition("\t")
        if not tab or not _split(listed):
            raise DataError(f"{path}: line {number} is {line!r}; expected {_TABLE}")
        if name.strip() in rows:
            raise DataError(f"{path}: {name.strip()!r} stands twice; expected it once")
        rows[name.strip()] = _split(listed)
    every = dict.fromkeys(name for names in rows.values() for name in names)
    if looked_for is not None and (unlisted := [one for one in every if one not in looked_for]):
        raise DataError(
            f"{path} names {unlisted[0]!r}, which is none of what was looked for: "
            f"{', '.join(looked_for)}; expected only those"
        )
    folder = _folder(path, images, rows)
    found = _there(str(path), folder, list(rows.items()))
    return Tagged(found.where, found.pictures, found.texts, tuple(looked_for or every))


def _folder_of_pairs(root: str) -> Tagged:
    """Read a folder of pictures with captions beside them."""
    pictures = []
    texts = []
    bad = []
    for name in find_pairs(root):
        picture = Path(root) / name
        try:
            texts.append(captions_of(picture))
        except DataError as error:
            bad.append(str(error))
        else:
            pictures.append(str(picture))
    if bad:
        logger.warning("%d files of captions are left out; the first: %s", len(bad), bad[0])
    if not pictures:
        raise DataError(f"data.root {root!r}: no file of captions can be used; the first: {bad[0]}")
    return Tagged(root, pictures, texts)


def _json(path: Path, expected: str) -> dict[str, Any]:
    """Read an object with the lists ``images`` and ``annotations``."""
    try:
        tree = tree_of(text_of(path, "file of captions", expected, DataError), is_json=True)
    except ValueError as error:
        raise DataError(f"{path} is {error}; expected {expected}") from error
    for key in ("images", "annotations"):
        if not isinstance(tree, dict) or not isinstance(tree.get(key), list) or not tree[key]:
            raise DataError(f"{path} holds no list of {key}; expected {expected}")
    return tree


def _fields(entry: Any, keys: tuple[str, str], path: Path) -> tuple[Any, Any]:
    """Return two values of an entry, the first of them a number or a text."""
    if not isinstance(entry, dict) or any(key not in entry for key in keys):
        lacks = entry if not isinstance(entry, dict) else f"an entry with {sorted(entry)}"
        raise DataError(f"{path} holds {str(lacks)[:80]}; expected {keys[0]} and {keys[1]} in each")
    if isinstance(entry[keys[0]], bool) or not isinstance(entry[keys[0]], (int, str)):
        raise DataError(f"{path}: {keys[0]} is {entry[keys[0]]!r}; expected a number")
    return entry[keys[0]], entry[keys[1]]


def _folder(path: Path, images: str | None, names: Any) -> Path:
    """Return the folder in which a file's pictures lie.

    Raises:
        NoData: if there is none.
    """
    if images is not None:
        if (what := no_folder(images)) is not None:
            raise NoData(f"images {as_given(images)!r} {what}; expected the pictures of {path}")
        return Path(images)
    split = path.stem.partition("_")[2]
    above = path.parent.parent
    usual = [above / split, above / "images" / split, above / "images"]
    if path.suffix == ".tsv":
        usual = [path.parent / "pictures", path.parent / "images", path.parent]
    every = list(names)
    for folder in usual:
        if any(no_file(folder / name) is None for name in every):
            return folder
    first = f", the first {every[0]}" if every else ""
    raise NoData(
        f"{path} lists {len(every)} pictures{first}, none of which is in "
        f"{', '.join(map(str, usual))}; expected their folder under images"
    )


def _there(where: str, folder: Path, rows: list[tuple[str, list[str]]]) -> Tagged:
    """Keep the pictures that are there and of which something is said; tell of the others."""
    reasons: Counter[str] = Counter()
    pictures = []
    texts = []
    for name, said in rows:
        said = [text for text in said if text.strip()]
        if not said:
            reasons["without a text"] += 1
        elif no_file(folder / name) is not None:
            reasons[f"not in {folder}"] += 1
        else:
            pictures.append(str(folder / name))
            texts.append(said)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    if not pictures:
        raise DataError(f"{where} lists {len(rows)} pictures: {told}; expected pictures with texts")
    if reasons:
        logger.warning("%s: of %d pictures are left out: %s", where, len(rows), told)
    return Tagged(where, pictures, texts)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
