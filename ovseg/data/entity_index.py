"""Pictures that share an entity, and captions that name one, of a large list.

The index, the side file of ``ovseg data cross-pairs``, is a list of pictures for each entity, four
bytes a mention: 4 million pictures with two entities each take 32 MB and their names.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..errors import DataError, InputError
from ..paths import as_given, no_file
from ..progress import bar
from ..replacing import file_for, replacing
from .entities import Entities
from .sampling import integer
from .sources.folder import Names

SUFFIXES = (".tsv", ".jsonl")
_MOST_LINE = 1 << 20  # bytes of a line of captions
_AGAIN = "ovseg data cross-pairs to be run again"


class EntityIndex:
    """Pictures of each entity.

    Args:
        starts: [K + 1], where the pictures of each entity begin in ``members``.
        members: numbers of pictures, ascending within an entity.
    """

    def __init__(self, starts: np.ndarray, members: np.ndarray):
        self.starts = starts
        self.members = members

    @classmethod
    def of(cls, named: torch.Tensor) -> EntityIndex:
        """Make the index of a 0/1 matrix [pictures, K]."""
        entity, picture = named.T.nonzero(as_tuple=True)
        starts = np.searchsorted(entity.numpy(), np.arange(named.shape[1] + 1))
        return cls(starts, picture.numpy().astype(np.int32))

    def pictures(self) -> np.ndarray:
        """Return the pictures that have an entity, ascending."""
        return np.unique(self.members)

    def partner(self, picture: int, entity: int, rng: torch.Generator) -> int:
        """Draw another picture of that entity; the picture itself if there is none."""
        here = self.members[int(self.starts[entity]) : int(self.starts[entity + 1])]
        own = int(np.searchsorted(here, picture))
        among_them = own < len(here) and here[own] == picture
        others = len(here) - among_them
        if not others:
            return picture
        chosen = integer(rng, 0, others)
        return int(here[chosen + (among_them and chosen >= own)])


def write_index(
    pictures: Sequence[str],
    captions: Iterable[Sequence[str] | str],
    entities: Entities,
    path: Path,
    *,
    progress: bool = False,
) -> tuple[Counter[str], list[str]]:
    """Index pictures by what their captions name. The file appears by rename.

    Args:
        pictures: their names, as the source will know them.
        captions: of each, in the same order; a string in place of them says why they cannot be
            used.
        entities: by which pictures are indexed.
        path: of the index.
        progress: whether a bar is shown.

    Returns:
        Pictures of each entity, and what could not be read.

    Raises:
        InputError: if the file cannot be written, before anything is read.
        DataError: if no two pictures share an entity.
    """
    from safetensors.numpy import save_file

    file_for(path, "index of entities")
    found = [array("i") for _ in entities.names]
    bad: list[str] = []
    for number, lines in enumerate(
        bar(captions, total=len(pictures), show=progress, unit="picture", desc="entities")
    ):
        if isinstance(lines, str):
            bad.append(lines)
            continue
        for index in {mention.index for line in lines for mention in entities.find(line)}:
            found[index].append(number)
    if max(map(len, found)) < 2:
        first = f"; the first that cannot be read: {bad[0]}" if bad else ""
        raise DataError(
            f"no two of {len(pictures)} pictures share one of {len(entities)} entities; expected "
            f"captions that name them, or another list of entities{first}"
        )
    letters, ends = _block(pictures)
    with replacing(path) as part:
        save_file(
            {
                "starts": np.cumsum([0, *map(len, found)]),
                "members": np.concatenate([np.asarray(one, np.int32) for one in found]),
                "letters": letters,
                "ends": ends,
            },
            part,
            {"entities": json.dumps(entities.names)},
        )
    return Counter({name: len(one) for name, one in zip(entities.names, found, strict=True)}), bad


def read_index(path: str | Path, pictures: Sequence[str], entities: Entities) -> EntityIndex:
    """Read the index of exactly these pictures and entities.

    Raises:
        DataError: if there is none, it is damaged, or of others.
    """
    from safetensors import SafetensorError, safe_open

    name = f"data.index {str(path)!r}"
    if (what := no_file(path)) is not None:
        raise DataError(f"{name} {what}; expected a file of ovseg data cross-pairs")
    try:
        with safe_open(path, framework="np") as file:
            names = json.loads(file.metadata()["entities"])
            starts, members, letters, ends = (
                file.get_tensor(key) for key in ("starts", "members", "letters", "ends")
            )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{name} is damaged or no index of entities: {error}; expected {_AGAIN}"
        ) from error
    if tuple(names) != entities.names:
        raise DataError(
            f"{name} is of {len(names)} other entities than the {len(entities)} of data.entities; "
            f"expected {_AGAIN}"
        )
    own_letters, own_ends = _block(pictures)
    if not (np.array_equal(letters, own_letters) and np.array_equal(ends, own_ends)):
        raise DataError(
            f"{name} is of {len(ends)} pictures, and the folder holds {len(pictures)}, of other "
            f"names; expected {_AGAIN}"
        )
    whole = (
        len(starts) == len(names) + 1
        and starts[0] == 0
        and starts[-1] == len(members)
        and bool((np.diff(starts) >= 0).all())
    )
    if not whole or (len(members) and not 0 <= members.min() <= members.max() < len(pictures)):
        raise DataError(
            f"{name} is damaged: it names pictures that are not there; expected {_AGAIN}"
        )
    return EntityIndex(starts, members)


def _block(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    return (names if isinstance(names, Names) else Names(names)).block()


@dataclass
class Filtered:
    """The counts of a list of captions that was read.

    Attributes:
        read, kept: lines.
        counts: captions of each entity.
        bad: what is wrong with lines that are none, a line each.
    """

    read: int = 0
    kept: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)


def filter_captions(
    source: Path,
    out: Path,
    entities: Entities,
    *,
    column: int = 1,
    key: str = "caption",
    exact: bool = False,
    progress: bool = False,
) -> Filtered:
    """Copy the lines whose caption names an entity, byte for byte, one at a time.

    The new file appears by rename.

    Args:
        source: .tsv, as CC12M is published (address, caption), or .jsonl.
        out: of the same kind.
        entities: of which a caption must name one.
        column: where the caption is in a .tsv, from 0.
        key: where it is in a .jsonl.
        exact: words of the list as they stand, in lower case and the singular, as the published
            CC4M was made.
        progress: whether a bar is shown.

    Raises:
        InputError: for files that cannot be read or written.
        DataError: if no caption names an entity.
    """
    _check_files(source, out)
    found = Filtered()
    words = entities.surface
    is_json = source.suffix.lower() == ".jsonl"
    with source.open("rb") as lines, replacing(out) as part, part.open("wb") as kept:
        with bar(
            show=progress, total=source.stat().st_size, unit="B", unit_scale=True, desc="captions"
        ) as shown:
            for number, line in enumerate(_whole_lines(lines), 1):
                shown.update(len(line))
                if not line.strip():
                    continue
                found.read += 1
                try:
                    caption = _caption(line, column, key, is_json)
                except ValueError as error:
                    found.bad.append(f"{source}:{number}: {error}")
                    continue
                mentions = entities.find(caption)
                if exact:
                    mentions = [one for one in mentions if caption[one.start : one.end] in words]
                named = {mention.index for mention in mentions}
                if named:
                    found.kept += 1
                    found.counts.update(entities.names[index] for index in named)
                    kept.write(line if line.endswith(b"\n") else line + b"\n")
        if not found.kept:
            first = (
                f"; the first of {len(found.bad)} bad lines: {found.bad[0]}" if found.bad else ""
            )
            raise DataError(
                f"none of {found.read} captions of {str(source)!r} names one of {len(entities)} "
                f"entities{first}"
            )
    return found


def _check_files(source: Path, out: Path) -> None:
    """Refuse files that cannot be read or written, before the work."""
    if (what := no_file(source)) is not None:
        raise InputError(f"captions {as_given(source)!r} {what}; expected a .tsv or .jsonl file")
    if source.suffix.lower() not in SUFFIXES or out.suffix.lower() != source.suffix.lower():
        raise InputError(
            f"captions are {str(source)!r} and --out {str(out)!r}; expected two names that end in "
            f"one of {list(SUFFIXES)}"
        )
    if out.exists() and out.samefile(source):
        raise InputError(f"--out {str(out)!r} is the file that is read; expected another name")
    file_for(out, "--out")


def _whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Read lines, one at a time; what is longer than ``_MOST_LINE`` loses its end."""
    while line := file.readline(_MOST_LINE):
        yield line
        while not line.endswith(b"\n") and len(line) == _MOST_LINE:
            line = file.readline(_MOST_LINE)


def _caption(line: bytes, column: int, key: str, is_json: bool) -> str:
    """Return the caption of a line; ValueError if there is none."""
    if len(line) == _MOST_LINE and not line.endswith(b"\n"):
        raise ValueError(f"a line of {_MOST_LINE} bytes or more; expected shorter ones")
    text = line.decode("utf-8-sig")  # UnicodeDecodeError is a ValueError
    if not is_json:
        parts = text.rstrip("\r\n").split("\t")
        if len(parts) <= column:
            raise ValueError(f"{len(parts)} columns; expected a caption in column {column}")
        return parts[column]
    try:
        entry: Any = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        raise ValueError(f"no text under {key!r}; expected an object with the caption there")
    return entry[key]
