"""A folder in the layout of the photographs, drawn: cats are red, dogs are blue, grass is green."""

import json

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from ovseg.data.benchmark_sets import describe

SIZE = (48, 64)
WIDTH = 16  # of the text vectors
COLOURS = {"cat": (200, 30, 30), "dog": (30, 30, 200)}
VOC = describe("voc21").classes


def scene(name, number):
    """A square of one colour on grass, and where it is."""
    rng = np.random.default_rng(number)
    picture = np.full((*SIZE, 3), (40, 160, 40), np.uint8) + rng.integers(
        0, 20, (*SIZE, 3), np.uint8
    )
    top, left = rng.integers(0, 16, 2)
    picture[top : top + 30, left : left + 40] = COLOURS[name]
    return picture, (slice(top, top + 30), slice(left, left + 40))


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if options:
        image.putpalette(np.random.default_rng(0).integers(0, 255, 768, np.uint8).tobytes())
    image.save(path)


def animal(number):
    return ("cat", "dog")[number % 2]


def draw(root, captions=20, names=6, train=4, val=6, masks=4):
    """Draw all parts of the layout."""
    folder = root / "coco_captions"
    tree = {"images": [], "annotations": []}
    for i in range(captions):
        save(folder / "val2017" / f"{i}.jpg", scene(animal(i), i)[0])
        tree["images"].append({"id": i, "file_name": f"{i}.jpg"})
        for k in range(2):
            text = f"a {animal(i)} on the grass"
            tree["annotations"].append({"id": 2 * i + k, "image_id": i, "caption": text})
    write(folder / "annotations" / "captions_val2017.json", json.dumps(tree))

    folder = root / "voc_names"
    for i in range(names):
        save(folder / "pictures" / f"{i}.jpg", scene(animal(i), 100 + i)[0])
    lines = [f"{i}.jpg\t{animal(i)}\n" for i in range(names)]
    write(folder / "names.tsv", "# looked for: " + ", ".join(VOC[1:]) + "\n" + "".join(lines))

    folder = root / "voc" / "VOCdevkit" / "VOC2012"
    keys = [f"2008_{i:06}" for i in range(train + val)]
    for i, key in enumerate(keys):
        picture, place = scene(animal(i), 200 + i)
        mask = np.zeros(SIZE, np.uint8)
        mask[place] = VOC.index(animal(i))
        save(folder / "JPEGImages" / f"{key}.jpg", picture)
        save(folder / "SegmentationClass" / f"{key}.png", mask, palette=True)
    lists = folder / "ImageSets" / "Segmentation"
    write(lists / "train.txt", "\n".join(keys[:train]) + "\n")
    write(lists / "val.txt", "\n".join(keys[train:]) + "\n")

    things = describe("coco_things").classes
    tree = {"images": [], "annotations": []}
    tree["categories"] = [{"id": 1 + i, "name": name} for i, name in enumerate(things)]
    folder = root / "coco_masks"
    for i in range(masks):
        picture, (rows, columns) = scene(animal(i), 300 + i)
        save(folder / "val2017" / f"{i:03}.jpg", picture)
        sides = [int(x) for x in (columns.start, rows.start, columns.stop, rows.stop)]
        left, top, right, bottom = sides
        shape = [left, top, right, top, right, bottom, left, bottom]
        size = {"height": SIZE[0], "width": SIZE[1]}
        tree["images"].append({"id": i, "file_name": f"{i:03}.jpg", **size})
        tree["annotations"].append(
            {
                "id": i,
                "image_id": i,
                "category_id": 1 + things.index(animal(i)),
                "area": 1200,
                "iscrowd": 0,
                "segmentation": [shape],
            }
        )
    write(folder / "annotations" / "instances_val2017.json", json.dumps(tree))

    (root / "vectors").mkdir()
    rng = np.random.default_rng(0)
    for name, rows in (("zegclip_coco_single", 171), ("zegclip_voc12_single", 20)):
        vectors = rng.standard_normal((rows, WIDTH)).astype(np.float16)
        np.save(root / "vectors" / f"{name}.npy", vectors)
    return root


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def trunk(path):
    """A tiny trunk with random weights."""
    torch.manual_seed(0)
    state = timm.create_model("test_efficientnet").state_dict()
    save_file({name: x.contiguous() for name, x in state.items()}, path)
    return path


def small(weights):
    """Overrides that make all rows tiny."""
    return [
        "model.options.architecture=test_efficientnet",
        f"model.options.weights={weights}",
        "model.options.image_size=64",
        "model.options.stages=[2, 4]",
        f"model.options.text={{width: {WIDTH}}}",
        "train.batch_size=4",
        "train.device=cpu",
    ]
