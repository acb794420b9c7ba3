"""Image-text pairs from a plain folder: ``name.jpg`` with ``name.txt`` beside it, one caption a line."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import DataError, InputError
from .images import SUFFIXES, read_image, to_tensor
from .superpixels import SuperpixelFile

_MOST_BAD = 0.01  # share of pictures that may fail before training stops


class FolderBatches:
    """Random batches of pairs; batch ``step`` depends on (seed, step) only. Not yet run on a large data set.

    A picture that cannot be read is named once, counted, and replaced by another one; past 1 % of the folder training
    stops. Pictures are cropped at random to a square (at least half of the short side) and resized.

    Args:
        root: searched recursively.
        tokenizer: texts to [T, L] token ids.
        batch_size, seed, image_size: as they say.
        workers: threads that decode (Pillow releases the interpreter lock while it does).
        superpixels: side file of ``ovseg data superpixels``; batches then carry ``segments``, cropped with the picture.
        patch: side of a patch in pixels, for ``segments``.
        superpixel_labels: ``majority`` or ``mean``, see ``superpixels.patch_labels``.

    Raises:
        DataError: if there is no pair, fewer than a batch, or too many pictures are bad.
    """

    def __init__(self, root: str | Path, tokenizer: Callable, batch_size: int, seed: int = 0, *, image_size: int = 224,
                 workers: int = 2, superpixels: str | Path | None = None, patch: int = 16,
                 superpixel_labels: str = "majority"):
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"data.root {str(root)!r} is no folder; expected pictures with .txt captions beside them")
        pictures = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        self.pairs = [path for path in pictures if path.with_suffix(".txt").is_file()]
        if len(self.pairs) < batch_size:
            raise DataError(f"data.root {str(root)!r} holds {len(pictures)} pictures, {len(self.pairs)} of them with a .txt; "
                            f"expected at least a batch of {batch_size}")
        self.tokenizer, self.batch_size, self.seed, self.image_size = tokenizer, batch_size, seed, image_size
        self.root, self.patch, self.superpixel_labels = root, patch, superpixel_labels
        self.superpixels = None if superpixels is None else SuperpixelFile(superpixels)
        if self.superpixels is not None:
            keys = [path.relative_to(root).as_posix() for path in self.pairs]
            missing = [key for key in keys if key not in self.superpixels]
            if missing:
                raise DataError(f"data.superpixels {str(superpixels)!r} lacks {len(missing)} of {len(keys)} pictures, the first "
                                f"{missing[0]}; expected ovseg data superpixels to be run again")
        self.bad: dict[Path, str] = {}
        self._pool = ThreadPoolExecutor(max(1, workers))

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """``images`` in 0..1 [B, 3, S, S], ``token_ids`` [B, L], for repeated captions equal ids, and ``segments`` [B, N] if there are
        superpixels."""
        rng = np.random.default_rng([self.seed, step])
        images: list[torch.Tensor] = []
        segments: list[torch.Tensor] = []
        texts: list[str] = []
        order = iter(rng.permutation(len(self.pairs)))
        while len(images) < self.batch_size:
            chosen = [self.pairs[i] for i in islice(order, self.batch_size - len(images))]
            if not chosen:
                raise DataError(f"only {len(images)} readable pairs are left for a batch of {self.batch_size}; "
                                f"first bad one: {next(iter(self.bad.values()))}")
            seeds = rng.integers(2**63, size=len(chosen))
            for image, text, segment in self._pool.map(self._load, chosen, seeds):
                if image is not None:
                    images.append(image)
                    texts.append(text)
                    segments += [] if segment is None else [segment]
        ids = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        same = torch.tensor([ids[text] for text in texts])
        extra = {} if self.superpixels is None else {"segments": torch.stack(segments)}
        return {"images": torch.stack(images), "token_ids": self.tokenizer(texts), "image_ids": same, "text_ids": same, **extra}

    def _load(self, path: Path, seed: int) -> tuple[torch.Tensor | None, str, torch.Tensor | None]:
        rng = np.random.default_rng(seed)
        try:
            image = read_image(path)
            captions = [line.strip() for line in path.with_suffix(".txt").read_text("utf-8").splitlines() if line.strip()]
            if not captions:
                raise InputError(f"{path.with_suffix('.txt')} is empty; expected one caption a line")
        except (InputError, OSError, UnicodeDecodeError) as error:
            if path not in self.bad:
                self.bad[path] = str(error)
                print(f"skipped: {error}")
                if len(self.bad) > max(1, _MOST_BAD * len(self.pairs)):
                    raise DataError(f"{len(self.bad)} of {len(self.pairs)} pictures cannot be used; last: {error}") from error
            return None, "", None
        side = int(min(image.size) * rng.uniform(0.5, 1.0)) or 1
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
        box = (left, top, left + side, top + side)
        crop = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box)
        segment = None
        if self.superpixels is not None:
            key = path.relative_to(self.root).as_posix()
            share = (left / image.width, top / image.height, (left + side) / image.width, (top + side) / image.height)
            segment = torch.from_numpy(self.superpixels.patches(key, share, self.image_size, self.patch, self.superpixel_labels)).flatten()
        return to_tensor(crop), captions[rng.integers(len(captions))], segment
