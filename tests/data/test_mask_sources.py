"""Pictures with masks: the miniature layouts of the benchmarks and the scenes, augmented; what is
missing or damaged.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import INPUTS, same
from PIL import Image

from ovseg.data.batches import MaskBatch
from ovseg.data.loader import Loader
from ovseg.data.mask_transforms import MaskAugment
from ovseg.data.scenes import Scenes
from ovseg.data.sources import create_source, load_options
from ovseg.data.sources.masks import LabelledScenes, Masks, Options
from ovseg.errors import ConfigError, DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from miniatures import LAYOUTS, make

PLAIN = {
    "scale": [60, 40],
    "ratio": [1.0, 1.0],
    "class_cap": 1.0,
    "flip": 0.0,
    "photometric": False,
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layout_can_be_trained_on(tmp_path, name):
    truths = make(tmp_path, name)
    tree = {
        "kind": "masks",
        "set": name,
        "root": str(tmp_path),
        "train_split": "val",
        "image_size": 60,
        "augment": PLAIN,
    }
    source = create_source(load_options(tree), INPUTS)
    batch = source.collate([source.sample(i, i) for i in range(len(source))])
    assert (
        isinstance(batch, MaskBatch)
        and batch.images.shape == (4, 3, 60, 60)
        and batch.masks.shape == (4, 60, 60)
    )
    assert batch.masks.dtype == torch.int64 and source.describe()["set"] == name
    expected = np.where(truths < 0, 255, truths)
    assert np.array_equal(batch.masks[:, :40].numpy(), expected) and bool(
        (batch.masks[:, 40:] == 255).all()
    )
    # In a miniature the colour tells the class, but for the edges of jpeg pictures.
    shown = torch.from_numpy(
        np.stack([truths * 7 % 256, truths * 31 % 256, truths % 256], 1).astype(np.uint8)
    )
    if LAYOUTS[name][0].endswith("png"):
        assert torch.equal(batch.images[:, :, :40], shown)
    assert len(source.classes) > int(batch.masks[batch.masks != 255].max())


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_scenes_keep_their_labels_on_their_pixels(workers):
    """Digits lie on tinted cards, stuff has one label: enlarged, cropped, mirrored, the picture of
    a label stays the same.
    """
    scenes = Scenes("shapes", "train", 12)
    colours = {}
    for scene in scenes:
        for label in np.unique(scene.mask):
            colours.setdefault(int(label), []).append(scene.image[scene.mask == label].mean(0))
    source = Masks(
        LabelledScenes(scenes),
        INPUTS,
        Options(augment=MaskAugment((96, 48), (0.8, 2.0), photometric=False), image_size=48),
    )
    with Loader(source, 6, workers=workers) as loader:
        batches = list(itertools.islice(loader, 10))
    distances, shifted = [], []
    for image, mask in (
        (image, mask)
        for batch in batches
        for image, mask in zip(batch.images, batch.masks, strict=True)
    ):
        for label in set(mask.unique().tolist()) - {255}:
            for moved, into in ((mask, distances), (mask.roll((12, 12), (0, 1)), shifted)):
                if int((moved == label).sum()) > 60:
                    mean = image[:, moved == label].float().mean(1).numpy()
                    into.append(min(np.abs(mean - colour).mean() for colour in colours[label]))
    assert np.mean(distances) < 12 and np.quantile(distances, 0.9) < 25
    assert np.mean(shifted) > 2 * np.mean(distances)


def test_masks_do_not_depend_on_workers_and_ranks(tmp_path):
    make(tmp_path, "voc20", count=7)
    tree = {
        "kind": "masks",
        "set": "voc20",
        "root": str(tmp_path),
        "train_split": "val",
        "image_size": 32,
        "augment": {"scale": [90, 48]},
    }
    source = create_source(load_options(tree), INPUTS)

    def take(**how):
        with Loader(source, 4, seed=3, **how) as loader:
            return list(itertools.islice(loader, 4))

    whole = take()
    assert all(map(same, whole, take(workers=2)))
    for batch, first, second in zip(
        whole, take(rank=0, ranks=2), take(rank=1, ranks=2), strict=True
    ):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.masks, torch.cat([first.masks, second.masks]))


@pytest.mark.bad_input("data", "pictures and masks that cannot be read")
def test_bad_pictures_and_masks_are_replaced(tmp_path):
    make(tmp_path, "voc20", count=6)
    images, masks = (
        tmp_path / "VOCdevkit/VOC2012/JPEGImages",
        tmp_path / "VOCdevkit/VOC2012/SegmentationClass",
    )
    tree = {
        "kind": "masks",
        "set": "voc20",
        "root": str(tmp_path),
        "train_split": "val",
        "image_size": 32,
        "augment": PLAIN,
    }
    source = create_source(load_options(tree), INPUTS)
    (masks / "2008_000000.png").unlink()
    (masks / "2008_000001.png").write_bytes(b"no picture")
    (images / "2008_000002.jpg").write_bytes((images / "2008_000002.jpg").read_bytes()[:100])
    Image.new("L", (30, 30)).save(masks / "2008_000003.png")
    Image.fromarray(np.full((40, 60), 77, np.uint8)).save(masks / "2008_000004.png")
    batch = source.collate([source.sample(i, i) for i in range(6)])
    assert len(batch) == 6
    told = "\n".join(batch.skipped)
    for part in (
        r"mask .*2008_000000\.png is missing",
        "cannot decode mask",
        r"cannot decode .*2008_000002\.jpg",
        "expected one size",
        "holds the value 77",
    ):
        with pytest.raises(DataError, match=part):
            raise DataError(told)
    with pytest.raises(ConfigError, match=r"split is 'nothing'"):
        create_source(load_options(tree | {"train_split": "nothing"}), INPUTS)
    with pytest.raises(DataError, match="voc20"):
        create_source(load_options(tree | {"root": str(tmp_path / "none")}), INPUTS)


def test_unseen_classes_are_named_and_drawn_on_demand():
    for with_unseen in (False, True):
        tree = {
            "kind": "masks",
            "set": "shapes",
            "train_size": 60,
            "with_unseen": with_unseen,
            "augment": {"scale": [96, 48]},
        }
        source = create_source(load_options(tree), INPUTS)
        unseen = [source.classes.index(name) for name in source.unseen]
        labels = torch.cat([source.sample(i, 0).mask.flatten() for i in range(60)])
        assert (
            len(unseen) == 3 and bool(torch.isin(labels, torch.tensor(unseen)).any()) is with_unseen
        )


def test_validation_is_not_augmented():
    tree = {"kind": "masks", "set": "digits", "val_size": 5, "augment": {"scale": [96, 48]}}
    source = create_source(load_options(tree), INPUTS, split="val")
    scene = Scenes("digits", "val", 5)[3]
    for seed in range(3):
        sample = source.sample(3, seed)
        assert np.array_equal(
            sample.image.permute(1, 2, 0).numpy(), scene.image
        ) and np.array_equal(sample.mask.numpy(), scene.mask)
