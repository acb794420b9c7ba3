"""What a source of data is: a list of pictures of which each can be read by its number, and the way from samples to a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch

from ...errors import DataError, InputError
from ...options import within
from ..batch_types import Batch
from ..draws import generator, mix

_ATTEMPTS = 32  # pictures in a row; at the limit of 1 % bad ones this never happens


@dataclass
class SourceOptions:
    """What every kind of data has; each kind adds its own.

    Attributes:
        kind: the name of its file in ``data/sources``.
        workers: processes that read ahead; 0: the training process reads.
        prefetch: batches that each of them keeps ready.
        LIMITS: least and largest value of integers, those of other kinds included: what sizes memory or starts processes has an end.
    """

    LIMITS: ClassVar[dict[str, tuple[int, int]]] = {
        "workers": (0, 1024), "prefetch": (1, 1024), "image_size": (1, 16384), "captions": (1, 1000),
        "train_size": (0, 1_000_000), "val_size": (0, 1_000_000), "ignore_index": (0, 65535), "nouns": (1, 100),
        "max_pixels": (1, 10_000_000_000),
    }  # fmt: skip

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
        return cls(spec.image_size, spec.patch_size, model.tokenizer, tuple(spec.mean), tuple(spec.std))

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        if self.tokenizer is None:
            raise ValueError("this kind of data has texts and no tokenizer was given")
        return self.tokenizer(texts)


@dataclass
class Sample:
    """One example, decoded, augmented and tokenised; ``skipped``: what could not be read and was replaced by it."""

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
