"""Sources of data: examples that can each be read by number, and their way into a batch.

An example that cannot be read is replaced by another one and named in the batch; ``SkipLimit``
counts what was named and ends training where it is too much.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from ...bounds import bounded, check_bounds
from ...errors import DataError, InputError
from ...progress import bar
from ..batches import Batch
from ..sampling import generator, mix

MOST_PIXELS = 10_000_000_000  # of a picture, whatever a recipe allows
MOST_SIDE = 16384  # of what is cropped or drawn, in pixels
MOST_SCENES = 1_000_000
_ATTEMPTS = 32  # examples in a row; at the limit of 1 % bad ones this never happens


@dataclass
class SourceOptions:
    """Options that every kind of data has; each kind adds its own.

    What sizes memory or starts processes has an upper end too. Options are held to their bounds
    when they are made, so that an object which exists need not be checked again.

    Attributes:
        kind: the name of its file in ``data/sources``.
        workers: processes that read ahead; 0: the training process reads.
        prefetch: batches that each of them keeps ready.
    """

    kind: str = "?"
    workers: int = bounded(2, low=0, high=1024, integer=True)
    prefetch: int = bounded(2, low=1, high=1024, integer=True)

    def __post_init__(self) -> None:
        check_bounds(self, "data.")


@dataclass(frozen=True)
class ModelInputs:
    """The facts about a model that a source needs.

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
        """Take the inputs from a model."""
        spec = model.spec
        return cls(
            spec.image_size, spec.patch_size, model.tokenizer, tuple(spec.mean), tuple(spec.std)
        )

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the ids of texts, [T, L].

        Raises:
            ValueError: without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this kind of data has texts and no tokenizer was given")
        return self.tokenizer(texts)


@dataclass
class Sample:
    """One example, decoded, augmented and tokenised.

    Attributes:
        skipped: lines about what could not be read and was replaced by it.
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
        """Read example ``index``; all that is random comes from ``rng``.

        Raises:
            InputError: if it cannot be used; it is then replaced.
            DataError: likewise.
        """

    @abstractmethod
    def collate(self, samples: Sequence[S]) -> Batch:
        """Put examples together."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return plain values that say what it is, for logs and for the model that is saved."""

    def without_pictures(self) -> Source[S]:
        """Return a source of the same examples whose pictures nobody looks at.

        What is drawn stays the same. Here: this one, which reads them all the same.
        """
        return self

    def identity(self, *, progress: bool = False) -> str:
        """Return digits that change with the pictures, or with the order of their numbers.

        Here the pixels of all are looked at, which takes as long as an epoch of reading does.

        Args:
            progress: whether a bar is shown.
        """
        digest = hashlib.blake2b(digest_size=16)
        for index in bar(
            range(len(self)), show=progress, desc="looking at pictures", unit="picture", leave=False
        ):
            digest.update(self.digest_of(index))
        return digest.hexdigest()

    def identities(self) -> list[bytes] | None:
        """Return 16 bytes for each picture, by which another source of it can be recognised.

        None, as here, where pictures would have to be read for it.
        """
        return None

    def digest_of(self, index: int) -> bytes:
        """Return a hash of the pixels of a picture; nothing where it cannot be read."""
        try:
            images = self.collate([self.read(index, generator(index))]).images
        except (InputError, DataError):
            return b"-"
        head = f"{images.dtype} {list(images.shape)}".encode()
        return hashlib.blake2b(head + images.contiguous().numpy().tobytes()).digest()

    def sample(self, index: int, rng_seed: int) -> S:
        """Read example ``index``, or one that (index, rng_seed) chooses where it cannot be used.

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


def identity_of_files(paths: Iterable[Path], *, progress: bool = False) -> str:
    """Return digits of the names, sizes and times of files: none is opened.

    Args:
        paths: of the files.
        progress: whether a bar is shown.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in bar(paths, show=progress, desc="looking at files", unit="file", leave=False):
        digest.update(_facts_of_file(path))
    return digest.hexdigest()


def identities_of_files(paths: Iterable[Path]) -> list[bytes]:
    """Return 16 bytes of the name, size and time of each file: none is opened."""
    return [hashlib.blake2b(_facts_of_file(path), digest_size=16).digest() for path in paths]


def _facts_of_file(path: Path) -> bytes:
    try:
        found = os.stat(path)
        facts = f" {found.st_size} {found.st_mtime_ns}\n"
    except OSError as error:  # it is told when it is its turn
        facts = f" {error.errno}\n"
    return os.fsencode(path) + facts.encode()


class SkipLimit:
    """Counts different bad pictures against a share of all.

    Args:
        pictures: number of pictures of the source.
        share: of them that may be bad; one always may.
    """

    def __init__(self, pictures: int, share: float = 0.01):
        self.pictures = pictures
        self.share = share
        self.seen: dict[str, None] = {}

    def add(self, lines: Iterable[str]) -> list[str]:
        """Take note of ``Batch.skipped`` of all ranks; return the lines that are new.

        Raises:
            DataError: past the limit. On every rank alike if every rank is given the lines of all.
        """
        new = [line for line in dict.fromkeys(lines) if line not in self.seen]
        self.seen.update(dict.fromkeys(new))
        if len(self.seen) > max(1, self.share * self.pictures):
            raise DataError(
                f"{len(self.seen)} of {self.pictures} pictures cannot be used, "
                f"{100 * self.share:g} % may; the last: {next(reversed(self.seen))}"
            )
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return the lines that were seen."""
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.seen = dict.fromkeys(state["seen"])
