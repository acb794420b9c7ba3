"""Segmentation metrics from integer histograms over the whole data set.

Histograms of several processes are added.

IoU is derived from one confusion matrix as mmsegmentation does it, and the tests hold it to
torchmetrics: per class over all pixels of the data set; classes that neither occur nor are
predicted are left out of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import InputError


@dataclass
class Scores:
    """IoU per class and their means, in percent.

    NaN: the class neither occurs nor is predicted.

    Attributes:
        classes: names.
        iou, accuracy: [C]; accuracy is the share of a class's pixels that carry its label.
        matrix: [C, C] counts [truth, prediction], or [C, C + 1] where predictions may be no label
            at all.
    """

    classes: tuple[str, ...]
    iou: np.ndarray
    accuracy: np.ndarray
    matrix: np.ndarray

    @property
    def miou(self) -> float:
        """The mean IoU over the classes that occur or are predicted."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """The mean accuracy over the classes that occur, mAcc."""
        return _mean(self.accuracy)

    @property
    def pixel_accuracy(self) -> float:
        """The share of all pixels that are right, aAcc."""
        return 100 * float(np.trace(self.matrix)) / max(1, int(self.matrix.sum()))

    @property
    def occurring_miou(self) -> float:
        """The mean IoU over the classes that occur, whatever else is predicted."""
        return _mean(self.iou[self.matrix.sum(1) > 0])

    def miou_of(self, names: Sequence[str]) -> float:
        """Return the mean IoU over some classes, such as the seen ones."""
        return _mean(self.iou[[self.classes.index(name) for name in names]])


class ConfusionMatrix:
    """Integer counts [truth, prediction], summed over pictures.

    Sums of several processes may be added.

    Args:
        classes: names in the order of the label integers.
        ignore_index: truth pixels with this value are left out.
        none: whether a prediction may be -1, no label: wrong everywhere, counted in a column of its
            own.
    """

    def __init__(self, classes: Sequence[str], ignore_index: int = 255, *, none: bool = False):
        self.classes = tuple(classes)
        self.ignore_index = ignore_index
        self.none = none
        self.counts = np.zeros((len(self.classes), len(self.classes) + none), np.int64)

    def update(
        self, prediction: torch.Tensor | np.ndarray, truth: torch.Tensor | np.ndarray
    ) -> None:
        """Add label maps of one shape.

        Raises:
            InputError: for unequal shapes, or labels outside the classes (in ``truth``, other than
                ignore_index).
        """
        prediction, truth = kept_pixels(
            prediction, truth, len(self.classes), self.ignore_index, none=self.none
        )
        if not len(truth):
            return
        rows, columns = self.counts.shape
        prediction = torch.where(prediction < 0, rows, prediction)  # no label: the last column
        cells = truth * columns + prediction
        self.counts += torch.bincount(cells, minlength=rows * columns).view(rows, columns).numpy()

    def scores(self) -> Scores:
        """Return IoU and accuracy of the pixels so far."""
        square = self.counts[:, : len(self.classes)]
        hit = np.diag(square)
        of_truth = self.counts.sum(1)
        union = of_truth + square.sum(0) - hit
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = np.where(union > 0, 100 * hit / union, np.nan)
            accuracy = np.where(of_truth > 0, 100 * hit / of_truth, np.nan)
        return Scores(self.classes, iou, accuracy, self.counts.copy())


class FirstNameRight:
    """How often the name of the largest labelled area stands in the picture.

    The area is counted over the pixels that are scored, those whose truth is one of the names: what
    a model says about the rest, which it was not asked about, changes nothing. Of equal areas the
    class that comes first is taken. A picture stands for nothing where no class is in its truth,
    and is wrong where none of those pixels has a label.

    Args:
        ignore_index: truth pixels with this value say nothing.
        background: whether class 0 is no name.
    """

    def __init__(self, ignore_index: int = 255, *, background: bool = False):
        self.ignore_index = ignore_index
        self.first = int(background)
        self.counts = np.zeros(2, np.int64)  # pictures that are right, and all

    def update(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Add label maps of one picture; predictions of -1 are no label."""
        scored = (truth != self.ignore_index) & (truth >= self.first)
        there = truth[scored]
        if not there.size:
            return
        said = prediction[scored]
        areas = np.bincount(said[said >= self.first])
        right = areas.size > 0 and bool((there == areas.argmax()).any())
        self.counts += (int(right), 1)

    def share(self) -> float:
        """Return the share of pictures that are right, in percent; NaN without pictures."""
        right, pictures = self.counts
        return 100 * float(right) / int(pictures) if pictures else float("nan")


class BoundaryCounts:
    """Boundary IoU: IoU over the pixels that lie near a contour, in truth and in prediction.

        |G_c & P_c| / |G_c | P_c|

    G_c and P_c are the pixels of class c in truth and prediction within d of another label, or of
    the border of the picture (Cheng et al., arXiv:2103.16562). d is 2 % of the diagonal, in the
    chessboard distance of d erosions by 3 x 3. Pixels that are not counted bound their neighbours.

    Args:
        classes: names.
        ignore_index: truth pixels with this value are left out.
        share: d over the diagonal; d is at least one pixel.
    """

    def __init__(self, classes: Sequence[str], ignore_index: int = 255, *, share: float = 0.02):
        self.classes = tuple(classes)
        self.ignore_index = ignore_index
        self.share = share
        # In both, in the truth, in the prediction.
        self.counts = np.zeros((3, len(self.classes)), np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Add label maps of one shape; predictions of -1 are no label."""
        kept_pixels(prediction, truth, len(self.classes), self.ignore_index, none=True)
        distance = max(1, round(self.share * float(np.hypot(*truth.shape))))
        counted = truth != self.ignore_index
        near = contour_band(truth, distance) & counted
        guessed = contour_band(prediction, distance) & counted & (prediction >= 0)
        both = near & guessed & (truth == prediction)
        for row, labels in enumerate((truth[both], truth[near], prediction[guessed])):
            self.counts[row] += np.bincount(labels, minlength=len(self.classes))

    def iou(self) -> np.ndarray:
        """Return Boundary IoU of each class in percent, NaN where it has no contour."""
        both, of_truth, of_prediction = self.counts
        union = of_truth + of_prediction - both
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(union > 0, 100 * both / union, np.nan)


def contour_band(labels: np.ndarray, distance: int) -> np.ndarray:
    """Find the pixels with another label within ``distance`` in rows and columns.

    Outside of the picture is another label.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    labels = labels.astype(np.int32)
    around = {"size": 2 * distance + 1, "mode": "constant", "cval": -2}
    return minimum_filter(labels, **around) != maximum_filter(labels, **around)


class ThresholdSweep:
    """mIoU at every background threshold, from one pass.

    It counts [threshold bin of the winner's score, truth, prediction]. Exact at the thresholds: a
    pixel is background at t if its score is below t, as in the rule's ``background_threshold``.

    Args:
        classes: names; class 0 is background.
        thresholds: increasing.
        ignore_index: truth pixels with this value are left out.
    """

    def __init__(self, classes: Sequence[str], thresholds: np.ndarray, ignore_index: int = 255):
        self.classes = tuple(classes)
        self.ignore_index = ignore_index
        self.thresholds = np.asarray(thresholds, np.float64)
        if len(self.thresholds) < 1 or not (np.diff(self.thresholds) > 0).all():
            raise InputError(f"thresholds are {thresholds}; expected increasing numbers")
        self.counts = np.zeros(
            (len(self.thresholds) + 1, len(self.classes), len(self.classes)), np.int64
        )

    def update(self, prediction: np.ndarray, scores: np.ndarray, truth: np.ndarray) -> None:
        """Add label maps decided without a threshold, with the winners' scores."""
        C = len(self.classes)
        kept_pixels(prediction, truth, C, self.ignore_index)
        kept = truth != self.ignore_index
        # How many thresholds the score reaches.
        bins = np.searchsorted(self.thresholds, scores[kept].astype(np.float64), side="right")
        flat = (bins * C + truth[kept]) * C + prediction[kept]
        self.counts += np.bincount(flat, minlength=self.counts.size).reshape(self.counts.shape)

    def curve(self) -> np.ndarray:
        """Return mIoU in percent at each threshold."""
        found = []
        for i in range(len(self.thresholds)):
            matrix = ConfusionMatrix(self.classes)
            matrix.counts[:] = self.counts[i + 1 :].sum(0)
            matrix.counts[:, 0] += self.counts[: i + 1].sum((0, 2))
            found.append(matrix.scores().miou)
        return np.array(found)


def kept_pixels(
    prediction, truth, classes: int, ignore_index: int, *, none: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prediction and truth, [n], at the pixels that count, checked."""
    prediction = torch.as_tensor(prediction).long()
    truth = torch.as_tensor(truth).long()
    if prediction.shape != truth.shape:
        raise InputError(
            f"prediction has shape {list(prediction.shape)} and truth {list(truth.shape)}; "
            "expected one shape"
        )
    kept = truth != ignore_index
    prediction = prediction[kept]
    truth = truth[kept]
    for name, x, least in (("prediction", prediction, -1 if none else 0), ("truth", truth, 0)):
        if x.numel() and (int(x.min()) < least or int(x.max()) >= classes):
            bad = x[(x < least) | (x >= classes)]
            raise InputError(
                f"{name} holds label {int(bad[0])} on {len(bad)} pixels; expected {least} to "
                f"{classes - 1}" + (f" or {ignore_index}" if name == "truth" else "")
            )
    return prediction, truth


def harmonic_mean(seen: float, unseen: float) -> float:
    """Return 2 s u / (s + u), hIoU; 0 if both are 0, NaN if one is."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen != 0 else 0.0


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
