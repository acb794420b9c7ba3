"""Segment pictures with free-text labels: encode a picture once, ask it for many label sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

from ..data.images import read_image, to_tensor
from ..data.labels import LabelSet
from ..errors import InputError
from ..models import ImageFeatures, OVSegModel, create_model, list_pretrained
from .label_maps import Queries, label_map
from .segmentation import Segmentation
from .settings import Settings
from .sources import Source
from .windows import View, encode_windows, resized, view_of

Labels = LabelSet | Mapping[str, str | Sequence[str]] | Sequence[str] | str


class Predictor:
    """Label maps from one model.

    Args:
        model: a system in eval mode, on its device.
        labels: first label set; see ``set_labels``.
        settings: where to start from; the defaults if None.
        options: fields of ``Settings`` to change: ``crop=448, background_threshold=0.2, ...``.
    """

    def __init__(self, model: OVSegModel, labels: Labels | None = None, *, settings: Settings | None = None, **options: Any):
        self.model, self.settings = model, Settings.of(options, settings)
        patch, trained = model.backbone.patch_size, model.backbone.image_size
        short, crop = self.settings.short_side or trained, self.settings.crop
        if short < patch:
            raise InputError(f"short_side is {short}; expected at least a patch, {patch} pixels")
        if crop is not None and not (patch <= crop <= short and crop % patch == 0):
            raise InputError(f"crop is {crop}; expected a multiple of the patch, {patch} pixels, up to the short side, {short}")
        self._queries: dict[LabelSet, Queries] = {}
        self._labels: LabelSet | None = None
        self._image: Image.Image | None = None
        self._features: ImageFeatures | None = None
        self._view: View | None = None
        if labels is not None:
            self.set_labels(labels)

    def set_labels(self, labels: Labels) -> Predictor:
        """Encode a label set: names, ``{name: texts}`` with synonyms, or a ``LabelSet``. Sets seen before are remembered."""
        found = LabelSet.of(labels)
        if found not in self._queries:
            self._queries[found] = Queries.encode(self.model, found, self.settings)
        self._labels = found
        return self

    @torch.no_grad()
    def set_image(self, image: Any) -> Predictor:
        """Read and encode a picture: path, bytes, PIL image, array or tensor."""
        settings, backbone = self.settings, self.model.backbone
        picture = read_image(image, max_pixels=settings.max_pixels)
        view = view_of((picture.height, picture.width), settings, patch=backbone.patch_size, trained=backbone.image_size)
        device = next(self.model.parameters()).device
        pixels = backbone.normalize(resized(picture, view.canvas, settings.resize)[None].to(device))
        if view.origins is None:
            self._features = self.model.encode_image(pixels)
        else:
            self._features = encode_windows(self.model, pixels[0], view.origins, view.crop, settings.window_batch)
        self._image, self._view = picture, view
        return self

    @torch.no_grad()
    def predict(self, labels: Labels | None = None) -> Segmentation:
        """The label map of the current picture, for the current labels or the given ones."""
        image, features, view = self._current()
        queries = self._current_labels(labels)
        picture = to_tensor(image).to(features.tokens.device) if self.settings.refine else None
        index, scores = label_map(self.model, features, queries, view, self.settings, picture)
        return Segmentation(image, list(queries.names), index.cpu().numpy(), scores.float().cpu().numpy())

    @torch.no_grad()
    def classify(self, labels: Labels | None = None) -> dict[str, float]:
        """Image-level similarity of each label with the current picture, the mean over its windows and the best of its texts, best
        first: zero-shot classification."""
        _, features, _ = self._current()
        queries = self._current_labels(labels)
        scores = self.model.similarity(features, queries.texts).mean(0)
        best = scores.new_full((len(queries.names),), -torch.inf)
        asked = queries.owners >= 0
        best = best.scatter_reduce(0, queries.owners[asked], scores[asked], "amax")
        return dict(sorted(zip(queries.names, best.tolist(), strict=True), key=lambda item: -item[1]))

    def stream(self, sources: Iterable[Source | Any]) -> Iterator[tuple[Any, Segmentation | InputError]]:
        """(source, its label map) of many pictures; the error in place of the map for those that cannot be read.

        The next picture is read while the present one is being encoded.
        """

        def read(source: Any) -> Image.Image | InputError:
            try:
                return read_image(source.read() if isinstance(source, Source) else source, max_pixels=self.settings.max_pixels)
            except InputError as error:
                return error

        with ThreadPoolExecutor(1) as pool:
            ahead: list[tuple[Any, Any]] = []
            for source in sources:
                ahead.append((source, pool.submit(read, source)))
                if len(ahead) > 1:
                    yield self._answer(*ahead.pop(0))
            for one in ahead:
                yield self._answer(*one)

    def _answer(self, source: Any, reading: Any) -> tuple[Any, Segmentation | InputError]:
        picture = reading.result()
        if isinstance(picture, InputError):
            return source, picture
        try:
            return source, self.set_image(picture).predict()
        except InputError as error:
            return source, error

    def _current(self) -> tuple[Image.Image, ImageFeatures, View]:
        if self._image is None or self._features is None or self._view is None:
            raise InputError("no image is set; call set_image first")
        return self._image, self._features, self._view

    def _current_labels(self, labels: Labels | None) -> Queries:
        if labels is not None:
            self.set_labels(labels)
        if self._labels is None:
            raise InputError("no labels are set; call set_labels first, or give labels")
        return self._queries[self._labels]


def segment(image: Any, labels: Labels, *, model: OVSegModel | str | None = None, **options: Any) -> Segmentation:
    """Label every pixel of a picture with one of ``labels``.

    Args:
        image: path, bytes, PIL image, array or tensor.
        labels: names, in any words the model knows; ``{name: texts}`` gives synonyms.
        model: a model, the name of one with bundled weights, or None for the embedded ``pacl_tiny``, which knows only the
            words of the synthetic scenes.
        options: fields of ``Settings``: templates, background, background_threshold, short_side, crop, stride, ...

    Example:
        >>> result = ovseg.segment("street.jpg", ["car", "road"], model=model)
        >>> result.save("out.png")
    """
    labels = LabelSet.of(labels)
    if model is None or isinstance(model, str):
        name = model or "pacl_tiny"
        tags = [tag for known, tag in list_pretrained() if known == name]
        if not tags:
            raise InputError(f"model {name!r} has no bundled weights; expected one of "
                             f"{sorted({known for known, _ in list_pretrained()})} or a model object")
        model = create_model(name, tags[0])
    return Predictor(model, labels, **options).set_image(image).predict()
