"""The demo on photographs: each model measured on real masks, and what all of them come to.

    voc14    names of VOC asked for alone
    voc21    the same pictures, 20 names and a background, which is any word of stuff
    coco32   names of COCO asked for alone, if its masks are there

Every run has its figures in ``measures.json``, from which the tables are made.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.benchmark_sets import SegmentationSet
from ..data.mask_files import IGNORE
from ..environment import environment
from ..errors import DataError, InputError
from ..inference import Predictor, Segmentation
from ..paths import no_folder
from ..replacing import file_for, write_text
from ..systems import from_pretrained
from .evaluate import evaluate
from .metrics import ConfusionMatrix
from .protocols import protocol
from .report import Report, rounded, table
from .scenes import save_gallery

logger = logging.getLogger(__name__)
MEASURES = "measures.json"
FILES = ("results.json", "table.md", "classes.md", "pictures.png", "worst.png", "loss.png")
# Of each set the part of the photographs, the protocol, and the figures of the table.
SETS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "voc14": ("voc", "plain", ("occurring_miou", "pixel_accuracy", "first_name_right")),
    "voc21": ("voc", "stuff", ("occurring_miou", "pixel_accuracy")),
    "coco32": ("coco_masks", "plain", ("occurring_miou", "pixel_accuracy", "first_name_right")),
}
_FIGURES = {
    "occurring_miou": "mIoU",
    "pixel_accuracy": "aAcc",
    "first_name_right": "first name right %",
}
_EFFORT = {
    "training_seconds": "training s",
    "encoding_seconds": "encoding s",
    "peak_megabytes": "peak MB so far",
}
_DRAWN = "voc21"
_ON_A_PAGE = 10


@dataclass(frozen=True)
class Measured:
    """A run as the results know it.

    Attributes:
        title: of its row.
        seed: of the run.
        folder: of the run.
        supervised: whether masks taught it.
    """

    title: str
    seed: int
    folder: Path
    supervised: bool = False


class SomePictures:
    """Some pictures of a set, as a set."""

    def __init__(self, data: SegmentationSet, numbers: Sequence[int]):
        self.description = data.description
        self.data = data
        self.numbers = list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[Any, np.ndarray]:
        return self.data[self.numbers[i]]


@dataclass
class PhotoResults:
    """Results so far, written after each run: a demo that is stopped leaves those that it has.

    Attributes:
        root: the photographs.
        out: the folder of the demo.
        runs: all that there will be, in the order of the table.
        limit: pictures of each set that are measured; None: all.
        quiet: whether no bar is shown.
        found: figures of the runs that have been measured.
        sets: by name.
    """

    root: Path
    out: Path
    runs: Sequence[Measured]
    limit: int | None = None
    quiet: bool = False
    found: dict[Measured, dict[str, Any]] = field(default_factory=dict)
    sets: dict[str, SegmentationSet] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in FILES:
            file_for(self.out / name, "--out needs a file, and")
        for name, (part, _, _) in SETS.items():
            if (what := no_folder(self.root / part)) is not None and part == "coco_masks":
                logger.warning("%s %s: nothing is measured on %s", self.root / part, what, name)
                continue
            self.sets[name] = SegmentationSet(name, self.root / part, partial=True)
        for run in self.runs:
            if (run.folder / MEASURES).exists():
                self.found[run] = self._earlier(run.folder / MEASURES)

    def _earlier(self, path: Path) -> dict[str, Any]:
        """Read the figures of a run that was measured before."""
        try:
            tree = json.loads(path.read_text("utf-8"))
            same = tree["limit"] == self.limit and list(tree["sets"]) == list(self.sets)
            tree["effort"]["training_seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is damaged ({error!r}); remove it, and the run is measured anew"
            ) from error
        if not same:
            raise InputError(
                f"{path} was made with other pictures (limit {tree['limit']}, sets "
                f"{list(tree['sets'])}); expected the same command again, a new --out, or the file "
                "removed"
            )
        return tree

    def measure(self, run: Measured, effort: Mapping[str, float]) -> None:
        """Measure a run that has been trained, and write the tables anew."""
        model = from_pretrained(run.folder / "model")
        sets = {}
        for name, data in self.sets.items():
            pictures: list[float | None] = []
            observe = _each(data, pictures) if name == _DRAWN else None
            report = self._report(model, data, name, observe=observe, limit=self.limit)
            found = {**report.to_dict(), "miou_of_pictures": pictures}
            miou = report.scores.occurring_miou
            found["summary"]["occurring_miou"] = rounded(miou)
            sets[name] = found
            logger.info("%s, seed %d, %s: %s", run.title, run.seed, name, miou)
        tree = {"limit": self.limit, "effort": dict(effort), "sets": sets}
        write_text(run.folder / MEASURES, json.dumps(tree) + "\n")
        self.found[run] = tree
        self.write()

    def _report(self, model: Any, data: Any, name: str, **options: Any) -> Report:
        chosen = protocol(SETS[name][1], data.description, model)
        return evaluate(model, data, chosen, progress=not self.quiet, **options)

    def write(self) -> None:
        """Write ``results.json``, ``table.md`` and ``classes.md`` of what has been measured."""
        by_title = self._by_title()
        runs = [
            {
                "row": run.title,
                "seed": run.seed,
                "supervised": run.supervised,
                **tree["effort"],
                **{name: _short(found) for name, found in tree["sets"].items()},
            }
            for run, tree in self._in_order()
        ]
        first = next(iter(self.found.values()))
        facts = {
            "root": str(self.root),
            "limit": self.limit,
            "means": {title: _means(trees) for title, trees in by_title.items()},
            "runs": runs,
            "protocols": {name: found["protocol"] for name, found in first["sets"].items()},
            "environment": environment(),
        }
        write_text(self.out / "results.json", json.dumps(facts, indent=1) + "\n")
        write_text(self.out / "table.md", self.table() + "\n")
        parts = [f"## {name}\n\n{self._classes(name)}\n" for name in first["sets"]]
        write_text(self.out / "classes.md", "\n".join(parts))

    def table(self) -> str:
        """Return the table: mean and, of several seeds, standard deviation."""
        rows = []
        for title, trees in self._by_title().items():
            row: dict[str, Any] = {"row": title, "seeds": len(trees)}
            rows.append(row | {key: _cell(*two) for key, two in _means(trees).items()})
        columns = {"row": "row", "seeds": "seeds"}
        for name, (_, _, figures) in SETS.items():
            columns |= {f"{name} {key}": f"{name} {_FIGURES[key]}" for key in figures}
        return table(rows, columns | _EFFORT)

    def _classes(self, name: str) -> str:
        """Return the mean IoU over seeds of each class, a column a row of the table."""
        by_title = self._by_title()
        classes = next(iter(self.found.values()))["sets"][name]["classes"]
        rows = []
        for one in classes:
            row: dict[str, Any] = {"class": one}
            for title, trees in by_title.items():
                ious = [tree["sets"][name]["classes"][one]["iou"] for tree in trees]
                known = [iou for iou in ious if iou is not None]
                row[title] = round(statistics.mean(known), 2) if known else None
            rows.append(row)
        return table(rows, {"class": "class", **{title: title for title in by_title}})

    def _in_order(self) -> list[tuple[Measured, dict[str, Any]]]:
        return [(run, self.found[run]) for run in self.runs if run in self.found]

    def _by_title(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for run, tree in self._in_order():
            found.setdefault(run.title, []).append(tree)
        return found

    def draw(self) -> list[Path]:
        """Draw evenly spaced pictures and the worst ones, labelled by the first seed's models.

        The worst are those of the row with the best mIoU that no mask has taught.
        """
        first = self.runs[0].seed
        runs = {run: tree for run, tree in self._in_order() if run.seed == first}
        data = self.sets[_DRAWN]
        count = min(len(data), self.limit or len(data))
        even = np.linspace(0, count - 1, min(count, _ON_A_PAGE)).round().astype(int).tolist()
        best = max(runs, key=lambda run: (not run.supervised, _miou(runs[run])))
        scores = runs[best]["sets"][_DRAWN]["miou_of_pictures"]
        known = [i for i, score in enumerate(scores) if score is not None]
        worst = sorted(known, key=lambda i: scores[i])[:_ON_A_PAGE]
        some = SomePictures(data, [*even, *worst])
        reports = {}
        for run in runs:
            model = from_pretrained(run.folder / "model")
            reports[run.title] = self._report(model, some, _DRAWN, keep=len(some))
        drawn = []
        for name, part in (
            ("pictures.png", slice(len(even))),
            ("worst.png", slice(len(even), None)),
        ):
            page = {t: replace(one, examples=one.examples[part]) for t, one in reports.items()}
            if some.numbers[part]:
                drawn.append(save_gallery(page, self.out / name))
        return [path for path in drawn if path]


def _each(
    data: SegmentationSet, scores: list[float | None]
) -> Callable[[int, Predictor, Segmentation], None]:
    """Return what notes of each picture the mean IoU of the names in it, None without any."""
    background = int(data.description.background)

    def observe(i: int, predictor: Predictor, found: Segmentation) -> None:
        matrix = ConfusionMatrix(data.classes, IGNORE, none=not background)
        truth = data[i][1]
        matrix.update(found.labels.astype(np.int64) + background, truth)
        named = set(np.unique(truth[truth != IGNORE]).tolist()) - set(range(background))
        scores.append(
            rounded(float(np.mean(matrix.scores().iou[sorted(named)]))) if named else None
        )

    return observe


def _short(found: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a set without its matrix and its protocol."""
    left_out = ("confusion", "protocol", "miou_of_pictures")
    return {key: value for key, value in found.items() if key not in left_out}


def _miou(tree: dict[str, Any]) -> float:
    return tree["sets"][_DRAWN]["summary"]["occurring_miou"] or 0.0


def _means(trees: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """Return mean and standard deviation over seeds of each figure; None of a single one."""
    values: dict[str, list[float]] = {}
    for tree in trees:
        for name, found in tree["sets"].items():
            for key in SETS[name][2]:
                if (value := found["summary"].get(key)) is not None:
                    values.setdefault(f"{name} {key}", []).append(value)
        for key in _EFFORT:
            values.setdefault(key, []).append(tree["effort"][key])
    return {
        key: (
            round(statistics.mean(some), 2),
            round(statistics.stdev(some), 2) if len(some) > 1 else None,
        )
        for key, some in values.items()
    }


def _cell(mean: float, deviation: float | None) -> str:
    """Say a mean in a table."""
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
