"""Evaluate a model on a data set by a protocol: one pass, integer histograms, one process or
several.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import numpy as np
import torch
from PIL import Image

from .. import distributed
from ..bounds import POSITIVE
from ..data.benchmark_sets import IGNORE, SetDescription
from ..errors import DataError, InputError
from ..inference import Predictor, Segmentation
from ..inference.predictor import Seen
from ..inference.reading import Prepared, read_ahead
from ..progress import bar
from ..replacing import write_text
from ..systems import OVSegModel
from ..weights.state_dicts import unwrapped
from .metrics import BoundaryCounts, ConfusionMatrix, Scores, ThresholdSweep, harmonic_mean
from .protocols import Protocol

logger = logging.getLogger(__name__)


class EvaluationSet(Interface):
    """Pictures with truths: a ``SegmentationSet``, the scenes, or one of yours."""

    description: SetDescription

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """(picture, truth [H, W]); -1 is not counted."""


@dataclass
class Report:
    """What an evaluation found.

    Attributes:
        model, data: names.
        choices: the whole protocol.
        scores: of all classes, the background included.
        summary: the figures of tables.
        pictures, skipped: how many were counted, and which could not be.
        boundary: Boundary IoU of each class, if asked for.
        sweep: thresholds and mIoU at each, if asked for.
        examples: (picture, truth, prediction) of the first pictures, as class indices.
    """

    model: str
    data: SetDescription
    choices: dict[str, Any]
    scores: Scores
    summary: dict[str, Any]
    pictures: int
    skipped: list[str]
    boundary: np.ndarray | None = None
    sweep: tuple[np.ndarray, np.ndarray] | None = None
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For ``results.json``: summary, classes, what was left out and the whole protocol."""
        rows = {}
        for i, name in enumerate(self.scores.classes):
            rows[name] = {
                "iou": rounded(self.scores.iou[i]),
                "accuracy": rounded(self.scores.accuracy[i]),
            }
            if self.boundary is not None:
                rows[name]["boundary_iou"] = rounded(self.boundary[i])
        found: dict[str, Any] = {
            "summary": self.summary,
            "pictures": self.pictures,
            "skipped": self.skipped,
            "classes": rows,
        }
        if self.sweep is not None:
            found["sweep"] = {
                "threshold": [round(float(t), 6) for t in self.sweep[0]],
                "miou": [rounded(v) for v in self.sweep[1]],
            }
        return {**found, "protocol": self.choices, "confusion": self.scores.matrix.tolist()}


@torch.no_grad()
def evaluate(
    model: OVSegModel,
    data: EvaluationSet,
    protocol: Protocol,
    *,
    boundary: bool = False,
    thresholds: np.ndarray | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    keep: int = 0,
    progress: bool = False,
    batch: int = 1,
    observe: Callable[[int, Predictor, Segmentation], None] | None = None,
) -> Report:
    """Label every picture and compare.

    In several processes (``torchrun``) each takes its share of the pictures and the counts are
    added; every process returns the same report, with the examples of its own share.

    Args:
        model: on its device; put into eval mode, which is logged, if it is in train mode.
        data: pictures and truths.
        protocol: of ``protocols.protocol`` for this data set and model.
        boundary: Boundary IoU too.
        thresholds: background thresholds to try, in one pass; the protocol's own is not applied to
            the sweep.
        limit: only the first pictures.
        skip_bad: pictures and masks that cannot be read are left out and named; otherwise they end
            the evaluation.
        keep: examples to keep.
        batch: pictures that are encoded together. Faster on a GPU; with 1, several processes give
            the figures of one to the last pixel.
        observe: called for each picture of this process.

    Raises:
        DataError: for a picture or mask that cannot be read, unless ``skip_bad``; if nothing is
            left.
        InputError: for a sweep where it means nothing, and a ``batch`` or ``limit`` that is no
            positive integer.
    """
    POSITIVE.check("batch", batch, InputError)
    POSITIVE.check("limit", limit, InputError)
    about, decision = data.description, protocol.decision
    classes = about.classes or protocol.labels.names
    sweeping, own_threshold = None, getattr(decision, "background_threshold", None)
    if not about.background and (rules := background_rules(protocol)) and distributed.rank() == 0:
        logger.warning(
            "%s has no background class, and pixels get no label where %s: they all count as wrong",
            about.name,
            " or ".join(rules),
        )
    model = unwrapped(model)
    predictor = protocol.predictor(model)
    if thresholds is not None:
        if not about.background or decision.score_range is None:
            why = (
                f"is labelled by the {decision.name} of {model.name}, whose threshold is relative"
                if about.background
                else ("has no background class")
            )
            raise InputError(
                f"a sweep of background thresholds was asked for and {about.name} {why}"
            )
        sweeping = ThresholdSweep(classes, thresholds, IGNORE)
        predictor.decision = replace(decision, background_threshold=None)  # type: ignore[call-arg]
    matrix = ConfusionMatrix(classes, IGNORE, none=not about.background)
    bands = BoundaryCounts(classes, IGNORE) if boundary else None
    rank, world = distributed.rank(), distributed.world_size()
    total = len(data) if limit is None else min(limit, len(data))
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    skipped: list[str] = []
    failure: Exception | None = None
    shown = bar(
        total=len(range(rank, total, world)),
        show=progress and rank == 0,
        unit="picture",
        desc=f"evaluate {model.name} on {about.name}",
        leave=False,
    )
    for i, image, truth, seen in _seen(data, range(rank, total, world), predictor, batch):
        shown.update()
        if isinstance(seen, Exception):
            if skip_bad:
                skipped.append(str(seen))
                continue
            failure = seen
            break
        found = predictor.set_image(seen).predict(
            allowed=_present(truth, about, protocol) if protocol.present_only else None
        )
        labels = found.labels.astype(np.int64) + int(
            about.background
        )  # -1 becomes class 0 where that is the background
        if sweeping is not None:
            sweeping.update(labels, found.scores, truth)
            if own_threshold is not None:
                labels = np.where(found.scores < own_threshold, 0, labels)
        matrix.update(labels, truth)
        if bands is not None:
            bands.update(labels, truth)
        if len(examples) < keep:
            examples.append((np.asarray(image), truth, labels))
        if observe is not None:
            observe(i, predictor, found)
    shown.close()
    failures = distributed.gather_strings([str(failure)] if failure else [])
    if failures:
        raise DataError(
            f"{failures[0]}; --skip-bad leaves such pictures out, and says so in the results"
        )
    skipped = distributed.gather_strings(skipped)
    if len(skipped) >= total:
        raise DataError(
            f"{about.name}: none of {total} pictures could be used; the first: "
            f"{skipped[0] if skipped else 'there is none'}"
        )
    for counted in (matrix, bands, sweeping):
        if counted is not None:
            distributed.all_reduce_sum(counted.counts)
    scores = matrix.scores()
    band_iou = None if bands is None else bands.iou()
    curve = None if sweeping is None else (sweeping.thresholds, sweeping.curve())
    counted_pictures = total - len(skipped)
    summary = _summary(model, about, protocol, scores, band_iou, curve, counted_pictures)
    choices = protocol.choices(model, about)
    return Report(
        model.name,
        about,
        choices,
        scores,
        summary,
        counted_pictures,
        skipped,
        band_iou,
        curve,
        examples,
    )


def background_rules(protocol: Protocol) -> list[str]:
    """In words, when a pixel gets no label by a protocol."""
    texts = protocol.queries.rivals
    return (
        [f"one of {len(texts)} background texts wins"] if texts else []
    ) + protocol.decision.background_rules()


def _seen(
    data: EvaluationSet, indices: range, predictor: Predictor, batch: int
) -> Iterator[tuple[int, Any, Any, Seen | Exception]]:
    """(index, picture, truth, what the model saw), the error in place of the last for those that
    cannot be read. Read ahead in a thread.
    """

    def read(i: int):
        try:
            image, truth = data[i]
            return image, truth, predictor.prepare(image)
        except (DataError, InputError) as error:
            return None, None, error

    for some in read_ahead(indices, read, batch, readers=1):
        seen = iter(predictor.see([one for _, (_, _, one) in some if isinstance(one, Prepared)]))
        for i, (image, truth, one) in some:
            yield i, image, truth, next(seen) if isinstance(one, Prepared) else one


def _present(truth: np.ndarray, about: SetDescription, protocol: Protocol) -> list[str]:
    present = set(np.unique(truth[truth != IGNORE]).tolist())
    return [name for i, name in enumerate(protocol.labels.names) if i + about.background in present]


def _summary(model, about, protocol, scores, band_iou, curve, pictures) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": model.name,
        "data": about.name,
        "protocol": protocol.label,
        "pictures": pictures,
        "miou": scores.miou,
        "mean_accuracy": scores.mean_accuracy,
        "pixel_accuracy": scores.pixel_accuracy,
    }
    if about.unseen:
        seen = [
            name for name in scores.classes[int(about.background) :] if name not in about.unseen
        ]
        found |= {"seen_miou": scores.miou_of(seen), "unseen_miou": scores.miou_of(about.unseen)}
        found["hiou"] = harmonic_mean(found["seen_miou"], found["unseen_miou"])
    if band_iou is not None:
        found["boundary_miou"] = (
            float(np.nanmean(band_iou)) if np.isfinite(band_iou).any() else float("nan")
        )
    if curve is not None:
        best = int(np.nanargmax(curve[1]))
        found |= {"best_threshold": float(curve[0][best]), "best_miou": float(curve[1][best])}
    return {
        key: rounded(value) if isinstance(value, float) and key != "best_threshold" else value
        for key, value in found.items()
    }


def rounded(value: float) -> float | None:
    """Two digits; None for a mean over classes that do not occur."""
    return None if np.isnan(value) else round(float(value), 2)


_COLUMNS = {
    "model": "model",
    "data": "data",
    "protocol": "protocol",
    "pictures": "pictures",
    "miou": "mIoU",
    "mean_accuracy": "mAcc",
    "pixel_accuracy": "aAcc",
    "seen_miou": "seen mIoU",
    "unseen_miou": "unseen mIoU",
    "hiou": "hIoU",
    "stuff_miou": "stuff mIoU",
    "boundary_miou": "boundary IoU",
    "best_threshold": "best threshold",
    "best_miou": "mIoU there",
    "things_called_stuff": "things called stuff %",
    "classification": "top-1 %",
    "train_seconds": "training s",
}


def table(rows: list[dict[str, Any]], columns: dict[str, str] | None = None) -> str:
    """Summaries as a Markdown table; columns that no row has are left out."""
    names = columns or _COLUMNS
    shown = [key for key in names if any(row.get(key) is not None for row in rows)]
    lines = ["| " + " | ".join(names[key] for key in shown) + " |", "|" + "---|" * len(shown)]
    lines += [
        "| "
        + " | ".join(
            ""
            if row.get(key) is None
            else f"{row[key]:.4g}"
            if isinstance(row[key], float)
            else str(row[key])
            for key in shown
        )
        + " |"
        for row in rows
    ]
    return "\n".join(lines)


def class_table(report: Report) -> str:
    """IoU and accuracy of each class."""
    rows = [
        {
            "class": name,
            "iou": rounded(report.scores.iou[i]),
            "acc": rounded(report.scores.accuracy[i]),
            "band": None if report.boundary is None else rounded(report.boundary[i]),
            "split": "unseen"
            if name in report.data.unseen
            else "seen"
            if report.data.unseen
            else None,
        }
        for i, name in enumerate(report.scores.classes)
    ]
    return table(
        rows,
        {
            "class": "class",
            "split": "split",
            "iou": "IoU",
            "acc": "accuracy",
            "band": "boundary IoU",
        },
    )


def write_results(reports: list[Report], out: Path, **facts: Any) -> list[Path]:
    """``results.json`` (everything), ``table.md`` and ``classes.csv`` (IoU of every class in every
    row).
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text(
        out / "results.json",
        json.dumps({**facts, "results": [report.to_dict() for report in reports]}, indent=1) + "\n",
    )
    write_text(out / "table.md", table([report.summary for report in reports]) + "\n")
    lines = ["model,data,protocol,class,iou,accuracy"]
    for report in reports:
        for i, name in enumerate(report.scores.classes):
            row = [
                report.summary["model"],
                report.data.name,
                report.summary["protocol"],
                f'"{name}"',
                rounded(report.scores.iou[i]),
                rounded(report.scores.accuracy[i]),
            ]
            lines.append(",".join("" if value is None else str(value) for value in row))
    write_text(out / "classes.csv", "\n".join(lines) + "\n")
    return [out / name for name in ("results.json", "table.md", "classes.csv")]
