"""Miniature copies of the benchmarks' folder layouts: a few small pictures with masks whose class
shares follow the published ones.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ovseg.data.benchmark_sets import describe

# name -> (picture, mask, list or None) below the root, with {} for the key; keys; value of the
# first class; removed values; ignored value
VOC = "VOCdevkit/VOC2012"
CONTEXT = "VOCdevkit/VOC2010"
CONTEXT_LIST = f"{CONTEXT}/ImageSets/SegmentationContext/val.txt"
CITY = "cityscapes"
COCO = "coco_stuff164k"
ADE = "ade/ADEChallengeData2016"
REMOVED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
LAYOUTS = {
    "voc21": (
        f"{VOC}/JPEGImages/{{}}.jpg",
        f"{VOC}/SegmentationClass/{{}}.png",
        f"{VOC}/ImageSets/Segmentation/val.txt",
        0,
        (),
    ),
    "voc20": (
        f"{VOC}/JPEGImages/{{}}.jpg",
        f"{VOC}/SegmentationClass/{{}}.png",
        f"{VOC}/ImageSets/Segmentation/val.txt",
        1,
        (),
    ),
    "context60": (
        f"{CONTEXT}/JPEGImages/{{}}.jpg",
        f"{CONTEXT}/SegmentationClassContext/{{}}.png",
        CONTEXT_LIST,
        0,
        (),
    ),
    "context59": (
        f"{CONTEXT}/JPEGImages/{{}}.jpg",
        f"{CONTEXT}/SegmentationClassContext/{{}}.png",
        CONTEXT_LIST,
        1,
        (),
    ),
    "ade150": (
        f"{ADE}/images/validation/{{}}.jpg",
        f"{ADE}/annotations/validation/{{}}.png",
        None,
        1,
        (),
    ),
    "cityscapes": (
        f"{CITY}/leftImg8bit/val/{{}}_leftImg8bit.png",
        f"{CITY}/gtFine/val/{{}}_gtFine_labelTrainIds.png",
        None,
        0,
        (),
    ),
    "coco_stuff": (
        f"{COCO}/images/val2017/{{}}.jpg",
        f"{COCO}/annotations/val2017/{{}}.png",
        None,
        0,
        REMOVED,
    ),
    "coco_object": (
        f"{COCO}/images/val2017/{{}}.jpg",
        f"{COCO}/annotations/val2017/{{}}_instanceTrainIds.png",
        None,
        0,
        (),
    ),
}


def values_of(name: str) -> list[int]:
    """The mask value of every class."""
    start, removed = LAYOUTS[name][3:]
    found, value = [], start
    for _ in describe(name).classes:
        while value in removed:
            value += 1
        found.append(value)
        value += 1
    return found


def make(
    root: Path,
    name: str,
    count: int = 4,
    size: tuple[int, int] = (40, 60),
    shift: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """Write a miniature and return the truths [count, H, W] as labels, -1 where nothing is counted.

    ``shift`` is added to every value, modulo 256: the mistake that ``ovseg data check`` looks for.
    """
    image, mask, listed = LAYOUTS[name][:3]
    about, values, rng = describe(name), values_of(name), np.random.default_rng(seed)
    shares = np.full(len(values), 0.002)
    for one, share in about.shares.items():
        shares[about.classes.index(one)] = share
    keys = [
        f"city{i}/city{i}_000" if name == "cityscapes" else f"2008_{i:06d}" for i in range(count)
    ]
    truths = []
    for key in keys:
        truth = rng.choice(len(values), size, p=shares / shares.sum())
        raw = np.array(values)[truth]
        if name != "coco_object":  # nothing is ignored there
            truth[:2, :5], raw[:2, :5] = -1, 255 if name.startswith(("voc", "coco", "city")) else 0
            if name == "context60":
                raw[:2, :5] = 255
        truths.append(truth)
        picture = np.stack([truth * 7 % 256, truth * 31 % 256, truth % 256], -1).astype(np.uint8)
        for path, array in ((image, picture), (mask, ((raw + shift) % 256).astype(np.uint8))):
            target = root / path.format(key)
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(target)
    if listed:
        (root / listed).parent.mkdir(parents=True, exist_ok=True)
        (root / listed).write_text("".join(f"{key}\n" for key in keys))
    return np.stack(truths)


def png(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()
