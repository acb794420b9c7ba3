"""The scenes of ``data/scenes.py`` as image-text pairs, drawn once and held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...bounds import bounded
from ...errors import ConfigError
from ...progress import bar
from ..batches import PairBatch
from ..pair_samples import PairSample, collate_pairs
from ..sampling import some
from ..scenes import CAPTIONS_PER_SCENE, Scenes
from ..superpixels import PATCH_RULES, patch_labels, superpixels
from .base import MOST_SCENES, MOST_SIDE, ModelInputs, Source, SourceOptions


@dataclass
class Options(SourceOptions):
    """Options of scenes with captions.

    Attributes:
        style: ``digits`` or ``shapes``.
        train_size, val_size: scenes of each split.
        image_size: None: the model's.
        captions: of each picture in a batch, all positives of it.
        superpixels: whether batches carry ``segments``, the superpixel of each patch.
        superpixel_labels: how a patch gets its superpixel, see ``superpixels.patch_labels``.
        with_unseen: whether the combinations that are held out are drawn too: for a CLIP that knows
            all words, as those of the web do.
    """

    kind: str = "scenes"
    workers: int = bounded(0, low=0, high=1024, integer=True)  # in memory: nothing to wait for
    style: str = "digits"
    train_size: int = bounded(6000, low=0, high=MOST_SCENES, integer=True)
    val_size: int = bounded(300, low=0, high=MOST_SCENES, integer=True)
    image_size: int | None = bounded(None, low=1, high=MOST_SIDE, integer=True)
    captions: int = bounded(1, low=1, high=CAPTIONS_PER_SCENE, integer=True)
    superpixels: bool = False
    superpixel_labels: str = bounded("majority", one_of=PATCH_RULES)
    with_unseen: bool = False


def create(
    options: Options,
    inputs: ModelInputs,
    *,
    split: str = "train",
    seed: int = 0,
    progress: bool = False,
) -> ScenePairs:
    """Draw the scenes of a split."""
    try:
        scenes = Scenes(
            options.style,
            split,
            options.train_size if split == "train" else options.val_size,
            seed,
            options.image_size or inputs.image_size,
            with_unseen=options.with_unseen,
        )
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    return ScenePairs(scenes, inputs, options, progress=progress)


class ScenePairs(Source[PairSample]):
    """Pairs of scenes.

    Args:
        scenes: drawn here, all of them.
        inputs: of which the tokenizer is used.
        options: see there.
        progress: whether a bar is shown.

    Attributes:
        images: [N, 3, H, W] uint8.
        texts, token_ids: the captions of all scenes, ``CAPTIONS_PER_SCENE`` of each.
        entities: [N, captions, classes] uint8, what each caption names.
    """

    batch_type = PairBatch

    def __init__(
        self,
        scenes: Scenes,
        inputs: ModelInputs,
        options: Options | None = None,
        *,
        progress: bool = False,
    ):
        options = options or Options()
        self.scenes = scenes
        self.captions = options.captions
        count = len(scenes)
        classes = scenes.vocabulary.classes
        self.images = torch.empty(count, 3, scenes.image_size, scenes.image_size, dtype=torch.uint8)
        self.entities = torch.zeros(count, CAPTIONS_PER_SCENE, len(classes), dtype=torch.uint8)
        self.texts: list[str] = []
        segments: list[np.ndarray] = []
        for i in bar(
            range(count), show=progress, desc=f"drawing {scenes.form}", unit="scene", leave=False
        ):
            scene = scenes[i]
            self.images[i] = torch.from_numpy(scene.image).permute(2, 0, 1)
            if options.superpixels:
                # For pictures of 48 pixels.
                regions = superpixels(scene.image, scale=200.0, sigma=0.8, min_size=60)
                labels = patch_labels(regions, inputs.patch_size, options.superpixel_labels)
                segments.append(labels.ravel())
            for k, caption in enumerate(scene.captions):
                self.texts.append(caption.text)
                named = [classes.index(entity) for entity in caption.entities]
                self.entities[i, k, named] = 1
        self.segments = torch.from_numpy(np.stack(segments)) if segments else None
        self.token_ids = inputs.tokenize(self.texts).view(count, CAPTIONS_PER_SCENE, -1)

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, index: int, rng: torch.Generator) -> PairSample:
        """Return a scene with some of its captions."""
        return self.pair(index, rng)[0]

    def pair(self, index: int, rng: torch.Generator) -> tuple[PairSample, list[int]]:
        """Return a sample, and which of the scene's captions its texts are."""
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

    def identity(self, *, progress: bool = False) -> str:
        """Return digits of all pixels, which are in memory."""
        return hashlib.blake2b(self.images.numpy(), digest_size=16).hexdigest()

    def collate(self, samples: Sequence[PairSample]) -> PairBatch:
        """Put samples together."""
        return collate_pairs(samples)

    def describe(self) -> dict[str, Any]:
        """Return what was drawn."""
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
