"""Label files of every kind that people have, read as names or ``{name: texts}``.

``LabelSet.read`` makes a label set of them.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..text_files import text_of, tree_of

logger = logging.getLogger(__name__)
_TEXT = (".txt", ".names", ".lst", ".list", "")
_TABLE = (".csv", ".tsv")
_TREE = (".yaml", ".yml", ".json")
EXPECTED = (
    ".txt (a class on each line), .csv or .tsv (with a header that names a column name), .yaml or "
    ".json (a list of names, {name: texts}, {id: name} or {name: id})"
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Columns of tables.
_NAMES = _words("name names label labels class classes class_name classname category display_name")
_NUMBERS = _words("idx index id class_id classid label_id category_id number no train_id trainid")
_SYNONYMS = ("synonyms", "texts", "aliases")
_QUOTES = ('""', "''", "``", "\u201c\u201d", "\u2018\u2019")
_LITERALLY = "a .json or .yaml list takes any name as it is"
Labels = list[Any] | dict[Any, Any]


def read_labels(path: Path) -> tuple[Labels, Any]:
    """Read (names or ``{name: texts}``, templates) of a label file.

    What they are worth is for ``LabelSet`` to say.

    Raises:
        InputError: for a file that is missing, of another kind, or cannot be read as its kind.
    """
    text = text_of(path, "label file", EXPECTED, InputError)
    suffix = path.suffix.lower()
    if suffix not in (*_TEXT, *_TABLE, *_TREE):
        raise InputError(f"label file {str(path)!r} ends in {suffix}; expected {EXPECTED}")
    try:
        if suffix in _TREE:
            return _from_tree(text, suffix == ".json")
        return _from_table(text) if suffix in _TABLE or _is_table(text) else _from_lines(text), None
    except (ValueError, csv.Error) as error:
        raise InputError(f"label file {str(path)!r}: {error}") from error


def by_number(tree: Mapping[Any, Any]) -> list[str] | None:
    """Return the names of ``{id: name}`` or ``{name: id}`` in the order of their ids.

    None if it is neither.

    Raises:
        ValueError: if the ids are not 0, 1, 2, ... or 1, 2, 3, ...
    """
    if not tree:
        return None
    if all(map(_is_number, tree)) and all(isinstance(name, str) for name in tree.values()):
        return in_order([(int(key), name) for key, name in tree.items()])
    if all(map(_is_number, tree.values())):
        return in_order([(int(number), name) for name, number in tree.items()])
    return None


def in_order(numbered: Iterable[tuple[int, Any]]) -> list[Any]:
    """Return what numbers belong to, in their order.

    Raises:
        ValueError: if the numbers are not 0, 1, 2, ... or 1, 2, 3, ...
    """
    found = sorted(numbered, key=lambda pair: pair[0])
    first = 1 if found[0][0] == 1 else 0
    for expected, (number, what) in enumerate(found, first):
        if number != expected:
            raise ValueError(
                f"{what!r} has the number {number} where {expected} is expected; a label map's "
                "numbers are 0, 1, 2, ... or 1, 2, 3, ..., each once"
            )
    return [what for _, what in found]


def split_texts(line: str) -> list[str]:
    """Split the texts of one class in a file at commas, semicolons and bars; blank ones go.

    Raises:
        ValueError: for one in quotation marks, which would be a part of its name.
    """
    texts = [text.strip() for text in re.split(r"[,;|]", line) if text.strip()]
    for text in (line.strip(), *texts):
        _no_quotes(text)
    return texts


def _no_quotes(text: str) -> None:
    if len(text) > 1 and text[0] + text[-1] in _QUOTES:
        raise ValueError(
            f"{text} is in quotation marks; expected a name without them ({_LITERALLY})"
        )


def split_line(line: str) -> list[list[str]]:
    """Split a command line into classes and their texts: ``person|man|woman,road``.

    Raises:
        InputError: for a blank synonym, and a name in quotation marks.
    """
    found = []
    try:
        _no_quotes(line.strip())
        for i, group in enumerate(line.split(",")):
            if group.strip() and not all(text.strip() for text in re.split(r"[;|]", group)):
                raise InputError(
                    f"labels[{i}] is {group.strip()!r}, of which a synonym is blank; "
                    "expected a text on both sides of a bar"
                )
            found.append(split_texts(group))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"labels: {error}") from error
    return found


def grouped(groups: Iterable[list[str]]) -> dict[str, list[str]]:
    """Return ``{name: texts}``, the name being the first text of each group."""
    found: dict[str, list[str]] = {}
    for i, texts in enumerate(groups):
        if not texts:
            raise InputError(f"labels[{i}] is blank; expected a name")
        if texts[0] in found:
            raise InputError(
                f"labels[{i}] and labels[{list(found).index(texts[0])}] are both {texts[0]!r}; "
                "expected distinct labels"
            )
        found[texts[0]] = texts
    if not found:
        raise InputError('labels is empty; expected at least one name, e.g. labels=["cat"]')
    return found


def _from_lines(text: str) -> dict[str, list[str]]:
    """Read a class on each line; ``#`` at its beginning or after a blank begins a comment.

    Lines such as ``0: wall`` are put in the order of their numbers.
    """
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in re.split(r"\r?\n|\r", text)]
    lines = _without_numbers([line for line in lines if line])
    if (table := next((line for line in lines if "\t" in line), None)) is not None:
        raise ValueError(
            f"the line {table!r} holds a tab as a row of a table does; expected a .tsv with a "
            "header, or texts alone"
        )
    groups = [split_texts(line) for line in lines]
    for line, group in zip(lines, groups, strict=True):
        if len(group) > 1 and group[0].isdigit():
            raise ValueError(
                f"the line {line!r} looks like a row of a table without a header; expected one "
                "such as Idx,Name"
            )
    if len(groups) == 1 and len(groups[0]) > 1:
        logger.warning(
            "%d texts on the only line are one class, %r, and its synonyms; several "
            "classes stand on a line each",
            len(groups[0]),
            groups[0][0],
        )
    return grouped(groups)


def _without_numbers(lines: list[str]) -> list[str]:
    """Return names as lines have them, in the order of their numbers if all have one.

    Raises:
        ValueError: where some lines have a number, a number may be a part of the name, or the lines
            are those of another kind of file.
    """
    numbered = [re.fullmatch(r"(\d{1,9})\s*[:\t]\s*(\S.*)", line) for line in lines]
    if lines and all(numbered):
        return in_order([(int(one[1]), one[2]) for one in numbered if one])
    if any(numbered):
        some = next(line for line, one in zip(lines, numbered, strict=True) if one)
        other = next(line for line, one in zip(lines, numbered, strict=True) if not one)
        raise ValueError(
            f"the line {some!r} has a number and {other!r} has none; expected one "
            f"before every name, or before no name ({_LITERALLY})"
        )
    counted = [
        re.fullmatch(r"(\d{1,9})(?:\s*[.)\]=]\s*|\s+-\s+|\s+)(\S.*)", line) for line in lines
    ]
    for place, one in enumerate(counted):
        if one and (all(counted) or int(one[1]) in (place, place + 1)):
            raise ValueError(
                f"the line {one[0]!r} may be a class of that name, or {one[2]!r} with "
                f"its number; expected '{one[1]}: {one[2]}' on every line for numbers, "
                "or a .json or .yaml list for names that begin with one"
            )
    if lines and all(re.fullmatch(r"\S.*[:=]\s*\d+", line) for line in lines):
        raise ValueError(
            f"the line {lines[0]!r} has a number behind the name; expected it before, "
            "as in 0: wall, or a .yaml file"
        )
    if lines and (lines[0][0] in "[{" or all(line.startswith(("- ", "* ")) for line in lines)):
        raise ValueError(
            f"the line {lines[0]!r} looks like JSON or YAML; expected a file that ends "
            "so, or a name on each line"
        )
    return lines


def _is_table(text: str) -> bool:
    """Return whether the first line of a text is a table's header, not two classes."""
    header = [cell.strip().lower() for cell in re.split(r"[,;\t]", text.split("\n", 1)[0])]
    return any(cell in _NUMBERS for cell in header) and any(cell in _NAMES for cell in header)


def _from_table(text: str) -> dict[str, list[str]]:
    """Read a column of names, and of numbers and synonyms if there is one."""
    first = text.split("\n", 1)[0]
    delimiter = next((mark for mark in "\t,;" if mark in first), ",")
    lines = io.StringIO(text, newline="")  # some line breaks may be inside of quotation marks
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    rows = [row for row in table if any(cell.strip() for cell in row)]
    header = [cell.strip().lower().replace(" ", "_") for cell in rows[0]] if rows else []
    name, number, synonyms = (
        next((header.index(word) for word in words if word in header), None)
        for words in (_NAMES, _NUMBERS, _SYNONYMS)
    )
    if name is None:
        raise ValueError(
            f"its header {rows[0] if rows else []} names no column of names; expected one called "
            f"{', '.join(_NAMES[:7:2])}"
        )
    found = []
    for i, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ValueError(
                f"row {i} has {len(row)} cells and the header {len(header)}; expected as many "
                f'(names with a comma in "")'
            )
        if number is not None and not _is_number(row[number].strip()):
            raise ValueError(
                f"row {i} has {row[number]!r} in the column {rows[0][number]!r}; expected a whole "
                "number"
            )
        texts = split_texts(row[name])
        if synonyms is not None:
            texts += split_texts(row[synonyms])
        found.append((i if number is None else int(row[number]), texts))
    if number is None or not found:
        return grouped(texts for _, texts in found)
    return grouped(in_order(found))


def _from_tree(text: str, is_json: bool) -> tuple[Labels, Any]:
    """Read what YAML or JSON holds: names or ``{name: texts}``, and templates."""
    tree = tree_of(text, is_json=is_json)
    templates = None
    if isinstance(tree, dict) and "labels" in tree and set(tree) <= {"labels", "templates"}:
        templates = tree.get("templates")
        tree = tree["labels"]
    if not isinstance(tree, (list, dict)):
        raise ValueError(
            f"a {type(tree).__name__} stands where a list of names, {{name: texts}}, {{id: name}} "
            "or {name: id} is expected"
        )
    ordered = by_number(tree) if isinstance(tree, dict) else None
    names = ordered if ordered is not None else tree
    if isinstance(names, dict):
        return {name: _parted(given) for name, given in names.items()}, templates
    if all(isinstance(name, str) for name in names) and any(";" in name for name in names):
        return grouped(_semicolons(name) for name in names), templates
    return names, templates


def _parted(given: Any) -> Any:
    """Split texts with a semicolon between them; commas may belong to a phrase here."""
    if isinstance(given, str) and ";" in given:
        return _semicolons(given)
    if isinstance(given, list) and all(isinstance(text, str) for text in given):
        return [part for text in given for part in (_semicolons(text) if ";" in text else [text])]
    return given


def _semicolons(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"\d{1,9}", value) is not None
    return isinstance(value, int) and not isinstance(value, bool)
