"""Segment pictures with free-text labels: encode a picture once, ask it for many label sets."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints.state_dicts import unwrapped
from ..data.labels import LabelSet
from ..errors import InputError
from ..layers.upload import upload
from ..models import DEFAULT_VIEW, OVSegModel, PatchFeatures, default_model, from_pretrained
from .decisions import Decision, rule
from .queries import EncodedQueries, Queries
from .reading import Prepared, pixels_of, prepare, prepare_tensors, read_ahead
from .routing import route
from .segmentation import Segmentation
from .sources import Source
from .view import View
from .windows import encode

Labels = Queries | LabelSet | Mapping[str, str | Sequence[str]] | Sequence[str] | str
_REMEMBERED = 64  # label sets whose embeddings are kept


@dataclass(frozen=True)
class Seen:
    """A picture as the model saw it, by ``view``."""

    prepared: Prepared
    features: PatchFeatures
    view: View


class Predictor:
    """Label maps from one model. ``view``, ``queries`` and ``decision`` are frozen values and may be replaced at any time.

    Args:
        model: a system in eval mode, on its device and in its dtype; one under ``torch.compile`` too.
        labels: first label set, or all of ``Queries``; see ``set_labels``.
        view: how pictures are seen; the defaults if None.
        decision: how labels are decided; the model's own rule with its defaults if None.
        options: fields of ``View``, ``Queries`` and the rule to change: ``crop=448, background_threshold=0.2, ...``.
    """

    def __init__(self, model: OVSegModel, labels: Labels | None = None, *, view: View | None = None, decision: Decision | None = None,
                 **options: Any):
        self.model = model = unwrapped(model)
        base = labels if isinstance(labels, Queries) else Queries()
        chosen = rule(model.decision)() if decision is None else decision
        self.view, self.queries, self.decision = route(options, view or View(), base, chosen)
        self.view.check(patch=model.spec.patch_size, trained=model.spec.image_size, stride=model.spec.stride)
        self._encoded: OrderedDict[Queries, EncodedQueries] = OrderedDict()
        self._seen: Seen | None = None
        if labels is not None:
            self.set_labels(self.queries if isinstance(labels, Queries) else labels)

    def set_labels(self, labels: Labels) -> Predictor:
        """Ask for a label set from now on: names, ``{name: texts}`` with synonyms, a ``LabelSet``; or for other ``Queries`` altogether."""
        self.queries = labels if isinstance(labels, Queries) else replace(self.queries, labels=LabelSet.of(labels))
        self._asked()
        return self

    def set_image(self, image: Any) -> Predictor:
        """Read and encode a picture: path, bytes, PIL image, array or tensor; or take one that ``see`` encoded."""
        self._seen = image if isinstance(image, Seen) else self.see([image])[0]
        return self

    def predict(self, labels: Labels | None = None, *, allowed: Sequence[str] | None = None) -> Segmentation:
        """The label map of the current picture.

        Args:
            labels: to ask for from now on; the current ones if None.
            allowed: names of the labels that may win, this once; pixels where none may get no label. Scores and probabilities stay those
                among all labels.
        """
        return self._answer([self._current()], labels, allowed)[0]

    def predict_batch(self, images: Sequence[Any] | torch.Tensor, labels: Labels | None = None, *,
                      allowed: Sequence[str] | None = None) -> list[Segmentation]:
        """The label map of each picture, encoded together: pictures of one canvas and windows of any picture share encoder calls.

        Args:
            images: pictures of any sizes in any form that ``set_image`` takes; or [B, 3, H, W], uint8 or floats in 0..1, which stay on
                their device where they need no bicubic resizing.
            labels, allowed: as in ``predict``.
        """
        if not isinstance(images, torch.Tensor):
            return self._answer(self.see(images), labels, allowed)
        prepared, wrong = prepare_tensors(images, self.view, self.model.spec)
        found = self._answer(self._encode(prepared), labels, allowed)
        if wrong is not None and bool(wrong):  # read with the result, not before
            raise InputError("images holds NaN or values outside of 0..1; expected 0..1 (not normalised)")
        return found

    def prepare(self, image: Any) -> Prepared:
        """Read and resize a picture, for ``see``; in a thread of its own, if you like."""
        return prepare(image, self.view, self.model.spec)

    def see(self, images: Sequence[Any]) -> list[Seen]:
        """Read and encode pictures together, for ``set_image``."""
        return self._encode([image if isinstance(image, Prepared) else self.prepare(image) for image in images])

    @torch.no_grad()
    def classify(self, labels: Labels | None = None) -> dict[str, float]:
        """Image-level similarity of each label with the current picture, the mean over its windows and the best of its texts, best
        first: zero-shot classification."""
        seen, queries = self._current(), self._asked(labels)
        scores = self.model.similarity(seen.features, queries.texts).mean(0)
        best = scores.new_full((len(queries.names),), -torch.inf)
        count = len(scores) - len(self.queries.rivals)  # the background's texts are the last
        best = best.scatter_reduce(0, queries.owners[:count], scores[:count], "amax")
        return dict(sorted(zip(queries.names, best.tolist(), strict=True), key=lambda item: -item[1]))

    def stream(self, sources: Iterable[Source | Any], labels: Labels | None = None, *,
               batch: int | None = None) -> Iterator[tuple[Any, Segmentation | InputError]]:
        """(source, its label map) of many pictures in their order; the error in place of the map for those that cannot be read.

        Args:
            sources: pictures in any form, or ``Source``.
            labels: as in ``predict``.
            batch: pictures that are encoded together; ``view.window_batch`` if None. As many again are read ahead meanwhile.
        """
        self._asked(labels)

        def read(source: Any) -> Prepared | InputError:
            try:
                return self.prepare(source.read() if isinstance(source, Source) else source)
            except InputError as error:
                return error

        for some in read_ahead(sources, read, self.view.window_batch if batch is None else batch, weigh=pixels_of):
            found = deque(self._answer(self._encode([one for _, one in some if isinstance(one, Prepared)])))
            waiting = deque((source, None if isinstance(one, Prepared) else one) for source, one in some)
            some.clear()  # large pictures: nothing is held longer than it is needed
            while waiting:
                source, error = waiting.popleft()
                yield source, found.popleft() if error is None else error

    @torch.no_grad()
    def _encode(self, pictures: Sequence[Prepared]) -> list[Seen]:
        device = next(self.model.parameters()).device
        pairs = [(upload(picture.pixels, device), picture.placement) for picture in pictures]
        features = encode(self.model, pairs, self.view.window_batch)
        return [Seen(picture, one, self.view) for picture, one in zip(pictures, features, strict=True)]

    @torch.no_grad()
    def _answer(self, pictures: Sequence[Seen], labels: Labels | None = None, allowed: Sequence[str] | None = None) -> list[Segmentation]:
        queries = self._asked(labels)
        may_win = None if allowed is None else queries.allowed(allowed)
        maps = []
        for seen in pictures:
            prepared, device = seen.prepared, seen.features.tokens.device
            picture = prepared.unit(device) if self.decision.needs_picture else None
            maps.append(self.decision.label_map(self.model, seen.features, queries, prepared.placement, allowed=may_win, picture=picture))
        return [Segmentation(seen.prepared.image(), list(queries.names), _narrow(index), scores.float().cpu().numpy())
                for seen, (index, scores) in zip(pictures, maps, strict=True)]  # the device is read here, after all has been queued

    def _current(self) -> Seen:
        if self._seen is None:
            raise InputError("no image is set; call set_image first")
        if self._seen.view != self.view:  # it was seen otherwise
            self.set_image(self._seen.prepared.image())
        return self._seen

    def _asked(self, labels: Labels | None = None) -> EncodedQueries:
        """The current queries as the model reads them. Embeddings are remembered by all that they depend on."""
        if labels is not None:
            self.set_labels(labels)
        key = replace(self.queries, templates=self.queries.templates_for(self.model))
        if key not in self._encoded:
            self._encoded[key] = EncodedQueries.encode(self.model, key)
            if len(self._encoded) > _REMEMBERED:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(key)
        return self._encoded[key]


def _narrow(labels: torch.Tensor) -> np.ndarray:
    """On the host, in four bytes at most."""
    return labels.to(torch.int32 if labels.dtype == torch.int64 else labels.dtype).cpu().numpy()


def check_words(model: OVSegModel, queries: Queries) -> None:
    """Models with a vocabulary of their own label by its words alone: another word is the same to them as any other.

    Raises:
        InputError: naming the words that ``model`` does not know.
    """
    tokenizer: Any = model.tokenizer
    if not hasattr(tokenizer, "unknown") or queries.labels is None:
        return
    words = sorted({word for text in (*queries.labels.queries, *queries.background) for word in tokenizer.unknown(text)})
    if words:
        raise InputError(f"{model.name} does not know: {', '.join(words)}; it was trained on synthetic scenes and knows their words: "
                         f"{', '.join(tokenizer.words)}. Any words: the default model, or allow_unknown (--allow-unknown)")


def as_published(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for the default model: the view that it was published with, unless they say how pictures are seen."""
    said = {"view", "short_side", "long_side", "crop", "stride"} & {name for name, value in options.items() if value is not None}
    return dict(options) if said else {**DEFAULT_VIEW, **options}


def segment(image: Any, labels: Labels, *, model: OVSegModel | str | None = None, allow_unknown: bool = False,
            **options: Any) -> Segmentation:
    """Label every pixel of a picture with one of ``labels``.

    Args:
        image: path, bytes, PIL image, array or tensor.
        labels: names, in any words; ``{name: texts}`` gives synonyms.
        model: a model, or what ``from_pretrained`` takes: ``pacl_tiny``, ``ViT-B-16:laion2b_s34b_b88k``, ``hf-hub:owner/name``, a path.
            None: OpenAI's CLIP, ViT-B/16, read out by NACLIP, from the cache or downloaded (600 MB).
        allow_unknown: ask a model that knows few words, as the bundled ones do, for others.
        options: of ``Predictor``: templates, background, background_threshold, short_side, crop, stride, ...

    Example:
        >>> result = ovseg.segment("street.jpg", ["car", "road"])
        >>> result.save("out.png")
    """
    if not isinstance(labels, Queries):
        labels = LabelSet.of(labels)
    if model is None:
        model, options = default_model(), as_published(options)
    predictor = Predictor(from_pretrained(model) if isinstance(model, str | Path) else model, **options)
    queries = labels if isinstance(labels, Queries) else replace(predictor.queries, labels=labels)
    if not allow_unknown:
        check_words(predictor.model, queries)
    return predictor.set_labels(queries).set_image(image).predict()
