"""Pictures with class masks: a benchmark's folder layout (``data/sets``), or the scenes with their
exact masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ...errors import ConfigError, InputError
from ..batches import MaskBatch
from ..benchmark_sets import IGNORE, SegmentationSet
from ..images import MAX_PIXELS
from ..masks import MaskAugment, mask_transform
from ..scenes import VOCABULARIES, Scenes
from ..transforms import as_items, checked_range, plain
from .base import ModelInputs, Sample, Source, SourceOptions


@dataclass
class Options(SourceOptions):
    """Attributes:
    set: a name of ``ovseg data list``, the path of a description, or ``digits`` or ``shapes`` for
        the scenes.
    root: the data root; the scenes need none.
    train_split, val_split: of the set; VOC is usually trained on its ``trainaug``.
    train_size, val_size, with_unseen: of the scenes; see ``Scenes``.
    image_size: side of the crop; None: the model's.
    ignore_index: of pixels that have no label.
    augment: see ``MaskAugment``; for training only.
    max_pixels: pictures and masks of a set with more are bad ones.
    """

    kind: str = "masks"
    set: str = "digits"
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    train_size: int = 6000
    val_size: int = 300
    with_unseen: bool = False
    image_size: int | None = None
    ignore_index: int = 255
    augment: MaskAugment = field(default_factory=MaskAugment)
    max_pixels: int = MAX_PIXELS


def create(
    options: Options,
    inputs: ModelInputs,
    *,
    split: str = "train",
    seed: int = 0,
    progress: bool = False,
) -> Masks:
    train, augment = split == "train", options.augment
    try:
        checked_range("data.augment.ratio", augment.ratio, 0, 16)
        most = options.LIMITS["image_size"][1]
        sides = min(augment.scale) >= 1 and max(augment.scale) <= most
        if not sides or not 0 < augment.class_cap <= 1 or not 0 <= augment.flip <= 1:
            raise ValueError(
                f"data.augment is scale {list(augment.scale)}, class_cap {augment.class_cap}, "
                f"flip {augment.flip}; expected "
                f"sides of 1 to {most} pixels, a share above 0 and a share"
            )
        data: LabelledPictures
        if options.set in VOCABULARIES:
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
            )
    except (ValueError, InputError) as error:
        raise ConfigError(str(error)) from error
    return Masks(
        data,
        inputs,
        image_size=options.image_size,
        ignore_index=options.ignore_index,
        augment=augment,
        train=train,
    )


class LabelledPictures(Protocol):
    """What ``Masks`` reads: ``SegmentationSet``, or anything like it."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def unseen(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, np.ndarray]: ...


class LabelledScenes:
    """Scenes as labelled pictures."""

    def __init__(self, scenes: Scenes):
        self.scenes, words = scenes, scenes.vocabulary
        self.classes = words.classes
        self.unseen = tuple(
            name
            for name, split in zip(words.classes, words.split_of_class, strict=True)
            if split == "unseen"
        )

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
        inputs, image_size, ignore_index, augment: see ``Options``.
        train: False: no augmentation.

    Attributes:
        classes, unseen: names in the order of the labels; those that zero-shot training holds out.
    """

    batch_type = MaskBatch

    def __init__(
        self,
        data: LabelledPictures,
        inputs: ModelInputs,
        *,
        image_size: int | None = None,
        ignore_index: int = 255,
        augment: MaskAugment | None = None,
        train: bool = True,
    ):
        if not len(data.classes) <= ignore_index:
            raise ConfigError(
                f"data.ignore_index is {ignore_index}, the label of a class; expected at least "
                f"{len(data.classes)}"
            )
        self.data, self.ignore_index = data, ignore_index
        self.classes, self.unseen = data.classes, data.unseen
        self.image_size = image_size or inputs.image_size
        self.transform = mask_transform(
            augment or MaskAugment(), self.image_size, inputs.mean, ignore_index, train=train
        )

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int, rng: torch.Generator) -> MaskSample:
        picture, truth = self.data[index]
        image, mask = self.transform(
            rng, *as_items(picture, np.where(truth == IGNORE, self.ignore_index, truth))
        )
        return MaskSample(plain(image), plain(mask)[0].long())

    def collate(self, samples: Sequence[MaskSample]) -> MaskBatch:
        return MaskBatch(
            images=torch.stack([sample.image for sample in samples]),
            masks=torch.stack([sample.mask for sample in samples]),
            ignore_index=self.ignore_index,
            skipped=tuple(line for sample in samples for line in sample.skipped),
        )

    def describe(self) -> dict[str, Any]:
        name = (
            self.data.description.name
            if isinstance(self.data, SegmentationSet)
            else type(self.data).__name__
        )
        return {
            "kind": "masks",
            "set": name,
            "pictures": len(self),
            "classes": len(self.classes),
            "image_size": self.image_size,
        }
