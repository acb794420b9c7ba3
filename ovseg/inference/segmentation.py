"""A label map and the forms it is written in: overlay, index mask, JSON, RLE. All are made in blocks, without a copy of the whole map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.own_results import png_mark
from ..errors import InputError
from ..replacing import file_for
from .pictures import blocks, count_labels, overlay, palette

_MOST_IN_MASK = 65535  # 16 bits, the last for background


@dataclass
class Segmentation:
    """A label map at the size of the picture.

    Attributes:
        image: the picture, RGB.
        names: the labels asked for.
        labels: int16 [H, W], int32 for more than 32768 names; index into ``names``, -1 is background.
        scores: float32 [H, W] of the winner, before the background was decided: its cosine, or what the activation made of it.
    """

    image: Image.Image
    names: list[str]
    labels: np.ndarray
    scores: np.ndarray

    @property
    def areas(self) -> dict[str, float]:
        """Share of the picture of each label."""
        counts = count_labels(self.labels, len(self.names))
        return {name: float(count / self.labels.size) for name, count in zip(self.names, counts[1:], strict=True)}

    def overlay(self, alpha: float = 0.55, legend: bool = True) -> Image.Image:
        return overlay(self.image, self.labels, self.names, alpha=alpha, legend=legend)

    def save(self, path: str | Path, *, alpha: float = 0.55, legend: bool = True) -> Path:
        """Write the overlay; the format follows the suffix."""
        path = file_for(path, "path")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.overlay(alpha, legend).save(path, **png_mark(path))
        except ValueError as error:
            raise InputError(f"cannot save {str(path)!r}: {error}; expected a suffix such as .png") from error
        return path

    def save_mask(self, path: str | Path) -> Path:
        """Write the indices as PNG: 8 bits with the overlay's palette and 255 for background; beyond 255 labels 16 bits, grey, 65535."""
        path = file_for(path, "path")
        if len(self.names) > _MOST_IN_MASK:
            raise InputError(f"a mask holds at most {_MOST_IN_MASK} labels and there are {len(self.names)}; expected another format")
        path.parent.mkdir(parents=True, exist_ok=True)
        wide = len(self.names) > 255
        values = self.labels.astype(np.uint16 if wide else np.uint8)
        for rows in blocks(self.labels.shape):
            values[rows][self.labels[rows] < 0] = _MOST_IN_MASK if wide else 255
        mask = Image.fromarray(values) if wide else Image.fromarray(values, "L")
        if not wide:
            mask.putpalette(np.concatenate([palette(255), np.zeros((1, 3), np.uint8)]).tobytes())
        mask.save(path, **png_mark(path))
        return path

    def to_dict(self) -> dict[str, Any]:
        """Areas and scores for JSON: of each label its share of the picture, its pixels and the mean score on them (null without)."""
        pixels, means = self._tally()
        rows = [{"label": name, "index": i, "area": round(pixels[i + 1] / self.labels.size, 6), "pixels": pixels[i + 1], "score": means[i]}
                for i, name in enumerate(self.names)]
        return {"width": self.labels.shape[1], "height": self.labels.shape[0], "labels": rows,
                "background": {"area": round(pixels[0] / self.labels.size, 6), "pixels": pixels[0]}}

    def to_rle(self) -> list[dict[str, Any]]:
        """COCO's uncompressed run-length code of each label that occurs: counts down the columns, beginning with zeros.

        ``pycocotools.mask.frPyObjects(row["segmentation"], *row["segmentation"]["size"])`` compresses it.
        """
        return list(self.rle_rows())

    def rle_rows(self) -> Iterator[dict[str, Any]]:
        """``to_rle``, one label at a time."""
        _, means = self._tally()
        label, start = _runs(self.labels)
        end = np.append(start[1:], self.labels.size)
        order = np.argsort(label, kind="stable")
        of_label = np.searchsorted(label[order], np.arange(len(self.names) + 1))
        for i, name in enumerate(self.names):
            runs = order[of_label[i] : of_label[i + 1]]
            if not len(runs):
                continue
            edges = np.stack([start[runs], end[runs]], 1).ravel()
            counts = np.diff(edges, prepend=0)
            counts = counts if edges[-1] == self.labels.size else np.append(counts, self.labels.size - edges[-1])
            yield {"label": name, "index": i, "score": means[i],
                   "segmentation": {"size": list(self.labels.shape), "counts": counts.tolist()}}

    def _tally(self) -> tuple[list[int], list[float | None]]:
        """(pixels of the background and of each label, mean score of each label: None without pixels)."""
        pixels, sums = count_labels(self.labels, len(self.names)), np.zeros(len(self.names) + 1)
        for rows in blocks(self.labels.shape):
            sums += np.bincount(self.labels[rows].ravel().astype(np.int64) + 1, self.scores[rows].ravel(), len(sums))
        means = [round(float(total / count), 6) if count else None for total, count in zip(sums[1:], pixels[1:], strict=True)]
        return pixels.tolist(), means


def _runs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(label, first place) of every run down the columns, one column after the other."""
    height, found, starts, last = len(labels), [], [], None
    for columns in blocks(labels.shape[::-1]):
        flat = np.ascontiguousarray(labels[:, columns].T).ravel()
        first = np.flatnonzero(np.concatenate([[last is None or flat[0] != last], flat[1:] != flat[:-1]]))
        found.append(flat[first])
        starts.append(first + columns.start * height)
        last = flat[-1]
    return np.concatenate(found), np.concatenate(starts)
