"""Flat options, ``crop=448, background_threshold=0.2``, to the one of the three values that has a
field of that name.

Segment pictures with free-text labels: encode a picture once, ask it for many label sets.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.labels import LabelSet
from ..errors import InputError
from ..nn.tensors import Version, upload
from ..systems import DEFAULT_VIEW, OVSegModel, PatchFeatures, default_model, from_pretrained
from ..systems.checks import not_finite
from ..weights.saving import check_model
from ..weights.state_dicts import unwrapped
from .fields import positive_integer
from .queries import EncodedQueries, Queries, RememberedTexts
from .reading import Prepared, pictures_of, pixels_of, prepare, prepare_tensors, read_ahead
from .rules import Decision, rule, rule_names
from .segmentation import Segmentation
from .sources import Source
from .view import View, encode


def option_names(value: type | Any) -> list[str]:
    """The fields of a value that callers set by name. The label set is given apart."""
    return [field.name for field in fields(value) if field.name != "labels"]


def route(
    options: Mapping[str, Any], view: View, queries: Queries, decision: Decision
) -> tuple[View, Queries, Decision]:
    """The three values with ``options`` changed.

    Raises:
        InputError: for an option that none of them has, naming the closest or the rule of labelling
            that has it; for values that cannot be.
    """
    values = {"view": view, "queries": queries, "decision": decision}
    owner = {name: part for part, value in values.items() for name in option_names(value)}
    given: dict[str, dict[str, Any]] = {part: {} for part in values}
    for name, value in options.items():
        if name not in owner:
            raise _refusal(name, value, decision, sorted(owner))
        given[owner[name]][name] = value
    changed: dict[str, Any] = {
        part: replace(value, **given[part]) if given[part] else value  # type: ignore[type-var]
        for part, value in values.items()
    }
    return changed["view"], changed["queries"], changed["decision"]


def _refusal(name: str, value: Any, decision: Decision, known: list[str]) -> InputError:
    others = [other for other in rule_names() if name in option_names(rule(other))]
    if others:
        return InputError(
            f"{name} is {value!r}, an option of the rule of labelling {' and '.join(others)}; "
            "this model labels by "
            f"{decision.name}, whose options are {', '.join(option_names(decision))}"
        )
    close = get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}? Expected" if close else "expected"
    return InputError(f"unknown option {name!r}; {hint} some of {known}")


logger = logging.getLogger(__name__)
Labels = Queries | LabelSet | Mapping[str, str | Sequence[str]] | Sequence[str] | str


@dataclass(frozen=True)
class Seen:
    """A picture as the model saw it: ``prepared`` by a view, and the ``features`` that a
    ``version`` of the model made of it.
    """

    prepared: Prepared
    features: PatchFeatures
    version: Version = field(repr=False, compare=False)

    @property
    def view(self) -> View:
        return self.prepared.view


@dataclass(frozen=True)
class _Call:
    """The three values that one call goes by from beginning to end, whatever is set meanwhile."""

    view: View
    queries: Queries
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
        if not isinstance(view, View | None) or not isinstance(decision, Decision | None):
            wrong = ("decision", decision) if isinstance(view, View | None) else ("view", view)
            raise InputError(
                f"{wrong[0]} is a {type(wrong[1]).__name__}; expected one of ovseg.inference"
            )
        base = labels if isinstance(labels, Queries) else Queries()
        chosen = rule(model.decision)() if decision is None else decision
        self.view, self.queries, self.decision = route(
            options, View() if view is None else view, base, chosen
        )
        self.view.check(
            patch=model.spec.patch_size, trained=model.spec.image_size, stride=model.spec.stride
        )
        self._encoded = RememberedTexts()
        self._seen: Seen | None = None
        _evaluate(model)
        if labels is not None:
            self.set_labels(self.queries if isinstance(labels, Queries) else labels)

    def set_labels(self, labels: Labels) -> Predictor:
        """Ask for a label set from now on: names, ``{name: texts}`` with synonyms, a ``LabelSet``;
        or for other ``Queries`` altogether.

        Labels that cannot be asked for leave those of before.
        """
        if labels is None:
            raise InputError("labels is None; expected names, {name: texts}, a LabelSet or Queries")
        queries = self._with(labels)
        self._asked(queries)
        self.queries = queries
        return self

    def set_image(self, image: Any) -> Predictor:
        """Read and encode a picture: path, bytes, PIL image, array or tensor; or take one that
        ``see`` encoded. One that cannot be read leaves the picture of before.
        """
        self._seen = image if isinstance(image, Seen) else self.see([image])[0]
        return self

    def predict(
        self, labels: Labels | None = None, *, allowed: Sequence[str] | None = None
    ) -> Segmentation:
        """The label map of the current picture.

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
        """The label map of each picture, encoded together: pictures of one canvas and windows of
        any picture share encoder calls.

        Args:
            images: pictures of any sizes in any form that ``set_image`` takes; or [B, 3, H, W],
                uint8 or floats in 0..1, which stay on their device where they need no bicubic
                resizing.
            labels, allowed: as in ``predict``.
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
        return prepare(image, self.view, self.model.spec)

    def see(self, images: Sequence[Any]) -> list[Seen]:
        """Read and encode pictures together, for ``set_image``."""
        _evaluate(self.model)
        return self._see(pictures_of(images, "images"), self.view)

    @torch.no_grad()
    def classify(self, labels: Labels | None = None) -> dict[str, float]:
        """Image-level similarity of each label with the current picture, the mean over its windows
        and the best of its texts, best first: zero-shot classification. ``labels``: as in
        ``predict``.
        """
        call = self._call(labels)
        seen, queries = self._current(call), self._asked(call.queries)
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
        """(source, its label map) of many pictures in their order; the error in place of the map
        for those that cannot be read.

        It goes by what is set when it is called, not by what is set while it runs, and several may
        run at once.

        Args:
            sources: pictures in any form, or ``Source``.
            labels: as in ``predict``.
            batch: pictures that are encoded together; ``view.window_batch`` if None. As many again
                are read ahead meanwhile.
        """
        call = self._call(labels)
        self._asked(
            call.queries
        )  # what is wrong with the question is said before a picture is read
        size = call.view.window_batch if batch is None else positive_integer("batch", batch)
        return self._stream(call, pictures_of(sources, "sources"), size)

    def _stream(
        self, call: _Call, sources: Iterable[Any], batch: int
    ) -> Iterator[tuple[Any, Segmentation | InputError]]:
        def read(source: Any) -> Prepared | InputError:
            try:
                return prepare(
                    source.read() if isinstance(source, Source) else source,
                    call.view,
                    self.model.spec,
                )
            except InputError as error:
                return error

        for some in read_ahead(sources, read, batch, weigh=pixels_of):
            _evaluate(self.model)
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
        return (
            image if image.view == view else prepare(image.image(), view, self.model.spec)
        )  # it was prepared otherwise

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
        queries, decision = self._asked(call.queries), call.decision
        may_win = None if allowed is None else queries.allowed(allowed)
        maps = []
        for seen in pictures:
            prepared, device = seen.prepared, seen.features.tokens.device
            picture = prepared.unit(device) if decision.needs_picture else None
            try:
                maps.append(
                    decision.label_map(
                        self.model,
                        seen.features,
                        queries,
                        prepared.placement,
                        allowed=may_win,
                        picture=picture,
                    )
                )
            except ValueError as error:
                if isinstance(error, InputError) or "NaN" not in str(error):
                    raise
                raise not_finite(self.model) from error  # what the operators say of their logits
        found = [
            Segmentation(
                seen.prepared.image(),
                list(queries.names),
                _narrow(index),
                scores.float().cpu().numpy(),
            )
            for seen, (index, scores) in zip(pictures, maps, strict=True)
        ]  # the device is read here, after all has been queued
        if any(
            np.isnan(one.scores).any() for one in found
        ):  # where operators do not look: on a GPU
            raise not_finite(self.model)
        return found

    def _current(self, call: _Call) -> Seen:
        seen = self._seen
        if seen is None:
            raise InputError("no image is set; call set_image first")
        if seen.view == call.view and seen.version.holds(*self.model.image_state()):
            return seen
        again = self._see([seen.prepared.image()], call.view)[
            0
        ]  # it was seen otherwise, or by other weights
        if self._seen is seen:
            self._seen = again
        return again

    def _call(self, labels: Labels | None) -> _Call:
        _evaluate(self.model)
        return _Call(self.view, self._with(labels), self.decision)

    def _with(self, labels: Labels | None) -> Queries:
        """The current queries with other labels, or others altogether."""
        if labels is None or isinstance(labels, Queries):
            return self.queries if labels is None else labels
        return replace(self.queries, labels=_label_set(labels))

    def _asked(self, queries: Queries | None = None) -> EncodedQueries:
        """The queries, the current ones if None, as the model reads them."""
        return self._encoded.encoded(self.model, self.queries if queries is None else queries)


def _label_set(labels: Any) -> LabelSet:
    if isinstance(labels, torch.Tensor):
        raise InputError("labels is a tensor; expected names, {name: texts}, a LabelSet or Queries")
    return LabelSet.of(labels)


def _evaluate(model: OVSegModel) -> None:
    """Dropout, noise and batch statistics are of training: who labels does without them."""
    if any(module.training for module in model.modules()):
        logger.warning(
            "%s is in train mode, and pictures are labelled in eval mode: model.eval() is called; "
            "call model.train() before "
            "training goes on",
            model.name,
        )
        model.eval()


def _narrow(labels: torch.Tensor) -> np.ndarray:
    """On the host, in four bytes at most."""
    return labels.to(torch.int32 if labels.dtype == torch.int64 else labels.dtype).cpu().numpy()


def check_words(model: OVSegModel, queries: Queries) -> None:
    """Models with a vocabulary of their own label by its words alone: another word is the same to
    them as any other.

    Raises:
        InputError: naming the words that ``model`` does not know.
    """
    tokenizer: Any = model.tokenizer
    if not hasattr(tokenizer, "unknown") or queries.labels is None:
        return
    words = sorted(
        {
            word
            for text in (*queries.labels.queries, *queries.background)
            for word in tokenizer.unknown(text)
        }
    )
    if words:
        raise InputError(
            f"{model.name} does not know: {', '.join(words)}; it was trained on synthetic scenes "
            "and knows their words: "
            f"{', '.join(tokenizer.words)}. Any words: the default model, or allow_unknown "
            "(--allow-unknown)"
        )


def as_published(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for the default model: the view that it was published with, unless they say how
    pictures are seen.
    """
    said = {"view", "short_side", "long_side", "crop", "stride"} & {
        name for name, value in options.items() if value is not None
    }
    return dict(options) if said else {**DEFAULT_VIEW, **options}


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
            ViT-B/16, read out by NACLIP, from the cache or downloaded (600 MB).
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
        model, options = default_model(), as_published(options)
    predictor = Predictor(
        from_pretrained(model) if isinstance(model, str | Path) else model, **options
    )
    queries = labels if isinstance(labels, Queries) else replace(predictor.queries, labels=labels)
    if not allow_unknown:
        check_words(predictor.model, queries)
    return predictor.set_labels(queries).set_image(image).predict()
