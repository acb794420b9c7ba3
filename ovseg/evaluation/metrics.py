"""Segmentation metrics from one confusion matrix over the whole data set.

The matrix is torchmetrics'; IoU is derived from it as mmsegmentation does: per class over all pixels of the data set,
classes that neither occur nor are predicted are left out of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ..errors import InputError


@dataclass
class Scores:
    """IoU per class and their means, in percent. NaN: the class neither occurs nor is predicted."""

    classes: tuple[str, ...]
    iou: np.ndarray
    accuracy: np.ndarray
    matrix: np.ndarray

    @property
    def miou(self) -> float:
        return _mean(self.iou)

    @property
    def pixel_accuracy(self) -> float:
        return 100 * float(np.trace(self.matrix)) / max(1, int(self.matrix.sum()))

    def miou_of(self, names: Sequence[str]) -> float:
        """Mean IoU over some classes, such as the seen ones."""
        return _mean(self.iou[[self.classes.index(name) for name in names]])


class ConfusionMatrix:
    """Integer counts [truth, prediction], summed over pictures; sums of several processes may be added.

    Args:
        classes: names in the order of the label integers.
        ignore_index: truth pixels with this value are left out.
    """

    def __init__(self, classes: Sequence[str], ignore_index: int = 255):
        self.classes, self.ignore_index = tuple(classes), ignore_index
        self.counts = np.zeros((len(self.classes), len(self.classes)), np.int64)

    def update(self, prediction: torch.Tensor | np.ndarray, truth: torch.Tensor | np.ndarray) -> None:
        """Add label maps of one shape.

        Raises:
            InputError: for unequal shapes, or labels outside the classes (in ``truth``, other than ignore_index).
        """
        prediction, truth = torch.as_tensor(prediction).long(), torch.as_tensor(truth).long()
        if prediction.shape != truth.shape:
            raise InputError(f"prediction has shape {list(prediction.shape)} and truth {list(truth.shape)}; expected one shape")
        kept = truth != self.ignore_index
        for name, x in (("prediction", prediction[kept]), ("truth", truth[kept])):
            if x.numel() and (int(x.min()) < 0 or int(x.max()) >= len(self.classes)):
                bad = x[(x < 0) | (x >= len(self.classes))]
                raise InputError(f"{name} holds label {int(bad[0])} on {len(bad)} pixels; expected 0 to "
                                 f"{len(self.classes) - 1}" + (f" or {self.ignore_index}" if name == "truth" else ""))
        if not bool(kept.any()):
            return
        counts = multiclass_confusion_matrix(prediction[kept], truth[kept], len(self.classes))
        self.counts += counts.numpy().astype(np.int64)

    def scores(self) -> Scores:
        hit, of_truth, of_prediction = np.diag(self.counts), self.counts.sum(1), self.counts.sum(0)
        union = of_truth + of_prediction - hit
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = np.where(union > 0, 100 * hit / union, np.nan)
            accuracy = np.where(of_truth > 0, 100 * hit / of_truth, np.nan)
        return Scores(self.classes, iou, accuracy, self.counts.copy())


def harmonic_mean(seen: float, unseen: float) -> float:
    """hIoU = 2 s u / (s + u); 0 if both are 0."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
