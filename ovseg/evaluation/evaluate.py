"""Evaluate a model on a data set by a protocol.

It takes one pass, counts in integer histograms, and runs in one process or several.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from typing import Protocol as Interface

import numpy as np
import torch
from PIL import Image

from .. import distributed
from ..bounds import POSITIVE
from ..data.benchmark_sets import SetDescription
from ..data.mask_files import IGNORE
from ..errors import DataError, InputError
from ..inference import Predictor, Segmentation
from ..inference.predictor import Seen
from ..inference.reading import Prepared, read_ahead
from ..progress import bar
from ..systems import OVSegModel
from ..weights.state_dicts import unwrapped
from .metrics import (
    BoundaryCounts,
    ConfusionMatrix,
    FirstNameRight,
    Scores,
    ThresholdSweep,
    harmonic_mean,
)
from .protocols import Protocol
from .report import Report, rounded

logger = logging.getLogger(__name__)


class EvaluationSet(Interface):
    """Pictures with truths: a ``SegmentationSet``, the scenes, or one of yours."""

    description: SetDescription

    def __len__(self) -> int:
        """Return the number of pictures."""

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """Return (picture, truth [H, W]); -1 is not counted."""


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
    """Label every picture and compare it with its truth.

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
        progress: whether a bar is shown.
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
    about = data.description
    rules = [] if about.background else background_rules(protocol)
    if rules and distributed.is_main():
        logger.warning(
            "%s has no background class, and pixels get no label where %s: they all count as wrong",
            about.name,
            " or ".join(rules),
        )
    model = unwrapped(model)
    predictor = protocol.predictor(model)
    counts = _Counts.of(protocol, about, model, boundary, thresholds)
    if counts.sweep is not None:  # which decides by the scores
        decision: Any = protocol.decision
        predictor.decision = replace(decision, background_threshold=None)
    share = Share(about.name, len(data), limit, skip_bad)
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    shown = bar(
        total=len(share.indices),
        show=progress and distributed.is_main(),
        unit="picture",
        desc=f"evaluate {model.name} on {about.name}",
        leave=False,
    )
    for i, image, truth, seen in _seen(data, share.indices, predictor, batch):
        shown.update()
        if isinstance(seen, Exception):
            if share.ends_with(seen):
                break
            continue
        allowed = _present(truth, about, protocol) if protocol.present_only else None
        found = predictor.set_image(seen).predict(allowed=allowed)
        labels = counts.update(found, truth)
        if len(examples) < keep:
            examples.append((np.asarray(image), truth, labels))
        if observe is not None:
            observe(i, predictor, found)
    shown.close()
    skipped = share.gather()
    counts.add_up()
    report = Report(
        model=model.name,
        data=about,
        choices=protocol.choices(model, about),
        scores=counts.matrix.scores(),
        summary={},
        pictures=share.total - len(skipped),
        skipped=skipped,
        boundary=None if counts.bands is None else counts.bands.iou(),
        sweep=None if counts.sweep is None else (counts.sweep.thresholds, counts.sweep.curve()),
        examples=examples,
        partial=getattr(data, "partial", None),
        first_name_right=None if counts.first_names is None else counts.first_names.share(),
    )
    report.summary = _summary(report, protocol.label)
    return report


class Share:
    """The pictures of a data set that this process measures, and those that cannot be read.

    Args:
        name: of the data set, for messages.
        count: its pictures.
        limit: only the first.
        skip_bad: whether what cannot be read is left out.
        bad: what is known to be left out beside them, told by the first process.

    Attributes:
        total: pictures of all processes.
        indices: of those of this process.
    """

    def __init__(
        self, name: str, count: int, limit: int | None, skip_bad: bool, bad: Sequence[str] = ()
    ):
        self.name = name
        self.skip_bad = skip_bad
        self.total = count if limit is None else min(limit, count)
        self.indices = range(distributed.rank(), self.total, distributed.world_size())
        self._known = len(bad)
        self._skipped = list(bad) if distributed.is_main() else []
        self._failures: list[str] = []

    def ends_with(self, error: Exception) -> bool:
        """Note what cannot be read; returns whether that is the end."""
        (self._skipped if self.skip_bad else self._failures).append(str(error))
        return not self.skip_bad

    def gather(self) -> list[str]:
        """Return what all processes left out.

        Raises:
            DataError: if a picture that could not be read was the end, or nothing is left.
        """
        refuse_bad(distributed.gather_strings(self._failures))
        skipped = distributed.gather_strings(self._skipped)
        if len(skipped) - self._known >= self.total:
            raise DataError(
                f"{self.name}: none of {self.total} pictures could be used; the first: "
                f"{skipped[0] if skipped else 'there is none'}"
            )
        return skipped


def refuse_bad(lines: Sequence[str]) -> None:
    """Refuse pictures that cannot be read.

    Raises:
        DataError: naming the first.
    """
    if lines:
        raise DataError(
            f"{lines[0]}; --skip-bad leaves such pictures out, and says so in the results"
        )


@dataclass
class _Counts:
    """The histograms of one pass.

    Attributes:
        matrix: of all pixels.
        bands: of the pixels near contours, if asked for.
        sweep: by the winner's score, if thresholds are to be tried.
        first_names: of pictures, where names are asked for alone.
        threshold: of the protocol, which does not act on ``sweep``.
        background: whether the data set has a class for what is no other; it is class 0.
    """

    matrix: ConfusionMatrix
    bands: BoundaryCounts | None
    sweep: ThresholdSweep | None
    first_names: FirstNameRight | None
    threshold: float | None
    background: bool

    @classmethod
    def of(
        cls,
        protocol: Protocol,
        about: SetDescription,
        model: OVSegModel,
        boundary: bool,
        thresholds: np.ndarray | None,
    ) -> _Counts:
        """Return empty histograms.

        Raises:
            InputError: for thresholds where they mean nothing.
        """
        decision = protocol.decision
        classes = about.classes or protocol.labels.names
        why = "has no background class"
        if about.background:
            why = f"is labelled by the {decision.name} of {model.name}, whose threshold is relative"
        if thresholds is not None and (not about.background or decision.score_range is None):
            raise InputError(
                f"a sweep of background thresholds was asked for and {about.name} {why}"
            )
        return cls(
            ConfusionMatrix(classes, IGNORE, none=not about.background),
            BoundaryCounts(classes, IGNORE) if boundary else None,
            None if thresholds is None else ThresholdSweep(classes, thresholds, IGNORE),
            FirstNameRight(IGNORE, background=about.background) if about.foreground else None,
            getattr(decision, "background_threshold", None),
            about.background,
        )

    def update(self, found: Segmentation, truth: np.ndarray) -> np.ndarray:
        """Count a picture; returns its labels as class indices."""
        # -1 becomes class 0 where that is the background.
        labels = found.labels.astype(np.int64) + int(self.background)
        if self.sweep is not None:
            self.sweep.update(labels, found.scores, truth)
            if self.threshold is not None:
                labels = np.where(found.scores < self.threshold, 0, labels)
        self.matrix.update(labels, truth)
        if self.bands is not None:
            self.bands.update(labels, truth)
        if self.first_names is not None:
            self.first_names.update(labels, truth)
        return labels

    def add_up(self) -> None:
        """Add the counts of all processes."""
        for one in (self.matrix, self.bands, self.sweep, self.first_names):
            if one is not None:
                distributed.all_reduce_sum(one.counts)


def background_rules(protocol: Protocol) -> list[str]:
    """Say in words when a pixel gets no label by a protocol."""
    texts = protocol.queries.rivals
    of_texts = [f"one of {len(texts)} background texts wins"] if texts else []
    return of_texts + protocol.decision.background_rules()


def _seen(
    data: EvaluationSet, indices: range, predictor: Predictor, batch: int
) -> Iterator[tuple[int, Any, Any, Seen | Exception]]:
    """Yield (index, picture, truth, what the model saw), read ahead in a thread.

    The error stands in place of the last for what cannot be read.
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
    """Return the names of the classes of a truth, without the background."""
    present = set(np.unique(truth[truth != IGNORE]).tolist())
    return [name for i, name in enumerate(protocol.labels.names) if i + about.background in present]


def _summary(report: Report, protocol: str) -> dict[str, Any]:
    """Return the figures of tables."""
    scores: Scores = report.scores
    about = report.data
    found: dict[str, Any] = {
        "model": report.model,
        "data": about.name,
        "protocol": protocol,
        "pictures": report.pictures,
        "miou": scores.miou,
        "mean_accuracy": scores.mean_accuracy,
        "pixel_accuracy": scores.pixel_accuracy,
    }
    if about.unseen:
        named = scores.classes[int(about.background) :]
        seen = [name for name in named if name not in about.unseen]
        found |= {"seen_miou": scores.miou_of(seen), "unseen_miou": scores.miou_of(about.unseen)}
        found["hiou"] = harmonic_mean(found["seen_miou"], found["unseen_miou"])
    if report.first_name_right is not None or report.partial is not None:
        found["occurring_miou"] = scores.occurring_miou
    if report.first_name_right is not None:
        found["first_name_right"] = report.first_name_right
    if report.boundary is not None:
        some = np.isfinite(report.boundary).any()
        found["boundary_miou"] = float(np.nanmean(report.boundary)) if some else float("nan")
    if report.sweep is not None:
        thresholds, curve = report.sweep
        best = int(np.nanargmax(curve))
        found |= {"best_threshold": float(thresholds[best]), "best_miou": float(curve[best])}
    return {
        key: rounded(value) if isinstance(value, float) and key != "best_threshold" else value
        for key, value in found.items()
    }
