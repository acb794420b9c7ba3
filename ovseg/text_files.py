"""Text files that people and killed runs leave: UTF-8, with errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import first_line
from .paths import as_given, no_file


def text_of(path: Path, what: str, expected: str, error: type[Exception]) -> str:
    """Read the text of a file, without a byte order mark.

    Args:
        path: of the file.
        what: the file is, for messages: "label file".
        expected: in its place: ".txt (a class on each line)".
        error: the class of the error.

    Raises:
        error: if there is no file, it cannot be read, or is not UTF-8.
    """
    if (found := no_file(path)) is not None:
        raise error(f"{what} {as_given(path)!r} {found}; expected {expected}")
    try:
        data = path.read_bytes()
    except OSError as failure:
        raise error(
            f"{what} {as_given(path)!r} cannot be read: {failure.strerror}; expected {expected}"
        ) from failure
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = data.count(b"\n", 0, failure.start) + 1
        raise error(
            f"{what} {as_given(path)!r} is no UTF-8 text, line {line}: {failure.reason} "
            f"0x{data[failure.start]:02x}; expected {expected}"
        ) from failure


def lines_of(path: Path, what: str, expected: str, error: type[Exception]) -> list[str]:
    """Read the lines of a file that are not blank, without the space around them.

    Raises:
        error: as ``text_of``, and if there is no line.
    """
    # Not splitlines: a name may hold any of the other characters that end a line there.
    every = text_of(path, what, expected, error).replace("\r", "\n").split("\n")
    lines = [line.strip() for line in every if line.strip()]
    if not lines:
        raise error(f"{what} {as_given(path)!r} is empty; expected {expected}")
    return lines


def tree_of(text: str, *, is_json: bool = False) -> Any:
    """Read what YAML or JSON holds: plain values, no code.

    Raises:
        ValueError: in words, for anything that cannot be read, a key that stands twice in a
            mapping, and what is nested too deeply.
    """
    import yaml

    try:
        if is_json:
            return json.loads(text, object_pairs_hook=_once)
        return yaml.load(text, _loader())  # a SafeLoader
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {first_line(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{'JSON' if is_json else 'YAML'} that is nested too deeply") from error


def records_of(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the JSON objects on the lines of a journal or log.

    A file that is not there has none. OSError if it cannot be read.

    Returns:
        The objects, and how many lines are none: cut off by a kill, damaged, not UTF-8.
    """
    if not path.is_file():
        return [], 0
    found = []
    damaged = 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            found.append(entry)
        else:
            damaged += 1
    return found, damaged


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice; expected it once")
        found[key] = value
    return found


def _loader() -> Any:
    import yaml

    class OnceLoader(yaml.SafeLoader):
        """Refuses a key that stands twice, of which YAML would take the last without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                merged = key_node.tag == "tag:yaml.org,2002:merge"
                if merged or not isinstance(key_node, yaml.ScalarNode):
                    continue
                key = self.construct_object(key_node)
                if key in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {key!r} stands twice; expected it once",
                        problem_mark=key_node.start_mark,
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    return OnceLoader
