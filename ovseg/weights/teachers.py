"""Files of names and their text embeddings, with which a table of vectors begins."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from ..data.class_lists import read_class_embeddings
from ..data.entities import Entities, words_of
from ..errors import CheckpointError, first_line
from ..paths import no_file
from ..replacing import replacing

_EXPECTED = (
    "expected .npz with names [N], vectors [N, E] and, where one was taken off, center [E]; or "
    ".safetensors with vectors and center, and names as a JSON list in its metadata"
)
_MOST = 1_000_000  # names


@dataclass(frozen=True)
class Teacher:
    """Unit text vectors by name, and the center that is taken off them.

    Attributes:
        vectors: name, in lower case and single spaces -> [E].
        center: [E].
    """

    vectors: Mapping[str, Tensor]
    center: Tensor

    def rows_for(self, entities: Entities) -> dict[int, Tensor]:
        """Return the vectors, the center taken off, of those entities that there are some of.

        That of the name, else that of the first synonym that has one.
        """
        found: dict[int, Tensor] = {}
        for word, index in entities.surface.items():  # of each entity its name first
            if index not in found and word in self.vectors:
                found[index] = self.vectors[word] - self.center
        return found


def read_teacher(path: str | Path, width: int) -> Teacher:
    """Read a file of names and vectors, by numpy or safetensors, without running code.

    Args:
        path: of the file.
        width: E.

    Raises:
        CheckpointError: for a file that is missing, damaged or of something else.
    """
    path = Path(path)
    if (what := no_file(path)) is not None:
        raise CheckpointError(f"teacher {str(path)!r} {what}; {_EXPECTED}")
    try:
        names, tensors = _read(path)
    except (
        KeyError,
        OSError,
        SafetensorError,
        TypeError,
        ValueError,
        RecursionError,
        zipfile.BadZipFile,
    ) as error:
        raise CheckpointError(
            f"teacher {str(path)!r} cannot be read ({first_line(error)}); {_EXPECTED}"
        ) from error
    vectors = tensors["vectors"].float()
    center = tensors.get("center", torch.zeros(width, device="cpu")).float()
    if vectors.shape != (len(names), width) or center.shape != (width,):
        raise CheckpointError(
            f"teacher {str(path)!r} has {len(names)} names, vectors {list(vectors.shape)} and a "
            f"center {list(center.shape)}; expected a vector of width {width} for each name"
        )
    norms = vectors.norm(dim=1, keepdim=True)
    if not bool(center.isfinite().all() & norms.isfinite().all() & (norms > 0).all()):
        raise CheckpointError(
            f"teacher {str(path)!r} holds vectors that are not finite or zero; {_EXPECTED}"
        )
    found: dict[str, Tensor] = {}
    for name, row in zip(names, vectors / norms, strict=True):
        if found.setdefault(" ".join(words_of(name)), row) is not row:
            raise CheckpointError(f"teacher {str(path)!r} has {name!r} twice; expected it once")
    return Teacher(found, center)


def write_teacher(
    path: Path,
    tables: Sequence[tuple[Sequence[str], Path]],
    width: int,
    *,
    fold: bool = True,
    center: bool = True,
) -> None:
    """Write a file for ``read_teacher`` from arrays of text embeddings that come without names.

    A name that comes several times gets the mean of its unit vectors.

    Args:
        path: of the .npz that is written.
        tables: names, and a ``.npy`` file with a row for each, in their order.
        width: E of the rows.
        fold: whether what stands behind a hyphen is left out, as COCO-Stuff has it: wall-brick and
            wall-other are both a wall.
        center: whether the mean of the unit vectors of all names is the center; else it is zero.

    Raises:
        InputError: for a file that is missing, damaged or of another shape.
        CheckpointError: for a row of zeros.
    """
    rows: dict[str, list[Tensor]] = {}
    for names, file in tables:
        vectors = read_class_embeddings(file, len(names), width)
        if not bool(vectors.norm(dim=1).all()):
            raise CheckpointError(f"{file} holds a row of zeros; expected text embeddings")
        for name, vector in zip(names, F.normalize(vectors, dim=1), strict=True):
            known = name.partition("-")[0] if fold else name
            rows.setdefault(" ".join(words_of(known)), []).append(vector)
    vectors = torch.stack([F.normalize(torch.stack(some).mean(0), dim=0) for some in rows.values()])
    with replacing(path) as part:
        np.savez(
            part,
            names=np.array(list(rows)),
            vectors=vectors.numpy(),
            center=(vectors.mean(0) if center else torch.zeros(width)).numpy(),
        )


def _read(path: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Return names and tensors; any error if the file is none of the two kinds."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            names: Any = file["names"].tolist()
            arrays = {key: file[key] for key in ("vectors", "center") if key in file}
        tensors = {key: torch.from_numpy(np.array(x, np.float32)) for key, x in arrays.items()}
    else:
        with safe_open(path, framework="pt") as file:
            names = json.loads((file.metadata() or {})["names"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["vectors"]  # a KeyError that says so
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("names are no list of texts")
    if len(names) > _MOST:
        raise ValueError(f"{len(names)} names")
    return names, tensors
