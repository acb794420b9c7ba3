"""Look at data: the embedded scenes, the benchmarks on disk.

  ovseg data list                                     the benchmarks, their classes and folders
  ovseg data check voc21,ade150 --root /data          missing and damaged files, unequal sizes, labels off by one
  ovseg data convert coco_object --root /data         masks with labels as values, for other tools
  ovseg data superpixels pairs/ --out superpixels.safetensors           what SegCLIP's training needs beside the pictures
  ovseg data browse --form shapes --out scenes.png    a contact sheet of scenes with their masks and captions
"""

from __future__ import annotations

import argparse
import os

from .numbers import above_zero, at_least


def arguments(sub: argparse.ArgumentParser) -> None:
    actions = sub.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the benchmarks, their classes and folders")
    check = actions.add_parser("check", help="find missing and damaged files, unequal sizes, labels off by one")
    check.add_argument("--sample", type=at_least(1), help="look at so many pictures only, evenly spread")
    check.add_argument("--out", help="folder for a JSON report and a plot of the classes")
    convert = actions.add_parser("convert", help="write masks with labels as values, for other tools")
    for one in (check, convert):
        one.add_argument("data", help="comma-separated names (ovseg data list) or .yaml descriptions")
        one.add_argument("--root", required=True, help="the folder that holds the data sets, or one of them")
        one.add_argument("--split", default="val")
    cut = actions.add_parser("superpixels", help="cut pictures into superpixels (Felzenszwalb), into one side file")
    cut.add_argument("root", help="folder of pictures, searched recursively")
    cut.add_argument("--out", required=True, help="the .safetensors file")
    cut.add_argument("--scale", type=above_zero, default=224.0, help="larger gives larger segments (default: SegCLIP's)")
    cut.add_argument("--sigma", type=above_zero, default=0.9)
    cut.add_argument("--min-size", type=at_least(1), default=224)
    cut.add_argument("--workers", type=at_least(1), default=1, help="processes")
    browse = actions.add_parser("browse", help="a contact sheet of embedded scenes")
    browse.add_argument("--form", default="digits", choices=("digits", "shapes"))
    browse.add_argument("--split", default="train", choices=("train", "val"))
    browse.add_argument("--count", type=at_least(1), default=36)
    browse.add_argument("--seed", type=at_least(0), default=0)
    browse.add_argument("--out", default="scenes.png")


def run(options: argparse.Namespace) -> int:
    from ..errors import InputError

    if getattr(options, "root", None) is not None and not os.path.isdir(options.root):
        raise InputError(f"root is {options.root!r}, no folder; expected the one that holds the data")
    verbs = {"list": _list, "check": _check, "convert": _convert, "superpixels": _superpixels, "browse": _browse}
    return verbs[options.action](options)


def _list(options: argparse.Namespace) -> int:
    from ..data.segmentation_sets import describe, list_sets

    for name in list_sets():
        about = describe(name)
        counts = ", ".join(f"{split} {part.get('count', '?')}" for split, part in about.tree["splits"].items())
        print(f"{name:12} {about.title}\n{'':12} {counts}; {about.tree['folders'][0]}: {about.tree['images']}, "
              f"{' or '.join(layout.path for layout in about.layouts(about.splits[0]))}")
    return 0


def _check(options: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict
    from pathlib import Path

    from ..data.check import check_set
    from ..data.segmentation_sets import SegmentationSet
    from ..replacing import folder_for

    if options.out is not None:
        folder_for(options.out, "--out")
    wrong = 0
    for name in options.data.split(","):
        data = SegmentationSet(name, options.root, options.split)
        report = check_set(data, sample=options.sample, progress=True)
        print(report)
        wrong += len(report.wrong)
        if options.out:
            from ..evaluation.plots import plot_bars

            out = Path(options.out)
            out.mkdir(parents=True, exist_ok=True)
            stem = f"{data.description.name}_{options.split}"
            (out / f"{stem}.json").write_text(json.dumps({**asdict(report), "wrong": report.wrong}, indent=2))
            plot_bars({k: 100 * v for k, v in report.shares.items()}, out / f"{stem}.png",
                      f"{data.description.title}, {options.split}: % of the counted pixels", log=True)
            print(out / f"{stem}.json", out / f"{stem}.png", sep="\n")
    return 1 if wrong else 0


def _convert(options: argparse.Namespace) -> int:
    from ..data.check import convert_masks
    from ..data.segmentation_sets import SegmentationSet

    for name in options.data.split(","):
        data = SegmentationSet(name, options.root, options.split)
        written, left = convert_masks(data, progress=True)
        print(f"{name}: {written} masks written as {data.description.layouts(options.split)[0].path}, {left} were there")
    return 0


def _superpixels(options: argparse.Namespace) -> int:
    import sys
    from pathlib import Path

    from ..data.images import SUFFIXES
    from ..data.superpixels import write_superpixels
    from ..errors import InputError
    from ..replacing import file_for

    out = file_for(options.out, "--out")
    root = Path(options.root)
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{options.root!r} is no folder with pictures")
    pictures = [(path.relative_to(root).as_posix(), path) for path in files]
    count, bad = write_superpixels(pictures, out, workers=options.workers, progress=True, scale=options.scale,
                                   sigma=options.sigma, min_size=options.min_size)
    print(f"{count} pictures cut up into {out} ({out.stat().st_size / 2**20:.1f} MiB), {len(bad)} skipped")
    for line in bad:
        print(f"skipped: {line}", file=sys.stderr)
    return 3 if bad else 0


def _browse(options: argparse.Namespace) -> int:
    import numpy as np
    from PIL import Image

    from ..data.scenes import Scenes
    from ..errors import InputError
    from ..inference.pictures import colour, contact_sheet, palette
    from ..replacing import file_for

    Image.init()
    out = file_for(options.out, "--out")
    if Image.EXTENSION.get(out.suffix.lower()) not in Image.SAVE:
        raise InputError(f"--out is {options.out!r}; expected a suffix that Pillow writes, such as .png")
    scenes = Scenes(options.form, options.split, options.count, options.seed)[:]
    vocabulary = Scenes(options.form, options.split, 0).vocabulary
    count = len(vocabulary.classes)
    rows, titles = [], []
    for start in range(0, len(scenes), 12):
        part = scenes[start : start + 12]
        rows += [[scene.image for scene in part], [colour(scene.mask, count) for scene in part]]
        titles += [f"{part[0].index}-{part[-1].index}", "mask"]
    present = sorted({int(i) for scene in scenes for i in np.unique(scene.mask)})
    legend = [(tuple(int(v) for v in palette(count)[i]), vocabulary.classes[i]) for i in present]
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, titles, legend).save(out)
    for scene in scenes[:6]:
        print(f"{scene.index}: {', '.join(scene.things) or 'nothing'} on {scene.stuff}: {[c.text for c in scene.captions]}")
    print(out)
    return 0
