"""The scenes of ``data/scenes.py`` as image-text pairs, drawn once and held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import ConfigError
from ...progress import bar
from ..batches import PairBatch
from ..sampling import some
from ..scenes import CAPTIONS_PER_SCENE, Scenes
from ..superpixels import patch_labels, superpixels
from .base import ModelInputs, PairSample, Source, SourceOptions, collate_pairs


@dataclass
class Options(SourceOptions):
    """Attributes:
    style: ``digits`` or ``shapes``.
    train_size, val_size: scenes of each split.
    image_size: None: the model's.
    captions: of each picture in a batch, up to five, all positives of it.
    superpixels: whether batches carry ``segments``, the superpixel of each patch.
    superpixel_labels: ``majority`` or ``mean``, see ``superpixels.patch_labels``.
    with_unseen: whether the combinations that are held out are drawn too: for a CLIP that knows all
        words, as those of the web do.
    """

    kind: str = "scenes"
    workers: int = 0  # they are in memory: nothing to wait for
    style: str = "digits"
    train_size: int = 6000
    val_size: int = 300
    image_size: int | None = None
    captions: int = 1
    superpixels: bool = False
    superpixel_labels: str = "majority"
    with_unseen: bool = False


def create(
    options: Options,
    inputs: ModelInputs,
    *,
    split: str = "train",
    seed: int = 0,
    progress: bool = False,
) -> ScenePairs:
    if not 1 <= options.captions <= CAPTIONS_PER_SCENE:
        raise ConfigError(
            f"data.captions is {options.captions}; expected 1 to {CAPTIONS_PER_SCENE}"
        )
    size = options.train_size if split == "train" else options.val_size
    try:
        scenes = Scenes(
            options.style,
            split,
            size,
            seed,
            options.image_size or inputs.image_size,
            with_unseen=options.with_unseen,
        )
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    patch = inputs.patch_size if options.superpixels else None
    return ScenePairs(
        scenes,
        inputs,
        captions=options.captions,
        superpixel_patch=patch,
        superpixel_labels=options.superpixel_labels,
        progress=progress,
    )


class ScenePairs(Source[PairSample]):
    """Pairs of scenes.

    Args:
        scenes: drawn here, all of them.
        inputs: of which the tokenizer is used.
        captions, superpixel_labels: see ``Options``.
        superpixel_patch: side of a patch in pixels; None: no segments.
    """

    batch_type = PairBatch

    def __init__(
        self,
        scenes: Scenes,
        inputs: ModelInputs,
        *,
        captions: int = 1,
        superpixel_patch: int | None = None,
        superpixel_labels: str = "majority",
        progress: bool = False,
    ):
        self.scenes, self.captions = scenes, captions
        count, size = len(scenes), scenes.image_size
        names = {name: i for i, name in enumerate(scenes.vocabulary.classes)}
        self.images = torch.empty(count, 3, size, size, dtype=torch.uint8)
        self.entities = torch.zeros(count, CAPTIONS_PER_SCENE, len(names), dtype=torch.uint8)
        segments: list[np.ndarray] = []
        texts: list[str] = []
        for i in bar(
            range(count), show=progress, desc=f"drawing {scenes.form}", unit="scene", leave=False
        ):
            scene = scenes[i]
            self.images[i] = torch.from_numpy(scene.image).permute(2, 0, 1)
            if superpixel_patch is not None:
                regions = superpixels(
                    scene.image, scale=200.0, sigma=0.8, min_size=60
                )  # for pictures of 48 pixels
                segments.append(patch_labels(regions, superpixel_patch, superpixel_labels).ravel())
            texts += [caption.text for caption in scene.captions]
            for k, caption in enumerate(scene.captions):
                self.entities[i, k, [names[entity] for entity in caption.entities]] = 1
        self.segments = torch.from_numpy(np.stack(segments)) if segments else None
        self.texts = texts
        self.token_ids = inputs.tokenize(texts).view(count, CAPTIONS_PER_SCENE, -1)

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int, rng: torch.Generator) -> PairSample:
        return self.pair(index, rng)[0]

    def pair(self, index: int, rng: torch.Generator) -> tuple[PairSample, list[int]]:
        """A sample, and which of the scene's captions its texts are."""
        texts = some(rng, self.captions, CAPTIONS_PER_SCENE)
        sample = PairSample(
            self.images[index],
            self.token_ids[index, texts],
            index,
            image_entities=self.entities[index].amax(0),
            text_entities=self.entities[index, texts],
            segments=None if self.segments is None else self.segments[index],
        )
        return sample, texts

    def collate(self, samples: Sequence[PairSample]) -> PairBatch:
        return collate_pairs(samples)

    def describe(self) -> dict[str, Any]:
        scenes = self.scenes
        return {
            "kind": "scenes",
            "style": scenes.form,
            "split": scenes.split,
            "pictures": len(scenes),
            "seed": scenes.seed,
            "image_size": scenes.image_size,
            "captions": self.captions,
        }
