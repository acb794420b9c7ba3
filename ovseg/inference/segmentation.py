"""A label map and the forms it is written in: overlay, index mask, JSON, RLE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError
from .pictures import overlay, palette


@dataclass
class Segmentation:
    """A label map at the size of the picture.

    Attributes:
        image: the picture, RGB.
        names: the labels asked for.
        labels: int16 [H, W], index into ``names``; -1 is background.
        scores: float32 [H, W] of the winner, before the background was decided: its cosine, or what the activation made of it.
    """

    image: Image.Image
    names: list[str]
    labels: np.ndarray
    scores: np.ndarray

    @property
    def areas(self) -> dict[str, float]:
        """Share of the picture of each label."""
        return {name: float((self.labels == i).mean()) for i, name in enumerate(self.names)}

    def overlay(self, alpha: float = 0.55, legend: bool = True) -> Image.Image:
        return overlay(self.image, self.labels, self.names, alpha=alpha, legend=legend)

    def save(self, path: str | Path, *, alpha: float = 0.55, legend: bool = True) -> Path:
        """Write the overlay; the format follows the suffix."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.overlay(alpha, legend).save(path)
        except ValueError as error:
            raise InputError(f"cannot save {str(path)!r}: {error}; expected a suffix such as .png") from error
        return path

    def save_mask(self, path: str | Path) -> Path:
        """Write the indices as PNG: 8 bits with the overlay's palette and 255 for background; beyond 255 labels 16 bits, grey, 65535."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(self.names) > 255:
            Image.fromarray(np.where(self.labels < 0, 65535, self.labels.astype(np.int32)).astype(np.uint16)).save(path)
            return path
        mask = Image.fromarray(np.where(self.labels < 0, 255, self.labels).astype(np.uint8), "L")
        mask.putpalette(np.concatenate([palette(255), np.zeros((1, 3), np.uint8)]).tobytes())
        mask.save(path)
        return path

    def to_dict(self) -> dict[str, Any]:
        """Areas and scores for JSON: of each label its share of the picture, its pixels and the mean score on them (null without)."""
        rows = []
        for i, name in enumerate(self.names):
            found = self.labels == i
            pixels = int(found.sum())
            score = round(float(self.scores[found].mean()), 6) if pixels else None
            rows.append({"label": name, "index": i, "area": round(pixels / found.size, 6), "pixels": pixels, "score": score})
        none = int((self.labels < 0).sum())
        return {"width": self.labels.shape[1], "height": self.labels.shape[0], "labels": rows,
                "background": {"area": round(none / self.labels.size, 6), "pixels": none}}

    def to_rle(self) -> list[dict[str, Any]]:
        """COCO's uncompressed run-length code of each label that occurs: counts down the columns, beginning with zeros.

        ``pycocotools.mask.frPyObjects(row["segmentation"], *row["segmentation"]["size"])`` compresses it.
        """
        rows = []
        for i, name in enumerate(self.names):
            found = self.labels == i
            if not found.any():
                continue
            flat = np.concatenate([[False], found.ravel(order="F"), [False]])
            edges = np.flatnonzero(flat[1:] != flat[:-1])
            counts = np.diff(np.concatenate([[0], edges, [found.size]]))
            counts = counts if edges[-1] != found.size else counts[:-1]
            rows.append({"label": name, "index": i, "score": round(float(self.scores[found].mean()), 6),
                         "segmentation": {"size": list(found.shape), "counts": counts.tolist()}})
        return rows
