"""Image-text pairs from a plain folder: ``name.jpg`` with ``name.txt`` beside it, one caption a line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import ConfigError, DataError
from ..batch_types import PairBatch
from ..draws import some
from ..images import SUFFIXES, read_image
from ..pairs import PairSample, caption_id, collate_pairs
from ..superpixels import SuperpixelFile, patch_labels
from ..transforms import PairAugment, as_items, checked_range, pair_transform, plain
from .base import ModelInputs, Source, SourceOptions

logger = logging.getLogger(__name__)


@dataclass
class Options(SourceOptions):
    """Attributes:
    root: searched with all folders below it.
    image_size: None: the model's.
    captions: of each picture in a batch, all positives of it; repeated where a picture has fewer.
    superpixels: side file of ``ovseg data superpixels``; batches then carry ``segments``, cropped with the picture.
    superpixel_labels: ``majority`` or ``mean``, see ``superpixels.patch_labels``.
    augment: see ``PairAugment``.
    """

    kind: str = "folder"
    root: str | None = None
    image_size: int | None = None
    captions: int = 1
    superpixels: str | None = None
    superpixel_labels: str = "majority"
    augment: PairAugment = field(default_factory=PairAugment)


def create(options: Options, inputs: ModelInputs, *, split: str = "train", seed: int = 0, progress: bool = False) -> FolderPairs:
    if options.root is None:
        raise ConfigError("data.root is null; with data.kind=folder expected a folder of pictures with .txt captions")
    if options.captions < 1:
        raise ConfigError(f"data.captions is {options.captions}; expected at least 1")
    if options.superpixel_labels not in ("majority", "mean"):
        raise ConfigError(f"data.superpixel_labels is {options.superpixel_labels!r}; expected 'majority' or 'mean'")
    try:
        checked_range("data.augment.scale", options.augment.scale, 0, 1)
        checked_range("data.augment.ratio", options.augment.ratio, 0, float("inf"))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    augment = options.augment if split == "train" else PairAugment((1.0, 1.0), (1.0, 1.0))
    return FolderPairs(options.root, inputs, image_size=options.image_size, captions=options.captions, superpixels=options.superpixels,
                       superpixel_labels=options.superpixel_labels, augment=augment)


class FolderPairs(Source[PairSample]):
    """Pairs of a folder, in the order of their paths. For the arguments see ``Options``.

    A picture without a caption file is left out; one that is damaged, or whose captions are, is replaced when it is its turn.

    Raises:
        DataError: if there is no pair, or the superpixels of one are missing.
    """

    batch_type = PairBatch

    def __init__(self, root: str | Path, inputs: ModelInputs, *, image_size: int | None = None, captions: int = 1,
                 superpixels: str | Path | None = None, superpixel_labels: str = "majority", augment: PairAugment | None = None):
        self.root, self.inputs, self.captions, self.superpixel_labels = Path(root), inputs, captions, superpixel_labels
        if not self.root.is_dir():
            raise DataError(f"data.root {str(root)!r} is no folder; expected pictures with .txt captions beside them")
        pictures, pairs = _pairs(self.root)
        if not pairs:
            raise DataError(f"data.root {str(root)!r} holds {pictures} pictures, 0 of them with a .txt; expected at least one")
        if len(pairs) < pictures:
            logger.warning("%d of %d pictures below %s have no .txt of captions and are left out", pictures - len(pairs), pictures, root)
        self.names = Names(pairs)
        self.superpixels = None if superpixels is None else SuperpixelFile(superpixels)
        missing = [] if self.superpixels is None else [name for name in pairs if name not in self.superpixels]
        if missing:
            raise DataError(f"data.superpixels {str(superpixels)!r} lacks {len(missing)} of {len(pairs)} pictures, the first "
                            f"{missing[0]}; expected ovseg data superpixels to be run again")
        self.image_size = image_size or inputs.image_size
        self.transform = pair_transform(augment or PairAugment(), self.image_size)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, rng: torch.Generator) -> PairSample:
        name = self.names[index]
        lines = _captions(self.root / name)
        texts = [lines[i] for i in some(rng, self.captions, len(lines))]
        maps = [] if self.superpixels is None else [self.superpixels[name]]
        image, *crops = self.transform(rng, *as_items(read_image(self.root / name), *maps))
        segments = None
        if crops:
            labels = patch_labels(crops[0][0].numpy(), self.inputs.patch_size, self.superpixel_labels)
            segments = torch.from_numpy(labels).flatten()
        # Equal captions are one id. With several a picture has its own: one id could not say which of its texts is shared.
        number = caption_id(texts[0]) if self.captions == 1 else index
        return PairSample(plain(image), self.inputs.tokenize(texts), number, segments=segments)

    def collate(self, samples: Sequence[PairSample]) -> PairBatch:
        return collate_pairs(samples)

    def describe(self) -> dict[str, Any]:
        return {"kind": "folder", "root": str(self.root), "pictures": len(self), "image_size": self.image_size, "captions": self.captions}


class Names(Sequence[str]):
    """Strings in one block of memory: millions of them cost their letters, and workers share them."""

    def __init__(self, names: Iterable[str]):
        parts = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(part) for part in parts])
        self._letters = np.frombuffer(b"".join(parts), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._letters[start : self._ends[index]].tobytes())


def _pairs(root: Path) -> tuple[int, list[str]]:
    """(number of pictures, those with a caption file as sorted paths below the root). One look at each folder, none at a file."""
    pictures, found = 0, []
    for folder, _, files in os.walk(root):
        below = os.path.relpath(folder, root)
        texts = {name[:-4] for name in files if name.endswith(".txt")}
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SUFFIXES:
                pictures += 1
                if stem in texts:
                    found.append(name if below == "." else f"{below}/{name}".replace(os.sep, "/"))
    return pictures, sorted(found)


def _captions(picture: Path) -> list[str]:
    path = picture.with_suffix(".txt")
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read captions {path}: {error}") from error
    if not lines:
        raise DataError(f"{path} is empty; expected one caption a line")
    return lines
