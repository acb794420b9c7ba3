"""Image-text pairs of a folder: ``name.jpg`` with ``name.txt`` beside it, one caption a line."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...bounds import bounded
from ...distributed import is_main
from ...errors import ConfigError, DataError, NoData
from ...paths import no_folder
from ...progress import waiting
from ...text_files import lines_of
from ..batches import PairBatch
from ..folders import Folder
from ..images import MAX_PIXELS, read_image
from ..pair_samples import PairSample, caption_id, collate_pairs
from ..sampling import some
from ..superpixels import PATCH_RULES, SuperpixelFile, patch_labels
from ..transforms import PairAugment, as_items, pair_transform, plain
from .base import MOST_PIXELS, MOST_SIDE, ModelInputs, Source, SourceOptions, identity_of_files

logger = logging.getLogger(__name__)


@dataclass
class Options(SourceOptions):
    """Options of a folder of pairs.

    Attributes:
        root: searched with all folders below it.
        image_size: side of the crop; None: the model's.
        captions: of each picture in a batch, all positives of it; repeated where a picture has
            fewer.
        superpixels: side file of ``ovseg data superpixels``; batches then carry ``segments``,
            cropped with the picture.
        superpixel_labels: how a patch gets its superpixel, see ``superpixels.patch_labels``.
        augment: see ``PairAugment``.
        max_pixels: pictures with more are bad ones.
    """

    kind: str = "folder"
    root: str | None = None
    image_size: int | None = bounded(None, low=1, high=MOST_SIDE, integer=True)
    captions: int = bounded(1, low=1, high=1000, integer=True)
    superpixels: str | None = None
    superpixel_labels: str = bounded("majority", one_of=PATCH_RULES)
    augment: PairAugment = field(default_factory=PairAugment)
    max_pixels: int = bounded(MAX_PIXELS, low=1, high=MOST_PIXELS, integer=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        policy = self.augment.rand_augment
        if policy is not None and self.superpixels is not None:
            raise ConfigError(
                f"data.augment.rand_augment is {policy!r} and data.superpixels "
                f"{self.superpixels!r}; expected one of them: superpixels would not move with the "
                "picture"
            )


def create(
    options: Options,
    inputs: ModelInputs,
    *,
    split: str = "train",
    seed: int = 0,
    progress: bool = False,
) -> FolderPairs:
    """Open the folder; a validation split is not augmented."""
    if options.root is None:
        raise ConfigError(
            "data.root is null; with data.kind=folder expected a folder of pictures with .txt "
            "captions"
        )
    return FolderPairs(options.root, inputs, options, train=split == "train")


class FolderPairs(Source[PairSample]):
    """Pairs of a folder, in the order of their paths.

    A picture without a caption file is left out; one that is damaged, or whose captions are, is
    replaced when it is its turn.

    Args:
        root: of the folder.
        inputs: of the model.
        options: how pictures and captions are read.
        train: False: no augmentation.

    Raises:
        DataError: if there is no pair, or the superpixels of one are missing.
    """

    batch_type = PairBatch
    decoding = True

    def __init__(
        self,
        root: str | Path,
        inputs: ModelInputs,
        options: Options | None = None,
        *,
        train: bool = True,
    ):
        options = options or Options()
        self.root = Path(root)
        self.inputs = inputs
        self.captions = options.captions
        self.superpixel_labels = options.superpixel_labels
        self.max_pixels = options.max_pixels
        self.image_size = options.image_size or inputs.image_size
        pairs = find_pairs(root)
        self.names = Names(pairs)
        self.superpixels: SuperpixelFile | None = None
        if options.superpixels is not None:
            known = self.superpixels = SuperpixelFile(options.superpixels)
            missing = [name for name in pairs if name not in known]
            if missing:
                raise DataError(
                    f"data.superpixels {str(known.path)!r} lacks {len(missing)} of {len(pairs)} "
                    f"pictures, the first {missing[0]}; expected ovseg data superpixels to be run "
                    "again"
                )
        augment = options.augment if train else PairAugment((1.0, 1.0), (1.0, 1.0))
        self.transform = pair_transform(augment, self.image_size, inputs.mean, inputs.std)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, rng: torch.Generator) -> PairSample:
        """Read a picture with some of its captions."""
        return self.pair(index, rng)[0]

    def pair(self, index: int, rng: torch.Generator) -> tuple[PairSample, list[str], list[int]]:
        """Return a sample, all captions of the picture, and which of them its texts are."""
        name = self.names[index]
        lines = captions_of(self.root / name)
        chosen = some(rng, self.captions, len(lines))
        texts = [lines[i] for i in chosen]
        maps = [] if self.superpixels is None else [self.superpixels[name]]
        image, *crops = self.picture(index, rng, *maps)
        segments = None
        if crops:
            pixels = crops[0][0].numpy()
            labels = patch_labels(pixels, self.inputs.patch_size, self.superpixel_labels)
            segments = torch.from_numpy(labels).flatten()
        # Equal captions are one id. With several a picture has its own: one id could not say which
        # of its texts is shared.
        number = caption_id(texts[0]) if self.captions == 1 else index
        sample = PairSample(image, self.inputs.tokenize(texts), number, segments=segments)
        return sample, lines, chosen

    def picture(self, index: int, rng: torch.Generator, *maps: np.ndarray) -> list[torch.Tensor]:
        """Return a picture [3, H, W] and its maps, augmented together."""
        if not self.decoding and not maps:
            return [torch.empty(3, 0, 0, dtype=torch.uint8)]
        image = read_image(self.root / self.names[index], max_pixels=self.max_pixels)
        return [plain(part) for part in self.transform(rng, *as_items(image, *maps))]

    def without_pictures(self) -> FolderPairs:
        """Return a source that decodes no picture, but for those that superpixels lie over."""
        found = copy.copy(self)
        found.decoding = False
        return found

    def identity(self, *, progress: bool = False) -> str:
        """Return digits of the names, sizes and times of the pictures: no file is opened."""
        return identity_of_files([self.root / name for name in self.names], progress=progress)

    def collate(self, samples: Sequence[PairSample]) -> PairBatch:
        """Put samples together."""
        return collate_pairs(samples)

    def describe(self) -> dict[str, Any]:
        """Return where the pairs lie and how many there are."""
        return {
            "kind": "folder",
            "root": str(self.root),
            "pictures": len(self),
            "image_size": self.image_size,
            "captions": self.captions,
        }


class Names(Sequence[str]):
    """Strings in one block of memory, which workers share: millions cost no more than letters."""

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

    def block(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all letters, uint8, and where each name ends, int64."""
        return self._letters, np.asarray(self._ends, np.int64)


def find_pairs(root: str | Path) -> list[str]:
    """Return the pictures with a caption file, as sorted paths below the root.

    What is left out is told. One look is taken at each folder, none at a file.

    Raises:
        DataError: if there is none.
    """
    if (what := no_folder(root)) is not None:
        raise NoData(
            f"data.root {str(root)!r} {what}; expected a folder of pictures with .txt captions "
            "beside them"
        )
    folder = Folder(Path(root))
    pairs: list[str] = []
    with waiting(f"looking through {root}", show=is_main()):
        for below, pictures, others in folder.walk():
            texts = {name[:-4] for name in others if name.endswith(".txt")}
            pairs += [f"{below}{name}" for name in pictures if os.path.splitext(name)[0] in texts]
    if not pairs:
        shards = (
            "; shards are not read in training: unpack them (tar -xf), the captions lie in them as "
            ".txt"
        )
        raise DataError(
            f"data.root {str(root)!r} holds {len(folder.pictures)} pictures, 0 of them with a "
            f".txt; found there: {folder.found()}; expected name.jpg with its captions in name.txt "
            f"beside it{shards if '.tar' in folder.others else ''}"
        )
    if (bare := len(folder.pictures) - len(pairs)) > 0:
        logger.warning(
            "%d of %d pictures below %s have no .txt of captions and are left out",
            bare,
            len(folder.pictures),
            root,
        )
    if folder.bad:
        logger.warning(
            "%d files below %s cannot be used and are left out; the first: %s",
            len(folder.bad),
            root,
            folder.bad[0],
        )
    for line in folder.left_out(others=False):  # the captions are no news
        logger.warning("%s", line)
    return sorted(pairs)


def captions_of(picture: Path) -> list[str]:
    """Return the captions beside a picture.

    Raises:
        DataError: if there are none.
    """
    return lines_of(picture.with_suffix(".txt"), "captions", "one caption a line", DataError)
