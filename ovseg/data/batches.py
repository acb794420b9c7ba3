"""Training batches of scenes: images, captions, and which pairs of the batch may count as negatives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..progress import bar
from .pairs import countable_pairs
from .scenes import CAPTIONS_PER_SCENE, Scenes
from .superpixels import patch_labels, superpixels


class SceneBatches:
    """Batches of a fixed set of scenes held in memory. Batch ``step`` depends on (seed, step) only: resume is exact.

    Args:
        scenes: the data set.
        tokenizer: texts to [T, L] token ids.
        batch_size: images a batch, at most ``len(scenes)``.
        seed: of the choice of images and captions.
        captions: texts of each image in a batch, all positives of it.
        superpixel_patch: side of a patch in pixels; then batches carry ``segments``, the superpixel of each patch.
        superpixel_labels: ``majority`` or ``mean``, see ``superpixels.patch_labels``.
    """

    def __init__(self, scenes: Scenes, tokenizer: Callable, batch_size: int, seed: int = 0, *, captions: int = 1,
                 superpixel_patch: int | None = None, superpixel_labels: str = "majority", progress: bool = False):
        if not 0 < batch_size <= len(scenes):
            raise ValueError(f"batch_size is {batch_size}; expected 1 to {len(scenes)}, the number of scenes")
        if not 1 <= captions <= CAPTIONS_PER_SCENE:
            raise ValueError(f"captions is {captions}; expected 1 to {CAPTIONS_PER_SCENE}")
        self.batch_size, self.seed, self.captions = batch_size, seed, captions
        names = {name: i for i, name in enumerate(scenes.vocabulary.classes)}
        self.images = torch.empty(len(scenes), 3, scenes.image_size, scenes.image_size, dtype=torch.uint8)
        self.entities = torch.zeros(len(scenes), CAPTIONS_PER_SCENE, len(names), dtype=torch.uint8)
        self.segments = None
        if superpixel_patch is not None:
            side = scenes.image_size // superpixel_patch
            self.segments = torch.empty(len(scenes), side * side, dtype=torch.int16)
        texts: list[str] = []
        for i in bar(range(len(scenes)), show=progress, desc=f"drawing {scenes.form}", unit="scene", leave=False):
            scene = scenes[i]
            self.images[i] = torch.from_numpy(scene.image).permute(2, 0, 1)
            if self.segments is not None and superpixel_patch is not None:
                found = superpixels(scene.image, scale=200.0, sigma=0.8, min_size=60)  # for pictures of 48 pixels
                self.segments[i] = torch.from_numpy(patch_labels(found, superpixel_patch, superpixel_labels).astype(np.int16)).flatten()
            texts += [caption.text for caption in scene.captions]
            for k, caption in enumerate(scene.captions):
                self.entities[i, k, [names[e] for e in caption.entities]] = 1
        self.token_ids = tokenizer(texts).view(len(scenes), CAPTIONS_PER_SCENE, -1)

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """``images`` in 0..1 [B, 3, H, W], ``token_ids`` [T, L], ``pair_mask`` [B, T], ``image_ids`` [B] and ``text_ids``
        [T] with T = B x captions."""
        rng = np.random.default_rng([self.seed, step])
        i = torch.from_numpy(rng.choice(len(self.images), self.batch_size, replace=False))
        k = torch.from_numpy(np.stack([rng.permutation(CAPTIONS_PER_SCENE)[: self.captions] for _ in range(self.batch_size)]))
        image_ids = torch.arange(self.batch_size)
        text_ids = image_ids.repeat_interleave(self.captions)
        token_ids = self.token_ids[i[:, None], k].flatten(0, 1)
        segments = {} if self.segments is None else {"segments": self.segments[i].long()}
        return {
            **segments,
            "images": self.images[i].float() / 255,
            "token_ids": token_ids[:, : int((token_ids != 0).sum(1).max())],  # no column of padding alone
            "pair_mask": countable_pairs(
                self.entities[i[:, None], k].flatten(0, 1), self.entities[i].amax(1), image_ids[:, None] == text_ids
            ),
            "image_ids": image_ids,
            "text_ids": text_ids,
        }
