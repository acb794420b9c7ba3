"""What a source of data is: a list of pictures of which each can be read by its number, and the way
from samples to a batch.

Pairs of pictures and texts: a sample, its way into a ``PairBatch``, ids, and which pairs may count
as negatives.

Pictures that could not be used: named once, counted, and too many of them end training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, ClassVar, Generic, TypeVar

import torch

from ...errors import DataError, InputError
from ...options import within
from ..batches import Batch, PairBatch
from ..sampling import generator, mix

_ATTEMPTS = 32  # pictures in a row; at the limit of 1 % bad ones this never happens


@dataclass
class SourceOptions:
    """What every kind of data has; each kind adds its own.

    Attributes:
        kind: the name of its file in ``data/sources``.
        workers: processes that read ahead; 0: the training process reads.
        prefetch: batches that each of them keeps ready.
        LIMITS: least and largest value of integers, those of other kinds included: what sizes
            memory or starts processes has an end.
    """

    LIMITS: ClassVar[dict[str, tuple[int, int]]] = {
        "workers": (0, 1024),
        "prefetch": (1, 1024),
        "image_size": (1, 16384),
        "captions": (1, 1000),
        "train_size": (0, 1_000_000),
        "val_size": (0, 1_000_000),
        "ignore_index": (0, 65535),
        "nouns": (1, 100),
        "max_pixels": (1, 10_000_000_000),
    }

    kind: str = "?"
    workers: int = 2
    prefetch: int = 2

    def check(self, key: str = "data") -> None:
        """ConfigError for an integer out of its limits; ``key`` stands before its name."""
        for name, limits in self.LIMITS.items():
            value = getattr(self, name, None)
            if value is not None:
                within(f"{key}.{name}", value, *limits)


@dataclass(frozen=True)
class ModelInputs:
    """What a source has to know of the model.

    Attributes:
        image_size, patch_size: in pixels, where the options say nothing else.
        tokenizer: texts to [T, L] ids, 0 is padding; called in the workers.
        mean: RGB in 0..1, what padding looks like: 0 once normalised.
        std: of RGB in 0..1.
    """

    image_size: int
    patch_size: int = 16
    tokenizer: Callable[[Sequence[str]], torch.Tensor] | None = None
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def of(cls, model: Any) -> ModelInputs:
        spec = model.spec
        return cls(
            spec.image_size, spec.patch_size, model.tokenizer, tuple(spec.mean), tuple(spec.std)
        )

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        if self.tokenizer is None:
            raise ValueError("this kind of data has texts and no tokenizer was given")
        return self.tokenizer(texts)


@dataclass
class Sample:
    """One example, decoded, augmented and tokenised; ``skipped``: what could not be read and was
    replaced by it.
    """

    skipped: tuple[str, ...] = field(default=(), kw_only=True)


S = TypeVar("S", bound=Sample)


class Source(ABC, Generic[S]):
    """Base of the kinds of data. It must be usable in a worker process (forked, or pickled).

    Attributes:
        batch_type: what ``collate`` returns; an objective says which it takes.
    """

    batch_type: ClassVar[type[Batch]]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int, rng: torch.Generator) -> S:
        """Example ``index``; all that is random comes from ``rng``.

        Raises:
            InputError, DataError: if it cannot be used; it is then replaced.
        """

    @abstractmethod
    def collate(self, samples: Sequence[S]) -> Batch: ...

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What it is, for logs and for the model that is saved: plain values."""

    def sample(self, index: int, rng_seed: int) -> S:
        """Example ``index``, or one that (index, rng_seed) chooses where it cannot be used.

        Raises:
            DataError: if the replacements are no better.
        """
        skipped: list[str] = []
        at = index
        for attempt in range(_ATTEMPTS):
            try:
                found = self.read(at, generator(mix(rng_seed, attempt)))
            except (InputError, DataError) as error:
                skipped.append(str(error))
                at = mix(rng_seed, index, attempt) % len(self)
            else:
                found.skipped = tuple(skipped)
                return found
        raise DataError(f"{_ATTEMPTS} pictures in a row cannot be used; the first: {skipped[0]}")


def stack(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """``torch.stack``; None if the parts are."""
    return None if parts[0] is None else torch.stack([part for part in parts if part is not None])


def together(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """``torch.cat``; None if the parts are."""
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])


def countable_pairs(
    text_entities: torch.Tensor, image_entities: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """[B, T] bool: the image's own texts, and texts that name something which no caption of the
    image names.

    A foreign text of which everything is named by the image's captions is true of that image by
    accident: it is no negative and is left out. Only captions are looked at, as with real data.

    Args:
        text_entities: [T, K] 0/1, what each text names among K entities.
        image_entities: [B, K] 0/1, what all captions of each image name.
        own: [B, T] bool, which texts are captions of which image.
    """
    unnamed = (1 - image_entities.float()) @ text_entities.float().T
    return own | (unnamed > 0)


def caption_id(text: str) -> int:
    """A 63-bit number of a caption, the same in every process: pictures with one and the same
    caption are positives of each other.
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass
class PairSample(Sample):
    """One picture with its texts.

    Attributes:
        image: [3, H, W] uint8.
        token_ids: [C, L] int64, C texts.
        id: what picture and texts share, and pairs of other pictures only if they are positives of
            this one.
        image_entities, text_entities: [K], [C, K] uint8, see ``PairBatch``.
        segments: [N] int64, the superpixel of each patch.
    """

    image: torch.Tensor
    token_ids: torch.Tensor
    id: int
    image_entities: torch.Tensor | None = None
    text_entities: torch.Tensor | None = None
    segments: torch.Tensor | None = None


def collate_pairs(samples: Sequence[PairSample]) -> PairBatch:
    """Texts lie in the order of their pictures.

    Columns at the end that are padding (0) of every text are cut off.
    """
    image_ids = torch.tensor([sample.id for sample in samples])
    token_ids = torch.cat([sample.token_ids for sample in samples])
    used = (token_ids != 0).any(0).nonzero()
    return PairBatch(
        images=torch.stack([sample.image for sample in samples]),
        token_ids=token_ids[:, : int(used[-1]) + 1 if len(used) else 1].contiguous(),
        image_ids=image_ids,
        text_ids=image_ids.repeat_interleave(
            torch.tensor([len(sample.token_ids) for sample in samples])
        ),
        image_entities=stack([sample.image_entities for sample in samples]),
        text_entities=together([sample.text_entities for sample in samples]),
        segments=stack([sample.segments for sample in samples]),
        skipped=tuple(line for sample in samples for line in sample.skipped),
    )


class SkipLimit:
    """Counts different bad pictures against a share of all.

    Args:
        pictures: number of pictures of the source.
        share: of them that may be bad; one always may.
    """

    def __init__(self, pictures: int, share: float = 0.01):
        self.pictures, self.share = pictures, share
        self.seen: dict[str, None] = {}

    def add(self, lines: Iterable[str]) -> list[str]:
        """Take note of ``Batch.skipped`` of all ranks; returns the lines that are new.

        Raises:
            DataError: past the limit. On every rank alike if every rank is given the lines of all.
        """
        new = [line for line in dict.fromkeys(lines) if line not in self.seen]
        self.seen.update(dict.fromkeys(new))
        if len(self.seen) > max(1, self.share * self.pictures):
            raise DataError(
                f"{len(self.seen)} of {self.pictures} pictures cannot be used, "
                f"{100 * self.share:g} % may; "
                f"the last: {next(reversed(self.seen))}"
            )
        return new

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = dict.fromkeys(state["seen"])
