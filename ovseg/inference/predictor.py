"""Segment pictures with free-text labels: encode a picture once, ask it for many label sets."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..bounds import POSITIVE
from ..data.labels import LabelSet
from ..errors import InputError
from ..nn.tensors import Version, upload
from ..systems import OVSegModel, PatchFeatures, from_pretrained, model_at_hand
from ..systems.checks import not_finite
from ..weights.saving import check_model
from ..weights.state_dicts import unwrapped
from .flat_options import route
from .known_words import check_words, tell_stand_in
from .queries import EncodedQueries, Queries, RememberedTexts
from .reading import Prepared, pictures_of, pixels_of, prepare, prepare_tensors, read_ahead
from .rules import Decision, rule_of
from .segmentation import Segmentation
from .sources import Source
from .view import View, encode

logger = logging.getLogger(__name__)
Labels = Queries | LabelSet | Mapping[str, str | Sequence[str]] | Sequence[str] | str


@dataclass(frozen=True)
class Seen:
    """A picture as the model saw it.

    Attributes:
        prepared: the picture, resized and cut by a view.
        features: what the model made of it.
        version: the state of the model that made them.
    """

    prepared: Prepared
    features: PatchFeatures
    version: Version = field(repr=False, compare=False)

    @property
    def view(self) -> View:
        """The view that the picture was prepared by."""
        return self.prepared.view


@dataclass(frozen=True)
class _Call:
    """The values that a call goes by from beginning to end, whatever is set meanwhile."""

    view: View
    queries: Queries
    encoded: EncodedQueries
    decision: Decision


class Predictor:
    """Label maps from one model.

    ``view``, ``queries`` and ``decision`` are frozen values and may be replaced at any time.

    A call goes by the three values of its beginning, and the labels that it is given are its own:
    ``predict_batch``, ``stream``, ``prepare`` and ``see`` may be called from several threads at
    once. ``set_image`` and ``set_labels`` change the predictor for all.

    Args:
        model: a system, on its device and in its dtype; one under ``torch.compile`` too. A model in
            train mode is put into eval mode, here and before each call, which is logged.
        labels: first label set, or all of ``Queries``; see ``set_labels``.
        view: how pictures are seen; the defaults if None.
        decision: how labels are decided; the model's own rule with its defaults if None.
        options: fields of ``View``, ``Queries`` and the rule to change: ``crop=448,
            background_threshold=0.2, ...``.
    """

    def __init__(
        self,
        model: OVSegModel,
        labels: Labels | None = None,
        *,
        view: View | None = None,
        decision: Decision | None = None,
        **options: Any,
    ):
        self.model = model = unwrapped(model)
        check_model(model)
        for name, value, kind in (("view", view, View), ("decision", decision, Decision)):
            if not isinstance(value, kind | None):
                raise InputError(
                    f"{name} is a {type(value).__name__}; expected one of ovseg.inference"
                )
        base = labels if isinstance(labels, Queries) else Queries()
        chosen = rule_of(model) if decision is None else decision
        self.view, self.queries, self.decision = route(
            options, View() if view is None else view, base, chosen
        )
        self._fitting: View | None = None
        self._fitting_view()
        self._encoded = RememberedTexts()
        self._seen: Seen | None = None
        _evaluate(model)
        if labels is not None:
            self.set_labels(self.queries if isinstance(labels, Queries) else labels)

    def set_labels(self, labels: Labels) -> Predictor:
        """Ask for a label set from now on.

        Labels that cannot be asked for leave those of before.

        Args:
            labels: names, ``{name: texts}`` with synonyms, a ``LabelSet``; or other ``Queries``
                altogether.
        """
        if labels is None:
            raise InputError("labels is None; expected names, {name: texts}, a LabelSet or Queries")
        queries = self._with(labels)
        self._asked(queries)
        self.queries = queries
        return self

    def set_image(self, image: Any) -> Predictor:
        """Read and encode a picture; one that cannot be read leaves the picture of before.

        Args:
            image: path, bytes, PIL image, array or tensor; or what ``see`` encoded.
        """
        self._seen = image if isinstance(image, Seen) else self.see([image])[0]
        return self

    def predict(
        self, labels: Labels | None = None, *, allowed: Sequence[str] | None = None
    ) -> Segmentation:
        """Return the label map of the current picture.

        Args:
            labels: to ask for, this once; those of ``set_labels`` if None.
            allowed: names of the labels that may win, this once; pixels where none may get no
                label. Scores and probabilities stay those among all labels.
        """
        call = self._call(labels)
        return self._answer(call, [self._current(call)], allowed)[0]

    def predict_batch(
        self,
        images: Sequence[Any] | torch.Tensor,
        labels: Labels | None = None,
        *,
        allowed: Sequence[str] | None = None,
    ) -> list[Segmentation]:
        """Return the label map of each picture; they are encoded together.

        Pictures of one canvas and windows of any picture share encoder calls.

        Args:
            images: pictures of any sizes in any form that ``set_image`` takes; or [B, 3, H, W],
                uint8 or floats in 0..1, which stay on their device where they need no bicubic
                resizing.
            labels: as in ``predict``.
            allowed: as in ``predict``.
        """
        call = self._call(labels)
        if not isinstance(images, torch.Tensor):
            return self._answer(call, self._see(pictures_of(images, "images"), call.view), allowed)
        prepared, wrong = prepare_tensors(images, call.view, self.model.spec)
        found = self._answer(call, self._encode(prepared, call.view), allowed)
        if wrong is not None and bool(wrong):  # read with the result, not before
            raise InputError(
                "images holds NaN or values outside of 0..1; expected 0..1 (not normalised)"
            )
        return found

    def prepare(self, image: Any) -> Prepared:
        """Read and resize a picture, for ``see``; in a thread of its own, if you like."""
        return prepare(image, self._fitting_view(), self.model.spec)

    def see(self, images: Sequence[Any]) -> list[Seen]:
        """Read and encode pictures together, for ``set_image``."""
        _evaluate(self.model)
        return self._see(pictures_of(images, "images"), self._fitting_view())

    @torch.no_grad()
    def classify(self, labels: Labels | None = None) -> dict[str, float]:
        """Classify the current picture without training.

        Returns the image-level similarity of each label, the mean over the windows and the best of
        its texts, best first.

        Args:
            labels: as in ``predict``.
        """
        call = self._call(labels)
        seen = self._current(call)
        queries = call.encoded
        scores = self.model.similarity(seen.features, queries.texts).mean(0)
        best = scores.new_full((len(queries.names),), -torch.inf)
        count = len(scores) - len(call.queries.rivals)  # the background's texts are the last
        found = best.scatter_reduce(0, queries.owners[:count], scores[:count], "amax").tolist()
        if any(score != score for score in found):
            raise not_finite(self.model)
        return dict(sorted(zip(queries.names, found, strict=True), key=lambda item: -item[1]))

    def stream(
        self,
        sources: Iterable[Source | Any],
        labels: Labels | None = None,
        *,
        batch: int | None = None,
    ) -> Iterator[tuple[Any, Segmentation | InputError]]:
        """Yield (source, its label map) of many pictures in their order.

        The error stands in place of the map for those that cannot be read. It goes by what is set
        when it is called, not by what is set while it runs, and several may run at once.

        Args:
            sources: pictures in any form, or ``Source``.
            labels: as in ``predict``.
            batch: pictures that are encoded together; ``view.window_batch`` if None. As many again
                are read ahead meanwhile.
        """
        POSITIVE.check("batch", batch, InputError)
        call = self._call(labels)
        pictures = pictures_of(sources, "sources")
        return self._stream(call, pictures, batch or call.view.window_batch)

    def _stream(
        self, call: _Call, sources: Iterable[Any], batch: int
    ) -> Iterator[tuple[Any, Segmentation | InputError]]:
        def read(source: Any) -> Prepared | InputError:
            try:
                image = source.read() if isinstance(source, Source) else source
                return prepare(image, call.view, self.model.spec)
            except InputError as error:
                return error

        for some in read_ahead(sources, read, batch, weigh=pixels_of):
            _evaluate(self.model)  # which the caller may have changed meanwhile
            call = replace(call, encoded=self._asked(call.queries))
            seen = self._encode([one for _, one in some if isinstance(one, Prepared)], call.view)
            found = deque(self._answer(call, seen))
            del seen
            waiting = deque(
                (source, None if isinstance(one, Prepared) else one) for source, one in some
            )
            some.clear()  # large pictures: nothing is held longer than it is needed
            while waiting:
                source, error = waiting.popleft()
                yield source, found.popleft() if error is None else error

    def _see(self, images: Iterable[Any], view: View) -> list[Seen]:
        return self._encode([self._prepared(image, view) for image in images], view)

    def _prepared(self, image: Any, view: View) -> Prepared:
        if not isinstance(image, Prepared):
            return prepare(image, view, self.model.spec)
        if image.view == view:
            return image
        return prepare(image.image(), view, self.model.spec)  # it was prepared otherwise

    @torch.no_grad()
    def _encode(self, pictures: Sequence[Prepared], view: View) -> list[Seen]:
        device = next(self.model.parameters()).device
        version = Version(*self.model.image_state())
        pairs = [(upload(picture.pixels, device), picture.placement) for picture in pictures]
        features = encode(self.model, pairs, view.window_batch)
        return [
            Seen(picture, one, version) for picture, one in zip(pictures, features, strict=True)
        ]

    @torch.no_grad()
    def _answer(
        self, call: _Call, pictures: Sequence[Seen], allowed: Sequence[str] | None = None
    ) -> list[Segmentation]:
        queries = call.encoded
        may_win = None if allowed is None else queries.allowed(allowed)
        maps = [self._label_map(call, seen, may_win) for seen in pictures]
        # The device is read here, after all has been queued.
        found = [
            Segmentation(
                seen.prepared.image(),
                list(queries.names),
                _narrow(index),
                scores.float().cpu().numpy(),
            )
            for seen, (index, scores) in zip(pictures, maps, strict=True)
        ]
        # On a GPU the operators do not look.
        if any(np.isnan(one.scores).any() for one in found):
            raise not_finite(self.model)
        return found

    def _label_map(
        self, call: _Call, seen: Seen, allowed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prepared = seen.prepared
        device = seen.features.tokens.device
        picture = prepared.unit(device) if call.decision.needs_picture else None
        try:
            return call.decision.label_map(
                self.model,
                seen.features,
                call.encoded,
                prepared.placement,
                allowed=allowed,
                picture=picture,
            )
        except ValueError as error:
            if isinstance(error, InputError) or "NaN" not in str(error):
                raise
            raise not_finite(self.model) from error  # what the operators say of their logits

    def _current(self, call: _Call) -> Seen:
        seen = self._seen
        if seen is None:
            raise InputError("no image is set; call set_image first")
        if seen.view == call.view and seen.version.holds(*self.model.image_state()):
            return seen
        # It was seen otherwise, or by other weights.
        again = self._see([seen.prepared.image()], call.view)[0]
        if self._seen is seen:
            self._seen = again
        return again

    def _call(self, labels: Labels | None) -> _Call:
        _evaluate(self.model)
        queries = self._with(labels)
        return _Call(self._fitting_view(), queries, self._asked(queries), self.decision)

    def _fitting_view(self) -> View:
        """Return the current view, which is checked once against the model."""
        view = self.view
        if view is not self._fitting:
            spec = self.model.spec
            view.check(patch=spec.patch_size, trained=spec.image_size, stride=spec.stride)
            self._fitting = view
        return view

    def _with(self, labels: Labels | None) -> Queries:
        """Return the current queries with other labels, or others altogether."""
        if labels is None or isinstance(labels, Queries):
            return self.queries if labels is None else labels
        return replace(self.queries, labels=_label_set(labels))

    def _asked(self, queries: Queries | None = None) -> EncodedQueries:
        """Return the queries, the current ones if None, as the model reads them."""
        return self._encoded.encoded(self.model, self.queries if queries is None else queries)


def _label_set(labels: Any) -> LabelSet:
    if isinstance(labels, torch.Tensor):
        raise InputError("labels is a tensor; expected names, {name: texts}, a LabelSet or Queries")
    return LabelSet.of(labels)


def _evaluate(model: OVSegModel) -> None:
    """Put a model into eval mode: who labels does without dropout, noise and batch statistics."""
    if any(module.training for module in model.modules()):
        logger.warning(
            "%s is in train mode, and pictures are labelled in eval mode: model.eval() is called; "
            "call model.train() before training goes on",
            model.name,
        )
        model.eval()


def _narrow(labels: torch.Tensor) -> np.ndarray:
    """Copy labels to the host, in four bytes at most."""
    return labels.to(torch.int32 if labels.dtype == torch.int64 else labels.dtype).cpu().numpy()


def as_published(model: OVSegModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the view that a model was published with, if it has one.

    Options that say how pictures are seen stay alone.
    """
    of_views = {"view", "short_side", "long_side", "crop", "stride"}
    said = any(value is not None for name, value in options.items() if name in of_views)
    return dict(options) if said else {**model.view, **options}


def segment(
    image: Any,
    labels: Labels,
    *,
    model: OVSegModel | str | None = None,
    allow_unknown: bool = False,
    **options: Any,
) -> Segmentation:
    """Label every pixel of a picture with one of ``labels``.

    Args:
        image: path, bytes, PIL image, array or tensor.
        labels: names, in any words; ``{name: texts}`` gives synonyms.
        model: a model, or what ``from_pretrained`` takes: ``pacl_tiny``,
            ``ViT-B-16:laion2b_s34b_b88k``, ``hf-hub:owner/name``, a path. None: OpenAI's CLIP,
            ViT-B/16, read out by NACLIP, from the cache or downloaded (600 MB); without a network
            ``pacl_lite0:photos``, which is bundled and knows some 180 names, and a warning.
        allow_unknown: ask a model that knows few words, as the bundled ones do, for others.
        options: of ``Predictor``: templates, background, background_threshold, short_side, crop,
            stride, ...

    Example:
        >>> result = ovseg.segment("street.jpg", ["car", "road"])
        >>> result.save("out.png")
    """
    if not isinstance(labels, Queries):
        labels = _label_set(labels)
    if model is None:
        model = model_at_hand()
        options = as_published(model, options)
    elif isinstance(model, str | Path):
        model = from_pretrained(model)
    predictor = Predictor(model, **options)
    queries = labels if isinstance(labels, Queries) else replace(predictor.queries, labels=labels)
    if not allow_unknown:
        check_words(predictor.model, queries)
    tell_stand_in(predictor.model)
    return predictor.predict_batch([image], queries)[0]
