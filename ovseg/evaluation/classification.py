"""Zero-shot image classification through the same texts.

Pictures lie in one folder for each class, as torchvision's ImageFolder has them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import distributed
from ..data.file_types import OwnResults, is_folder_of_results
from ..data.folders import UNREAD, Folder, hidden, look
from ..data.images import SUFFIXES
from ..data.labels import LabelSet
from ..errors import DataError, InputError, NoData
from ..inference import Predictor
from ..paths import no_folder
from ..progress import bar
from ..systems import OVSegModel
from .evaluate import Share, refuse_bad

logger = logging.getLogger(__name__)


class ClassFolders:
    """``root/CLASS/picture.jpg``.

    Args:
        root: its sub-folders, sorted, are the classes.
        labels: texts of the classes in that order; by default the folders' names, with spaces for
            underscores.

    Attributes:
        items: (picture, class).
        bad: what looks like a picture and cannot be read, or is in no class, a line each.

    Raises:
        DataError: without folders or pictures.
        InputError: for labels of another number.
    """

    def __init__(self, root: str | Path, labels: LabelSet | None = None):
        self.root = Path(root)
        if (what := no_folder(self.root)) is not None:
            raise NoData(f"{self.root} {what}; expected a folder with a sub-folder for each class")
        inside = sorted(path for path in self.root.iterdir() if not hidden(path.name))
        seen = self._classes([look(path) for path in inside if path.is_dir()])
        self.items = [
            (folder.root / name, i) for i, folder in enumerate(seen) for name in folder.pictures
        ]
        own = OwnResults()
        self.bad = [line for folder in seen for line in folder.bad] + [
            f"{path}: a picture in no class's folder"
            for path in inside
            if not path.is_dir()
            and path.suffix.lower() in (*SUFFIXES, *UNREAD)
            and not own.holds(path)
        ]
        if not self.items:
            found = f"; in the first: {seen[0].found()}" if seen else ""
            raise DataError(
                f"{self.root} holds {len(seen)} sub-folders and no picture in them{found}; "
                "expected one for each class"
            )
        self._tell(seen)
        names = [folder.root.name.replace("_", " ") for folder in seen]
        self.labels = labels or LabelSet.of(names)
        if len(self.labels) != len(seen):
            raise InputError(
                f"labels holds {len(self.labels)} classes and {self.root} {len(seen)} folders; "
                "expected one for each"
            )

    def _classes(self, folders: list[Folder]) -> list[Folder]:
        """Leave out the folders that a run of this package wrote."""
        runs = [
            folder
            for folder in folders
            if not folder.pictures and is_folder_of_results(folder.root)
        ]
        if runs:
            logger.warning(
                "%s: %d folders hold results of ovseg and no picture, and are no classes: %s",
                self.root,
                len(runs),
                ", ".join(folder.root.name for folder in runs),
            )
        return [folder for folder in folders if folder not in runs]

    def _tell(self, folders: list[Folder]) -> None:
        """Tell which classes have no picture, and what is left out on purpose."""
        empty = [folder.root.name for folder in folders if not folder.pictures]
        if empty:
            logger.warning(
                "%s: %d of %d class folders hold no picture, the first: %s",
                self.root,
                len(empty),
                len(folders),
                empty[0],
            )
        left_out = Folder(
            self.root,
            hidden=[path.name for path in self.root.iterdir() if hidden(path.name)]
            + [name for folder in folders for name in folder.hidden],
            results=[f"{folder.root.name}/{name}" for folder in folders for name in folder.results],
        )
        for line in left_out.left_out():
            logger.warning("%s", line)


@dataclass
class Classification:
    """How pictures were classified.

    Attributes:
        summary: top-1, top-5 and the mean over classes of top-1, in percent.
        labels: the classes.
        matrix: counts [truth, prediction].
        skipped: what was left out.
    """

    summary: dict[str, Any]
    labels: LabelSet
    matrix: np.ndarray
    skipped: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it for ``results.json``."""
        rows = {}
        for i, (name, count) in enumerate(
            zip(self.labels.names, self.matrix.sum(1).tolist(), strict=True)
        ):
            right = 100 * float(self.matrix[i, i]) / max(1, count)
            rows[name] = {"pictures": count, "top1": round(right, 2)}
        return {
            "summary": self.summary,
            "classes": rows,
            "skipped": self.skipped,
            "confusion": self.matrix.tolist(),
        }


@torch.no_grad()
def evaluate_classification(
    model: OVSegModel,
    data: ClassFolders,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Classification:
    """Give each picture the class whose best text is the most similar, by ``model.similarity``.

    Args:
        model: on its device.
        data: the pictures.
        skip_bad: what cannot be read is left out and named; otherwise it ends the evaluation.
        limit: only the first pictures.
        progress: whether a bar is shown.
        options: of ``Predictor``.

    Raises:
        DataError: for a picture that cannot be read, unless ``skip_bad``; if nothing is left.
    """
    if not skip_bad:
        refuse_bad(data.bad)
    predictor = Predictor(model, data.labels, **options)
    count = len(data.labels)
    matrix = np.zeros((count, count), np.int64)
    in_five = np.zeros(1, np.int64)
    share = Share(str(data.root), len(data.items), limit, skip_bad, data.bad)
    place = {name: i for i, name in enumerate(data.labels.names)}
    for i in bar(
        share.indices,
        show=progress and distributed.is_main(),
        unit="picture",
        desc=f"classify by {model.name}",
        leave=False,
    ):
        path, truth = data.items[i]
        try:
            order = [place[name] for name in predictor.set_image(path).classify()]
        except InputError as error:
            if share.ends_with(error):
                break
            continue
        matrix[truth, order[0]] += 1
        in_five += truth in order[:5]
    skipped = share.gather()
    distributed.all_reduce_sum(matrix)
    distributed.all_reduce_sum(in_five)
    summary = {
        "model": model.name,
        "data": str(data.root),
        "pictures": int(matrix.sum()),
        "classes": count,
        "templates": predictor.queries.templates_for(model),
        **_figures(matrix, int(in_five[0])),
    }
    return Classification(summary, data.labels, matrix, skipped)


def _figures(matrix: np.ndarray, in_five: int) -> dict[str, float]:
    """Return top-1, top-5 and the mean over the classes that occur, in percent."""
    of_class = matrix.sum(1)
    pictures = int(of_class.sum())
    each = 100 * np.diag(matrix)[of_class > 0] / of_class[of_class > 0]
    return {
        "top1": round(100 * float(np.trace(matrix)) / pictures, 2),
        "top5": round(100 * float(in_five) / pictures, 2),
        "mean_top1": round(float(each.mean()), 2),
    }
