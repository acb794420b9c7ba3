"""The classes that masks are labelled with: names, texts, and which of them training holds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import ConfigError, InputError, first_line
from ..paths import as_given, no_file
from .benchmark_sets import describe
from .labels import check_labels
from .scenes import VOCABULARIES


@dataclass(frozen=True)
class ClassList:
    """Classes in the order of the labels.

    Attributes:
        names: of the classes.
        texts: one for each of them.
        unseen: names of those that zero-shot training holds out.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def unseen_ids(self) -> list[int]:
        """Labels of the classes that are held out."""
        return [i for i, name in enumerate(self.names) if name in self.unseen]

    @property
    def seen_ids(self) -> list[int]:
        """Labels of the classes that are trained on."""
        return [i for i, name in enumerate(self.names) if name not in self.unseen]


def class_list(which: str | Sequence[str], unseen: Sequence[str] | None = None) -> ClassList:
    """Return the classes of a benchmark, of the scenes, or the given names.

    Args:
        which: a name of ``data/sets``, ``digits`` or ``shapes``, a description's path, or the
            classes themselves, which are their own texts.
        unseen: in place of those that the set names.

    Raises:
        ConfigError: for a set without class names, names that are blank or occur twice, an unseen
            class that is none of them.
    """
    try:
        if not isinstance(which, str):
            names = tuple(check_labels(list(which)))
            found = ClassList(names, names, ())
        elif which in VOCABULARIES:
            words = VOCABULARIES[which]
            found = ClassList(words.classes, words.prompts, words.unseen_classes)
        else:
            about = describe(which)
            if not about.classes:
                raise ConfigError(
                    f"classes is {which!r}, which comes without class names; expected a list of "
                    "them"
                )
            found = ClassList(
                about.classes,
                tuple(about.texts.get(name, name) for name in about.classes),
                about.unseen,
            )
    except InputError as error:
        raise ConfigError(f"classes: {error}") from error
    if unseen is not None:
        found = ClassList(found.names, found.texts, tuple(unseen))
    unknown = [name for name in found.unseen if name not in found.names]
    if unknown:
        raise ConfigError(
            f"unseen names {unknown[0]!r}, which is none of the classes {list(found.names)[:5]}, "
            "..."
        )
    if len(set(found.unseen)) < len(found.unseen):
        raise ConfigError(f"unseen is {list(found.unseen)}; expected each class once")
    return found


def read_class_embeddings(path: str | Path, count: int, width: int) -> torch.Tensor:
    """Read embeddings [count, width], a row for each text in their order, as float32.

    Rows are taken as they are.

    Args:
        path: a ``.npy`` file of any float type.
        count: texts.
        width: numbers of an embedding.

    Raises:
        InputError: for a file that is missing, damaged, of another shape or not of finite floats.
    """
    expected = f"expected a .npy file [{count}, {width}] of floats"
    if (what := no_file(path)) is not None:
        raise InputError(
            f"class embeddings {as_given(path)!r} cannot be read: it {what}; {expected}"
        )
    path = Path(path)
    try:
        # Nothing is read before its shape is known.
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, TypeError, OverflowError) as error:
        raise InputError(
            f"class embeddings {path} cannot be read: {first_line(error)}; {expected}"
        ) from error
    shape = list(rows.shape) if isinstance(rows, np.ndarray) else "several arrays"
    if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f" or rows.shape != (count, width):
        kind = rows.dtype if isinstance(rows, np.ndarray) else "an archive"
        raise InputError(
            f"class embeddings {path} are {kind} of {shape}; expected floats of [{count}, "
            f"{width}], a row for each text"
        )
    found = torch.from_numpy(np.array(rows, np.float32))
    if not bool(found.isfinite().all()):
        raise InputError(f"class embeddings {path} hold NaN or infinities; expected finite numbers")
    return found
