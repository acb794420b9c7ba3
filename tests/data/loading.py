"""Folders of pictures and batches to compare, for the tests of sources and loader."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ovseg.data.batches import Batch, PairBatch
from ovseg.data.sources import ModelInputs
from ovseg.data.words import WordTokenizer

INPUTS = ModelInputs(48, 4, WordTokenizer(), (0.5, 0.25, 0.0))


def pairs(folder: Path, count: int, size: tuple[int, int] = (60, 50)) -> None:
    """Noisy pictures of growing width, two captions each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 255, (size[1], size[0] + i, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"a red {i}\n{'grass ' * (i % 3)}gravel\n")


def same(a: Batch, b: Batch) -> bool:
    """Equal in every tensor, bit for bit."""
    return type(a) is type(b) and all(
        torch.equal(x, vars(b)[name]) if isinstance(x, torch.Tensor) else x == vars(b)[name]
        for name, x in vars(a).items()
    )


def joined(parts: list[PairBatch]) -> PairBatch:
    """The batch of which ranks hold slices: rows joined, texts filled up to one length."""
    length = max(part.token_ids.shape[1] for part in parts)
    fields = {}
    for name in ("images", "image_ids", "text_ids", "image_entities", "text_entities", "segments"):
        values = [getattr(part, name) for part in parts]
        fields[name] = None if values[0] is None else torch.cat(values)
    ids = [
        torch.nn.functional.pad(part.token_ids, (0, length - part.token_ids.shape[1]))
        for part in parts
    ]
    return PairBatch(
        token_ids=torch.cat(ids),
        skipped=tuple(line for part in parts for line in part.skipped),
        **fields,
    )
