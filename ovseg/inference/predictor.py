"""Segment pictures with free-text labels: encode a picture once, ask it for many label sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ovseg_kernels as ok

from ..data.images import MAX_PIXELS, read_image, to_tensor
from ..errors import InputError
from ..models import ImageFeatures, OVSegModel, create_model, list_pretrained
from ..models.base import check_labels
from .pictures import overlay
from .windows import encode_windows, window_origins


@dataclass
class Segmentation:
    """A label map at the size of the picture.

    Attributes:
        image: the picture, RGB.
        names: the labels asked for.
        labels: int16 [H, W], index into ``names``; -1 where no label reaches the background threshold.
        scores: float32 [H, W], cosine of the winning label.
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
        """Write the indices as an 8-bit PNG with the overlay's palette; 255 is none. At most 255 labels."""
        from .pictures import palette

        if len(self.names) > 255:
            raise InputError(f"{len(self.names)} labels do not fit an 8-bit mask; expected at most 255")
        mask = Image.fromarray(np.where(self.labels < 0, 255, self.labels).astype(np.uint8), "L")
        mask.putpalette(np.concatenate([palette(255), np.zeros((1, 3), np.uint8)]).tobytes())
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        mask.save(path)
        return Path(path)


class Predictor:
    """Label maps from one model.

    Args:
        model: a system in eval mode, on its device.
        labels: first label set; see ``set_labels``.
        templates: prompt templates; the model's own if None.
        background: smallest cosine of a winning label; pixels below get -1. None: every pixel gets a label.
        short_side: pictures are resized to this short side, keeping their shape; the backbone's training size if None.
        crop: side of square sliding windows in the resized picture; None sees the picture whole. Windows are merged by the mean
            of their patch cosines, upsampled.
        stride: pixels from one window to the next; half of ``crop`` if None.
        window_batch: windows in one encoder call.
        max_pixels: larger pictures are refused.
    """

    def __init__(self, model: OVSegModel, labels: Sequence[str] | str | None = None, *,
                 templates: str | Sequence[str] | None = None, background: float | None = None,
                 short_side: int | None = None, crop: int | None = None, stride: int | None = None, window_batch: int = 8,
                 max_pixels: int = MAX_PIXELS):
        if background is not None and not -1 <= background <= 1:
            raise InputError(f"background is {background}; expected a cosine in -1 .. 1, or None")
        if short_side is not None and short_side < model.backbone.patch_size:
            raise InputError(f"short_side is {short_side}; expected at least a patch, {model.backbone.patch_size} pixels")
        self.model, self.templates, self.background, self.max_pixels = model, templates, background, max_pixels
        self.short_side = short_side or model.backbone.image_size
        if stride is not None and crop is None:
            raise InputError(f"stride is {stride} and crop is missing; expected both, or neither")
        patch = model.backbone.patch_size
        if crop is not None and not (patch <= crop <= self.short_side and crop % patch == 0):
            raise InputError(f"crop is {crop}; expected a multiple of the patch, {patch} pixels, up to the short side, {self.short_side}")
        if crop is not None and stride is not None and not 0 < stride <= crop:
            raise InputError(f"stride is {stride}; expected 1 to the crop, {crop} pixels")
        if window_batch < 1:
            raise InputError(f"window_batch is {window_batch}; expected at least 1")
        self.crop, self.stride, self.window_batch = crop, (max(1, crop // 2) if crop and stride is None else stride), window_batch
        self._texts: dict[tuple[str, ...], torch.Tensor] = {}
        self._labels: list[str] = []
        self._image: Image.Image | None = None
        self._features: ImageFeatures | None = None
        self._origins: torch.Tensor | None = None  # of the windows; None where there are none
        self._canvas = (0, 0)
        if labels is not None:
            self.set_labels(labels)

    def set_labels(self, labels: Sequence[str] | str) -> Predictor:
        """Encode a label set; sets seen before are remembered."""
        self._labels = check_labels(labels)
        key = tuple(self._labels)
        if key not in self._texts:
            self._texts[key] = self.model.encode_labels(self._labels, self.templates)
        return self

    @torch.no_grad()
    def set_image(self, image: Any) -> Predictor:
        """Read and encode a picture: path, bytes, PIL image, array or tensor."""
        picture = read_image(image, max_pixels=self.max_pixels)
        patch, factor = self.model.backbone.patch_size, self.short_side / min(picture.size)
        unit = 1 if self.crop else patch  # windows are whole patches, a picture seen whole must be
        size = [max(self.crop or patch, round(side * factor / unit) * unit) for side in picture.size]
        if size[0] * size[1] > self.max_pixels:
            raise InputError(f"image is {picture.width}x{picture.height}; resized to short side {self.short_side} it would "
                             f"have {size[0] * size[1]} pixels and the limit is {self.max_pixels}")
        small = to_tensor(picture if picture.size == tuple(size) else picture.resize(size, Image.Resampling.BICUBIC))
        device = next(self.model.parameters()).device
        pixels = self.model.backbone.normalize(small[None].to(device))
        if self.crop is None or self.stride is None:
            self._features, self._origins = self.model.encode_image(pixels), None
        else:
            sides = (self.crop, self.crop)
            self._canvas = (size[1], size[0])
            self._origins = window_origins(self._canvas, sides, (self.stride, self.stride))
            self._features = encode_windows(self.model, pixels[0], self._origins, sides, self.window_batch)
        self._image = picture
        return self

    @torch.no_grad()
    def predict(self, labels: Sequence[str] | str | None = None) -> Segmentation:
        """The label map of the current picture, for the current labels or the given ones."""
        if self._image is None or self._features is None:
            raise InputError("no image is set; call set_image first")
        if labels is not None:
            self.set_labels(labels)
        if not self._labels:
            raise InputError("no labels are set; call set_labels first, or give labels to predict")
        logits = self.model.segment_logits(self._features, self._texts[tuple(self._labels)])
        size = (self._image.height, self._image.width)
        options = {"threshold": self.background, "label_type": torch.int16, "return_value": True}
        if self._origins is None or self.crop is None:
            index, scores = (x[0] for x in ok.upsample_argmax(logits, size, **options))
        else:
            origins, sides = self._origins.to(logits.device), (self.crop, self.crop)
            index, scores = ok.window_argmax(logits, origins, sides, self._canvas, size, **options)
        return Segmentation(self._image, list(self._labels), index.cpu().numpy(), scores.cpu().numpy())

    def classify(self, labels: Sequence[str] | str | None = None) -> dict[str, float]:
        """Image-level similarity of each label with the current picture, the mean over its windows, best first: zero-shot
        classification."""
        if self._features is None:
            raise InputError("no image is set; call set_image first")
        if labels is not None:
            self.set_labels(labels)
        with torch.no_grad():
            scores = self.model.similarity(self._features, self._texts[tuple(self._labels)]).mean(0).tolist()
        return dict(sorted(zip(self._labels, scores, strict=True), key=lambda item: -item[1]))


def segment(image: Any, labels: Sequence[str] | str, *, model: OVSegModel | str | None = None, **options: Any) -> Segmentation:
    """Label every pixel of a picture with one of ``labels``.

    Args:
        image: path, bytes, PIL image, array or tensor.
        labels: names, in any words the model knows.
        model: a model, the name of one with bundled weights, or None for the embedded ``pacl_tiny``, which knows only the
            words of the synthetic scenes.
        options: of ``Predictor``: templates, background, short_side, crop, stride, window_batch, max_pixels.

    Example:
        >>> result = ovseg.segment("street.jpg", ["car", "road"], model=model)
        >>> result.save("out.png")
    """
    check_labels(labels)
    if model is None or isinstance(model, str):
        name = model or "pacl_tiny"
        tags = [tag for known, tag in list_pretrained() if known == name]
        if not tags:
            raise InputError(f"model {name!r} has no bundled weights; expected one of "
                             f"{sorted({known for known, _ in list_pretrained()})} or a model object")
        model = create_model(name, tags[0])
    return Predictor(model, labels, **options).set_image(image).predict()
