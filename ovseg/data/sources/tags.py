"""Pictures with several true words each, from captions or from lists of names.

A word of the vocabulary is true of a picture, known to be false, or not counted:

* captions: true if at least ``share`` of a picture's captions name it, not counted if fewer do,
  false if none does;
* names: what a picture lists is true, what else was looked for is false, and every other word is
  not counted, for nobody looked for it;
* a word that fewer than ``least`` pictures show is counted nowhere.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ...bounds import bounded
from ...errors import ConfigError, DataError
from ...progress import bar
from ..batches import Batch, PairBatch, TagBatch
from ..entities import Entities, load_entities
from ..images import MAX_PIXELS, read_image
from ..pair_samples import PairSample, collate_pairs, without_padding
from ..sampling import integer
from ..tag_files import Tagged, places_of, read_place
from ..transforms import PairAugment, WholeSquare, as_items, pair_transform, plain
from .base import (
    MOST_PIXELS,
    MOST_SIDE,
    ModelInputs,
    Sample,
    Source,
    SourceOptions,
    identities_of_files,
    identity_of_files,
)
from .folder import Names

logger = logging.getLogger(__name__)
_TOLD = 40  # words of a line of the log


@dataclass
class Options(SourceOptions):
    """Options of pictures with words.

    Attributes:
        root: a folder with ``annotations/captions_*.json``, with ``names.tsv``, or of pictures with
            .txt captions; or ``{captions: a .json, images: a folder}`` or ``{names: a .tsv, images:
            a folder, looked_for: names}``; or a list of such, one after the other.
        words: the vocabulary, a list by name or a YAML file; see ``data/entities.py``. None: the
            model's own, if its tokenizer has ``entities``.
        template: how a word is said to the model.
        share: of a picture's captions that must name a word for it to be true.
        least: pictures that a word must be true of.
        balance: b of the weights n^-b of words among those that are true of a picture, with n the
            pictures that show a word; 0: all alike. Persons are in most photographs, and a zebra
            that stands beside one says more.
        unsure: words that captions name in another sense too, such as a colour: where a caption
            names one it is not counted.
        texts: tags: all words, ``TagBatch``; one: a true word drawn for each picture,
            ``PairBatch``.
        image_size: side of the picture; None: the model's.
        fit: how a picture becomes a square where it is not augmented: squash, the whole of it; or
            crop, the largest square in its middle.
        augment: see ``PairAugment``; None: no augmentation.
        max_pixels: pictures with more are bad ones.
    """

    kind: str = "tags"
    root: Any = None
    words: str | None = None
    template: str = bounded("{}", pattern=r"[^{}]*\{\}[^{}]*", expected="a text with one {}")
    share: float = bounded(0.2, low=0, above=True, high=1)
    least: int = bounded(10, low=1, high=MOST_PIXELS, integer=True)
    balance: float = bounded(0.0, low=0, high=2)
    unsure: list[str] = bounded((), pattern=r".*\S.*", expected="words")
    texts: str = bounded("tags", one_of=("tags", "one"))
    image_size: int | None = bounded(None, low=1, high=MOST_SIDE, integer=True)
    fit: str = bounded("squash", one_of=("squash", "crop"))
    augment: PairAugment | None = None
    max_pixels: int = bounded(MAX_PIXELS, low=1, high=MOST_PIXELS, integer=True)


def create(
    options: Options,
    inputs: ModelInputs,
    *,
    split: str = "train",
    seed: int = 0,
    progress: bool = False,
) -> Tags:
    """Read what is said of the pictures; a validation split is not augmented."""
    places = places_of(options.root)
    words = vocabulary(options.words, inputs)
    tagged = [read_place(place) for place in places]
    return Tags(tagged, words, inputs, options, train=split == "train", progress=progress)


def vocabulary(words: str | None, inputs: ModelInputs) -> Entities:
    """Return the list of words, or the model's own.

    Raises:
        ConfigError: for an empty or damaged list, and without any.
    """
    if words is not None:
        return load_entities(words)
    own = getattr(inputs.tokenizer, "entities", None)
    if not isinstance(own, Entities):
        raise ConfigError(
            "data.words is null and the model has no vocabulary of its own; expected a list of "
            "entities by name, such as photos, or a YAML file"
        )
    return own


@dataclass
class TagSample(Sample):
    """A picture uint8 [3, H, W], and of each word whether it is true and counted, [W] bool."""

    image: torch.Tensor
    positives: torch.Tensor
    counted: torch.Tensor


class Tags(Source[Any]):
    """Pictures of which at least one word is true, in the order of their files.

    Args:
        tagged: what is said of pictures, from one or several places.
        words: the vocabulary.
        inputs: of the model.
        options: see there.
        train: False: no augmentation.
        progress: whether a bar is shown while captions are read.

    Attributes:
        words: names of the vocabulary.
        positives, counted: [pictures, W] bool, see ``TagBatch``.

    Raises:
        DataError: if no picture is left.
        ConfigError: for words that the model reads alike, and unsure words of no vocabulary.
    """

    batch_type: ClassVar[type[Batch]] = TagBatch
    decoding = True

    def __init__(
        self,
        tagged: Sequence[Tagged],
        words: Entities,
        inputs: ModelInputs,
        options: Options | None = None,
        *,
        train: bool = True,
        progress: bool = False,
    ):
        options = options or Options()
        self.words = words.names
        self.roots = [part.where for part in tagged]
        self.texts = options.texts
        self.max_pixels = options.max_pixels
        self.image_size = options.image_size or inputs.image_size
        self.batch_type = TagBatch if options.texts == "tags" else PairBatch  # type: ignore[misc]
        self.token_ids = _token_ids(words, inputs, options.template)
        unsure = _unsure(words, options.unsure)
        parts = []
        for part in tagged:
            if part.looked_for is None:
                shown = bar(part.texts, show=progress, unit="picture", desc="words of captions")
                parts.append(_truth_of_captions(shown, words, options.share, unsure))
            else:
                parts.append(_truth_of_names(part, words))
        positives = np.concatenate([positive for positive, _ in parts])
        counted = np.concatenate([known for _, known in parts])
        _leave_out_rare(positives, counted, words, options.least)
        pictures = [name for part in tagged for name in part.pictures]
        kept = np.flatnonzero(positives.any(1))
        if len(kept) < len(pictures):
            logger.warning(
                "%d of %d pictures have no word of the vocabulary and are left out",
                len(pictures) - len(kept),
                len(pictures),
            )
        if not len(kept):
            raise DataError(
                f"{', '.join(self.roots)}: none of {len(pictures)} pictures has one of "
                f"{len(words)} words that {options.least} or more have; expected another "
                "data.words or a smaller data.least"
            )
        self.names = Names(pictures[i] for i in kept)
        self.positives = torch.from_numpy(positives[kept])
        self.counted = torch.from_numpy(counted[kept])
        shown = self.positives.sum(0).clamp(min=1)
        self.weights = shown.float() ** -options.balance if options.balance else None
        self.transform: Any = WholeSquare(self.image_size, options.fit)
        if train and options.augment is not None:
            self.transform = pair_transform(
                options.augment, self.image_size, inputs.mean, inputs.std
            )

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, rng: torch.Generator) -> TagSample | PairSample:
        """Read a picture with its words, or with the one that is drawn."""
        sample = self._words(index, rng)
        if self.decoding:
            image = read_image(self.names[index], max_pixels=self.max_pixels)
            sample.image = plain(self.transform(rng, *as_items(image))[0])
        return sample

    def without_pictures(self) -> Tags:
        """Return a source of the same words that opens no picture."""
        found = copy.copy(self)
        found.decoding = False
        return found

    def identity(self, *, progress: bool = False) -> str:
        """Return digits of the names, sizes and times of the pictures: no file is opened."""
        return identity_of_files([Path(name) for name in self.names], progress=progress)

    def identities(self) -> list[bytes]:
        """Return 16 bytes for each picture, of its name, size and time."""
        return identities_of_files([Path(name) for name in self.names])

    def _words(self, index: int, rng: torch.Generator) -> TagSample | PairSample:
        """Return the sample with a picture of no pixels, [3, 0, 0]."""
        nothing = torch.empty(3, 0, 0, dtype=torch.uint8)
        positives = self.positives[index]
        counted = self.counted[index]
        if self.texts == "tags":
            return TagSample(nothing, positives, counted)
        true = positives.nonzero().flatten()
        word = int(true[integer(rng, 0, len(true))])
        said = torch.zeros(1, len(self.words), dtype=torch.uint8)
        said[0, word] = 1
        # What is not known to be false of a picture is no negative of it.
        possible = (positives | ~counted).to(torch.uint8)
        return PairSample(nothing, self.token_ids[word][None], word, possible, said)

    def collate(self, samples: Sequence[Any]) -> TagBatch | PairBatch:
        """Put samples together."""
        if self.texts == "one":
            return collate_pairs(samples)
        return TagBatch(
            images=torch.stack([sample.image for sample in samples]),
            token_ids=self.token_ids,
            positives=torch.stack([sample.positives for sample in samples]),
            counted=torch.stack([sample.counted for sample in samples]),
            weights=self.weights,
            skipped=tuple(line for sample in samples for line in sample.skipped),
        )

    def describe(self) -> dict[str, Any]:
        """Return where the pictures lie, and how many show each word."""
        shown = self.positives.sum(0).tolist()
        return {
            "kind": "tags",
            "root": self.roots if len(self.roots) > 1 else self.roots[0],
            "pictures": len(self),
            "image_size": self.image_size,
            "texts": self.texts,
            "words": len(self.words),
            "pictures_of_words": {
                name: count for name, count in zip(self.words, shown, strict=True) if count
            },
        }


def _token_ids(words: Entities, inputs: ModelInputs, template: str) -> torch.Tensor:
    """Return the ids of all words [W, L].

    Raises:
        ConfigError: for words that the model does not know, and two that it reads alike.
    """
    ask: Callable[[str], list[str]] = getattr(inputs.tokenizer, "unknown", lambda text: [])
    if unknown := [name for name in words.phrases if ask(name)]:
        raise ConfigError(
            f"data.words: the model does not know {len(unknown)} of {len(words)} words, "
            f"the first {unknown[0]!r}; expected its own, data.words=null, or words that it knows"
        )
    ids = without_padding(inputs.tokenize([template.replace("{}", one) for one in words.phrases]))
    seen: dict[tuple[int, ...], str] = {}
    for name, row in zip(words.names, ids.tolist(), strict=True):
        other = seen.setdefault(tuple(row), name)
        if other != name:
            raise ConfigError(
                f"data.words: the model reads {other!r} and {name!r} alike; expected words that "
                "it can tell apart"
            )
    return ids


def _unsure(words: Entities, given: Sequence[str]) -> list[int]:
    unknown = [name for name in given if name not in words.names]
    if unknown:
        raise ConfigError(
            f"data.unsure names {unknown[0]!r}; expected some of {len(words)} words of the "
            "vocabulary"
        )
    return [words.names.index(name) for name in given]


def _truth_of_captions(
    pictures: Iterable[list[str]], words: Entities, share: float, unsure: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return which words are true of pictures, and which are counted, [pictures, W] bool each."""
    positives = []
    counted = []
    for captions in pictures:
        named = Counter(i for text in captions for i in {one.index for one in words.find(text)})
        true = np.zeros(len(words), bool)
        known = np.ones(len(words), bool)
        for word, times in named.items():
            # 1 of 5 is a share of 0.2 in floats too.
            enough = times >= share * len(captions) - 1e-9 and word not in unsure
            true[word] = enough
            known[word] = enough
        positives.append(true)
        counted.append(known)
    return np.stack(positives), np.stack(counted)


def _truth_of_names(part: Tagged, words: Entities) -> tuple[np.ndarray, np.ndarray]:
    """Return the same of pictures with names."""
    known = _known(part, words)
    positives = np.zeros((len(part.pictures), len(words)), bool)
    counted = np.zeros_like(positives)
    counted[:, list(known.values())] = True
    for row, names in enumerate(part.texts):
        positives[row, [known[name] for name in names if name in known]] = True
    return positives, counted


def _known(part: Tagged, words: Entities) -> dict[str, int]:
    """Return the words that names are; tell of those that are none of the vocabulary."""
    assert part.looked_for is not None
    found = {name: words.index_of(name.lower().split()) for name in part.looked_for}
    unknown = [name for name, index in found.items() if index is None]
    if unknown:
        times = Counter(name for names in part.texts for name in names)
        told = ", ".join(f"{name} {times[name]}" for name in unknown[:_TOLD])
        logger.warning(
            "%s: %d names are no words of the vocabulary and are left out: %s%s",
            part.where,
            len(unknown),
            told,
            ", ..." if len(unknown) > _TOLD else "",
        )
    return {name: index for name, index in found.items() if index is not None}


def _leave_out_rare(
    positives: np.ndarray, counted: np.ndarray, words: Entities, least: int
) -> None:
    """Count a word nowhere that fewer than ``least`` pictures show; tell of it."""
    shown = positives.sum(0)
    rare = np.flatnonzero(shown < least)
    positives[:, rare] = False
    counted[:, rare] = False
    logger.info("%d of %d words are shown by %d or more pictures", *_counts(words, rare), least)
    seen = [f"{words.names[i]} {shown[i]}" for i in rare if shown[i]]
    if seen:
        logger.warning(
            "%d words that fewer than %d pictures show are not counted: %s%s",
            len(seen),
            least,
            ", ".join(seen[:_TOLD]),
            ", ..." if len(seen) > _TOLD else "",
        )


def _counts(words: Entities, rare: np.ndarray) -> tuple[int, int]:
    return len(words) - len(rare), len(words)
