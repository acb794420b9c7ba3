"""Pictures with class masks: a benchmark of ``data/sets``, or the scenes with their exact masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ...bounds import bounded
from ...errors import ConfigError, InputError
from ..batches import MaskBatch
from ..benchmark_sets import SegmentationSet
from ..images import MAX_PIXELS
from ..mask_files import IGNORE
from ..mask_transforms import MaskAugment, mask_transform
from ..scenes import VOCABULARIES, Scenes
from ..transforms import WholeSquare, as_items, plain
from .base import MOST_PIXELS, MOST_SCENES, MOST_SIDE, ModelInputs, Sample, Source, SourceOptions


@dataclass
class Options(SourceOptions):
    """Options of pictures with class masks.

    Attributes:
        set: a name of ``ovseg data list``, the path of a description, or ``digits`` or ``shapes``
            for the scenes.
        root: the data root; the scenes need none.
        train_split, val_split: of the set; VOC is usually trained on its ``trainaug``.
        partial: whether a part of the set's pictures will do, those of which picture and mask are
            there; ``describe`` says which part it is.
        train_size, val_size, with_unseen: of the scenes; see ``Scenes``.
        image_size: side of the crop; None: the model's.
        ignore_index: of pixels that have no label.
        augment: see ``MaskAugment``; for training only. None: no augmentation, each picture becomes
            a square as ``fit`` says.
        fit: squash, the whole picture; crop, the largest square in its middle; or pad, the whole
            picture with its aspect, and no label beside it.
        max_pixels: pictures and masks of a set with more are bad ones.
    """

    kind: str = "masks"
    set: str = "digits"
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    partial: bool = False
    train_size: int = bounded(6000, low=0, high=MOST_SCENES, integer=True)
    val_size: int = bounded(300, low=0, high=MOST_SCENES, integer=True)
    with_unseen: bool = False
    image_size: int | None = bounded(None, low=1, high=MOST_SIDE, integer=True)
    ignore_index: int = bounded(255, low=0, high=65535, integer=True)
    augment: MaskAugment | None = field(default_factory=MaskAugment)
    fit: str = bounded("squash", one_of=("squash", "crop", "pad"))
    max_pixels: int = bounded(MAX_PIXELS, low=1, high=MOST_PIXELS, integer=True)


def create(
    options: Options,
    inputs: ModelInputs,
    *,
    split: str = "train",
    seed: int = 0,
    progress: bool = False,
) -> Masks:
    """Open a split of the set, or draw one of the scenes."""
    train = split == "train"
    try:
        data: LabelledPictures
        if options.set in VOCABULARIES:
            if options.partial:
                raise ValueError(
                    f"data.partial is True and data.set is {options.set!r}, which is drawn; "
                    "expected a benchmark"
                )
            data = LabelledScenes(
                Scenes(
                    options.set,
                    split,
                    options.train_size if train else options.val_size,
                    seed,
                    options.image_size or inputs.image_size,
                    with_unseen=options.with_unseen,
                )
            )
        elif options.root is None:
            raise ValueError(f"data.root is null; expected the folder that holds {options.set!r}")
        else:
            data = SegmentationSet(
                options.set,
                options.root,
                options.train_split if train else options.val_split,
                max_pixels=options.max_pixels,
                partial=options.partial,
            )
    except (ValueError, InputError) as error:
        raise ConfigError(str(error)) from error
    return Masks(data, inputs, options, train=train)


class LabelledPictures(Protocol):
    """The set that ``Masks`` reads: ``SegmentationSet``, or anything like it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the labels."""

    @property
    def unseen(self) -> tuple[str, ...]:
        """Names of the classes that zero-shot training holds out."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, np.ndarray]: ...


class LabelledScenes:
    """Scenes as labelled pictures."""

    def __init__(self, scenes: Scenes):
        self.scenes = scenes
        self.classes = scenes.vocabulary.classes
        self.unseen = scenes.vocabulary.unseen_classes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        scene = self.scenes[index]
        return Image.fromarray(scene.image), scene.mask


@dataclass
class MaskSample(Sample):
    """``image`` uint8 [3, H, W] and ``mask`` int64 [H, W]."""

    image: torch.Tensor
    mask: torch.Tensor


class Masks(Source[MaskSample]):
    """Labelled pictures, augmented.

    Every class keeps its label: which ones are not to be learnt is for the objective to say.

    Args:
        data: pictures with truths [H, W], -1 where there is no label.
        inputs: of the model.
        options: see there.
        train: False: the middle, at the scale of ``augment``.

    Attributes:
        classes, unseen: names in the order of the labels; those that zero-shot training holds out.
    """

    batch_type = MaskBatch

    def __init__(
        self,
        data: LabelledPictures,
        inputs: ModelInputs,
        options: Options | None = None,
        *,
        train: bool = True,
    ):
        options = options or Options()
        ignore_index = options.ignore_index
        if ignore_index < len(data.classes):
            raise ConfigError(
                f"data.ignore_index is {ignore_index}, the label of a class; expected at least "
                f"{len(data.classes)}"
            )
        self.data = data
        self.ignore_index = ignore_index
        self.classes = data.classes
        self.unseen = data.unseen
        self.image_size = options.image_size or inputs.image_size
        self.transform: Any = WholeSquare(self.image_size, options.fit)
        if options.augment is not None or options.fit == "pad":
            self.transform = mask_transform(
                options.augment, self.image_size, inputs.mean, ignore_index, train=train
            )

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int, rng: torch.Generator) -> MaskSample:
        """Read a picture and its mask, changed together."""
        picture, truth = self.data[index]
        labels = np.where(truth == IGNORE, self.ignore_index, truth)
        image, mask = self.transform(rng, *as_items(picture, labels))
        return MaskSample(plain(image), plain(mask)[0].long())

    def collate(self, samples: Sequence[MaskSample]) -> MaskBatch:
        """Put samples together."""
        return MaskBatch(
            images=torch.stack([sample.image for sample in samples]),
            masks=torch.stack([sample.mask for sample in samples]),
            ignore_index=self.ignore_index,
            skipped=tuple(line for sample in samples for line in sample.skipped),
        )

    def describe(self) -> dict[str, Any]:
        """Return the name of the set and how many pictures and classes it has."""
        data = self.data
        name = type(data).__name__
        part = None
        if isinstance(data, SegmentationSet):
            name = data.description.name
            part = data.partial
        found = {
            "kind": "masks",
            "set": name,
            "pictures": len(self),
            "classes": len(self.classes),
            "image_size": self.image_size,
        }
        return found if part is None else {**found, "partial": part}
