"""Several models on several data sets: measured, shown, and written into a folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import distributed
from ..bounds import AT_LEAST_0, AT_LEAST_1, bounded, check_bounds
from ..data.benchmark_sets import SegmentationSet, describe
from ..data.labels import LabelSet
from ..errors import InputError
from ..libraries import require
from ..output_lock import locked_folder
from ..paths import no_folder
from ..replacing import file_for, folder_for, write_text
from ..systems import OVSegModel
from . import scenes
from .classification import ClassFolders, Classification, evaluate_classification
from .evaluate import evaluate
from .plots import plot_classes, plot_confusion, plot_sweeps
from .protocols import Protocol, protocol
from .report import Report, class_table, table, write_results

Models = Callable[[], Iterable[tuple[str, OVSegModel]]]  # (title, model) of each, loaded in turn

CLASSIFICATION = "imagefolder"  # as a name of data
THRESHOLDS = 101  # of a sweep
_KEPT = 10  # examples of each report
_WIDEST = 160  # letters that are shown of a choice
logger = logging.getLogger(__name__)


@dataclass
class EvaluationJob:
    """Data sets to measure models on, by which protocol, and where the results go.

    Fields with a text are options of ``ovseg eval`` too. ``labels`` are texts of the classes in
    place of the protocol's, ``options`` fields of ``View``, ``Queries`` and of the rule in place of
    the protocol's; ``command`` and ``environment`` go into the results, and ``tell`` takes the
    lines of tables, one by one.
    """

    data: str = bounded(
        "digits",
        help="comma-separated: digits, shapes, digits_things, shapes_things; a benchmark; a .yaml "
        "description; imagefolder",
    )
    root: str | None = bounded(None, help="the folder that holds the benchmarks, or one of them")
    split: str = bounded("val", help="of the benchmarks (default: val)")
    partial: bool = bounded(
        False, help="a part of a benchmark's pictures will do; results say which part is there"
    )
    classes_only: str | None = bounded(
        None,
        help="comma-separated classes of a benchmark that are asked for alone: pixels of all "
        "others are not counted",
    )
    protocol: str = bounded(
        "plain", help="a named protocol (--list-protocols) or a .yaml file (default: plain)"
    )
    labels: LabelSet | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    present_only: bool = bounded(
        False, help="only the classes of a picture's truth compete in it (uses the truth)"
    )
    boundary: bool = bounded(False, help="Boundary IoU too")
    sweep: bool = bounded(False, help="mIoU at 101 background thresholds, in one pass")
    limit: int | None = bounded(None, AT_LEAST_1, "only so many pictures")
    skip_bad: bool = bounded(
        False,
        help="leave out pictures and masks that cannot be read, and say so; exit code 3",
    )
    batch: int = bounded(
        1,
        AT_LEAST_1,
        "pictures that are encoded together: faster on a GPU (default: 1)",
    )
    scenes: int = bounded(300, AT_LEAST_1, "of embedded data")
    seed: int = bounded(0, AT_LEAST_0, "of embedded data")
    out: str | None = bounded(
        None, help="folder for results.json, table.md, classes.csv and pictures"
    )
    plots: bool = bounded(False, help="confusion matrix and classes too, into --out")
    command: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    tell: Callable[[str], None] = logger.info

    def __post_init__(self) -> None:
        check_bounds(self, "", InputError)
        if self.plots and self.out is None:
            raise InputError(
                "--plots is given and --out is missing; expected a folder for the plots"
            )
        if self.out is not None:
            out = folder_for(self.out, "--out")
            for name in ("results.json", "table.md", "classes.csv", "gallery.png"):
                file_for(out / name, "--out needs a file, and")
        if self.root is not None and (what := no_folder(self.root)) is not None:
            raise InputError(
                f"--root {self.root!r} {what}; expected the folder that holds the data"
            )
        if self.plots:
            require("matplotlib", "--plots")
        if self.boundary:
            require("scipy", "--boundary")

    def sets(self) -> list[Any]:
        """Return the data sets.

        Raises:
            InputError: for an unknown name, and for a benchmark without ``root``.
        """
        found: list[Any] = []
        for name in self.data.split(","):
            if name in scenes.SCENE_SETS:
                _refuse_parts(self, name, "which is drawn")
                found.append(scenes.SceneSet(name, self.scenes, self.seed))
                continue
            about = describe(name)
            if self.classes_only is not None:
                about = about.alone([one.strip() for one in self.classes_only.split(",")])
            if self.root is None:
                raise InputError(f"--root is missing; expected the folder that holds {about.title}")
            found.append(
                SegmentationSet(
                    name, self.root, self.split, description=about, partial=self.partial
                )
            )
        return found


def _refuse_parts(job: EvaluationJob, name: str, why: str) -> None:
    """Refuse what only benchmarks on disk can be asked for."""
    if job.classes_only is not None or job.partial:
        option = "--partial" if job.partial else "--classes-only"
        raise InputError(f"{option} is given and data is {name!r}, {why}; expected a benchmark")


def measure(job: EvaluationJob, models: Models) -> list[str]:
    """Do the job, and show and write what it found; returns what was left out.

    Args:
        job: what is measured.
        models: gives (title, model) of each, on its device.
    """
    distributed.group()  # whoever does not come is known before anything is loaded
    held = nullcontext() if job.out is None else locked_folder(Path(job.out), "--out", "eval")
    with held:
        return _classify(job, models) if job.data == CLASSIFICATION else _segment(job, models)


def _segment(job: EvaluationJob, models: Models) -> list[str]:
    sets = job.sets()
    for data in sets:
        if distributed.is_main() and getattr(data, "partial", None) is not None:
            job.tell(f"{data.description.name}: partial: {data.partial} pictures are there")
    reports: dict[str, Report] = {}
    shown: dict[str, Any] = {}
    for data in sets:
        for title, model in models():
            chosen = protocol(
                job.protocol,
                data.description,
                model,
                labels=job.labels,
                present_only=job.present_only,
                **job.options,
            )
            choices = chosen.choices(model, data.description)
            if distributed.is_main() and choices != shown:
                _tell_choices(job, title, choices)
                shown = choices
            report = _report(job, data, model, chosen)
            report.summary["model"] = title
            name = data.description.name
            reports[title if len(sets) == 1 else f"{title} {name}"] = report
            if distributed.is_main():
                logger.info("%s on %s: mIoU %s", title, name, report.summary["miou"])
                if job.out is not None:  # what is done outlives a run that is stopped
                    _write(job, reports)
    rows = list(reports.values())
    skipped = [line for report in rows for line in report.skipped]
    if distributed.is_main():
        job.tell(table([report.summary for report in rows]))
        if len(rows) == 1:
            job.tell("\n" + class_table(rows[0]))
        for line in dict.fromkeys(skipped):  # models share data
            job.tell(f"left out: {line}")
        if job.out is not None:
            for path in (*_write(job, reports), *_draw(job, sets, reports)):
                job.tell(str(path))
    return skipped


def _report(job: EvaluationJob, data: Any, model: OVSegModel, chosen: Protocol) -> Report:
    """Evaluate a model on a data set by a protocol."""
    # Without a range of scores the sweep is refused.
    _, top = chosen.decision.score_range or (0.0, 1.0)
    scored: dict[str, Any] = {
        "boundary": job.boundary,
        "thresholds": np.linspace(0, top, THRESHOLDS) if job.sweep else None,
        "limit": job.limit,
        "skip_bad": job.skip_bad,
        "keep": _KEPT,
        "progress": True,
        "batch": job.batch,
    }
    if isinstance(data, scenes.SceneSet):
        return scenes.evaluate_scene_set(model, data, chosen=chosen, **scored)
    data.max_pixels = chosen.view.max_pixels  # one limit: of what is read and of what is seen
    return evaluate(model, data, chosen, **scored)


def _tell_choices(job: EvaluationJob, title: str, choices: dict[str, Any]) -> None:
    """Tell the protocol line by line; long lists are cut, results.json has them whole."""
    job.tell(f"{title}:")
    for key, value in choices.items():
        if key in ("settings", "class_texts") or value in (None, [], {}, 0.0, False):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        cut = text if len(text) < _WIDEST else text[: _WIDEST - 3] + "..."
        job.tell(f"  {key:18} {cut}")


def _write(job: EvaluationJob, reports: dict[str, Report]) -> list[Path]:
    facts = {"command": job.command, "environment": job.environment}
    return write_results(list(reports.values()), Path(str(job.out)), **facts)


def _draw(job: EvaluationJob, sets: list[Any], reports: dict[str, Report]) -> list[Path]:
    """Draw the pictures of all reports; returns the files of those that could be drawn."""
    out = Path(str(job.out))
    drawn: list[Path | None] = []
    for data in sets:
        some = {title: one for title, one in reports.items() if one.data is data.description}
        stem = "" if len(sets) == 1 else f"{data.description.name}_"
        drawn.append(scenes.save_gallery(some, out / f"{stem}gallery.png"))
        if job.sweep:
            drawn.append(plot_sweeps(some, out / f"{stem}sweep.png"))
        for title, report in some.items() if job.plots else ():
            name = title.replace("/", "_").replace(" ", "_")
            drawn.append(plot_confusion(report, out / f"{name}_confusion.png"))
            drawn.append(plot_classes(report, out / f"{name}_classes.png"))
    return [path for path in drawn if path]


def _classify(job: EvaluationJob, models: Models) -> list[str]:
    _refuse_parts(job, CLASSIFICATION, "which has no masks")
    if job.root is None:
        raise InputError(
            "--root is missing; expected a folder with a sub-folder of pictures for each class"
        )
    data = ClassFolders(job.root, job.labels)
    found: list[Classification] = []
    file = None if job.out is None else Path(job.out) / "results.json"
    for title, model in models():
        result = evaluate_classification(
            model, data, skip_bad=job.skip_bad, limit=job.limit, progress=True, **job.options
        )
        result.summary["model"] = title
        found.append(result)
        if distributed.is_main() and file is not None:
            rows = {"command": job.command, "results": [one.to_dict() for one in found]}
            write_text(file, json.dumps(rows, indent=1))
    if distributed.is_main():
        columns = {name: name for name in ("model", "data", "pictures", "classes")}
        columns |= {"top1": "top-1", "top5": "top-5", "mean_top1": "mean over classes"}
        columns["templates"] = "templates"
        job.tell(table([result.summary for result in found], columns))
        for line in found[0].skipped:
            job.tell(f"left out: {line}")
        if file is not None:
            job.tell(str(file))
    return found[0].skipped
