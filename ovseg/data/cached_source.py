"""A source whose pictures are replaced by what a frozen tower has made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import DataError
from .batches import Batch
from .feature_store import FeatureStore
from .sources.base import Sample, Source


@dataclass
class CachedSample(Sample):
    """An example of the source inside, and the number of the row that stands for its picture."""

    inside: Sample
    number: int


class CachedSource(Source[CachedSample]):
    """Examples of another source, their features in the place of pictures.

    What is drawn of them, captions and what comes with them, is what the other source draws. A
    picture that could not be encoded is replaced as one that cannot be read.

    Args:
        pictures: the source, of any kind.

    Attributes:
        pictures: the source that reads pictures.
    """

    def __init__(self, pictures: Source[Any]):
        self.pictures = pictures
        self.batch_type = pictures.batch_type  # type: ignore[misc]
        self._inside = pictures.without_pictures()
        self._store: FeatureStore | None = None
        self._bad: dict[int, str] = {}

    def use(self, store: FeatureStore, bad: Mapping[int, str]) -> None:
        """Read from ``store`` from now on.

        Args:
            store: with all rows but those of ``bad``.
            bad: number of a picture -> why it has none.
        """
        self._store = store
        self._bad = dict(bad)

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: int, rng: torch.Generator) -> CachedSample:
        """Read an example without its picture."""
        if index in self._bad:
            raise DataError(self._bad[index])
        return CachedSample(self._inside.read(index, rng), index)

    def collate(self, samples: Sequence[CachedSample]) -> Batch:
        """Put samples together, and their features beside them."""
        if self._store is None:
            raise RuntimeError("the features are not there yet; expected use() to be called first")
        batch = self._inside.collate([sample.inside for sample in samples])
        return replace(
            batch,
            images=batch.images.new_empty(len(samples), 3, 0, 0),
            features=self._store.read([sample.number for sample in samples]),
            skipped=tuple(line for sample in samples for line in sample.skipped),
        )

    def describe(self) -> dict[str, Any]:
        """Return what the other source says."""
        return self.pictures.describe()


def uncached(source: Source[Any]) -> Source[Any]:
    """Return the source that reads pictures."""
    return source.pictures if isinstance(source, CachedSource) else source
