"""Look at data: the embedded scenes, the benchmarks on disk.

ovseg data list                                     the benchmarks, their classes and folders
ovseg data check voc21,ade150 --root /data          missing and damaged files, unequal sizes, labels off by one
ovseg data convert coco_object --root /data         masks with labels as values, for other tools
ovseg data superpixels pairs/ --out superpixels.safetensors           what SegCLIP's training needs beside the pictures
ovseg data entities cc12m.tsv --out cc4m.tsv        the captions that name an entity: CC4M from CC12M
ovseg data cross-pairs pairs/ --out index.safetensors                 which pictures share an entity, for OVSegmentor's second stage
ovseg data browse --form shapes --out scenes.png    a contact sheet of scenes with their masks and captions"""

from __future__ import annotations

import argparse
from collections import Counter

from .options import at_least, no_plots

_MOST_SCENES = 10_000  # of a contact sheet


def arguments(sub: argparse.ArgumentParser) -> None:
    actions = sub.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the benchmarks, their classes and folders")
    check = actions.add_parser(
        "check", help="find missing and damaged files, unequal sizes, labels off by one"
    )
    check.add_argument("--sample", type=int, help="look at so many pictures only, evenly spread")
    check.add_argument("--out", help="folder for a JSON report and a plot of the classes")
    convert = actions.add_parser(
        "convert", help="write masks with labels as values, for other tools"
    )
    for one in (check, convert):
        one.add_argument(
            "data", help="comma-separated names (ovseg data list) or .yaml descriptions"
        )
        one.add_argument(
            "--root", required=True, help="the folder that holds the data sets, or one of them"
        )
        one.add_argument("--split", default="val")
    cut = actions.add_parser(
        "superpixels", help="cut pictures into superpixels (Felzenszwalb), into one side file"
    )
    cut.add_argument("root", help="folder of pictures, searched recursively")
    cut.add_argument("--out", required=True, help="the .safetensors file")
    cut.add_argument(
        "--scale",
        type=float,
        default=224.0,
        help="larger gives larger segments (default: SegCLIP's)",
    )
    cut.add_argument("--sigma", type=float, default=0.9)
    cut.add_argument("--min-size", type=int, default=224)
    cut.add_argument("--workers", type=int, default=1, help="processes")
    for one in (check, convert, cut):
        one.add_argument(
            "--max-pixels", type=int, help="pictures of more pixels are refused (64 million)"
        )
    named = actions.add_parser(
        "entities", help="keep the lines of a list of captions that name an entity"
    )
    named.add_argument("captions", help=".tsv (address, caption) or .jsonl")
    named.add_argument("--out", required=True, help="the new list, of the same kind")
    named.add_argument(
        "--column", type=int, default=1, help="of a .tsv: where the caption is, from 0 (default: 1)"
    )
    named.add_argument("--key", default="caption", help="of a .jsonl: what the caption is called")
    named.add_argument(
        "--exact",
        action="store_true",
        help="words as they stand in the list, as the published CC4M was made: no plurals",
    )
    shared = actions.add_parser(
        "cross-pairs", help="index which pictures share an entity, into one side file"
    )
    shared.add_argument(
        "root", help="folder of name.jpg with captions in name.txt, searched recursively"
    )
    shared.add_argument("--out", required=True, help="the .safetensors file")
    for one in (named, shared):
        one.add_argument(
            "--entities",
            default="everyday",
            help="a list by name or a YAML file (default: everyday)",
        )
    browse = actions.add_parser("browse", help="a contact sheet of embedded scenes")
    browse.add_argument("--form", default="digits", choices=("digits", "shapes"))
    browse.add_argument("--split", default="train", choices=("train", "val"))
    browse.add_argument("--count", type=int, default=36)
    browse.add_argument("--seed", type=int, default=0)
    browse.add_argument("--out", default="scenes.png")


def run(options: argparse.Namespace) -> int:
    from ..data.images import MAX_PIXELS
    from ..errors import InputError
    from ..paths import no_folder

    if (root := getattr(options, "root", None)) is not None and (
        what := no_folder(root)
    ) is not None:
        raise InputError(f"root {root!r} {what}; expected the folder that holds the data")
    at_least(1, options, *({"sample", "max_pixels"} & vars(options).keys()))
    at_least(0, options, *({"seed"} & vars(options).keys()))
    options.max_pixels = getattr(options, "max_pixels", None) or MAX_PIXELS
    verbs = {
        "list": _list,
        "check": _check,
        "convert": _convert,
        "superpixels": _superpixels,
        "entities": _entities,
        "cross-pairs": _cross_pairs,
        "browse": _browse,
    }
    return verbs[options.action](options)


def _names(text: str) -> list[str]:
    from ..errors import InputError

    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(
            f"data is {text!r}; expected names separated by commas, such as voc21,ade150"
        )
    return names


def _list(options: argparse.Namespace) -> int:
    from ..data.benchmark_sets import describe, list_sets

    for name in list_sets():
        about = describe(name)
        counts = ", ".join(
            f"{split} {part.get('count', '?')}" for split, part in about.tree["splits"].items()
        )
        print(
            f"{name:12} {about.title}\n{'':12} {counts}; {about.tree['folders'][0]}: "
            f"{about.tree['images']}, "
            f"{' or '.join(layout.path for layout in about.layouts(about.splits[0]))}"
        )
    return 0


def _check(options: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict
    from pathlib import Path

    from ..data.benchmark_sets import SegmentationSet
    from ..data.check import check_set
    from ..output_lock import locked_folder
    from ..replacing import folder_for, write_text

    if options.out is not None:
        no_plots("no plot of the classes is drawn")
        options.held.enter_context(
            locked_folder(folder_for(options.out, "--out"), "--out", "data check")
        )
    wrong = 0
    for data in [
        SegmentationSet(name, options.root, options.split, max_pixels=options.max_pixels)
        for name in _names(options.data)
    ]:
        report = check_set(data, sample=options.sample, progress=True)
        print(report)
        wrong += len(report.wrong)
        if options.out:
            from ..evaluation.plots import plot_bars

            out = Path(options.out)
            stem = f"{data.description.name}_{options.split}"
            write_text(
                out / f"{stem}.json",
                json.dumps({**asdict(report), "wrong": report.wrong}, indent=2),
            )
            drawn = plot_bars(
                {k: 100 * v for k, v in report.shares.items()},
                out / f"{stem}.png",
                f"{data.description.title}, {options.split}: % of the counted pixels",
                log=True,
            )
            print(*(path for path in (out / f"{stem}.json", drawn) if path), sep="\n")
    return 1 if wrong else 0


def _convert(options: argparse.Namespace) -> int:
    import sys

    from ..data.benchmark_sets import SegmentationSet
    from ..data.check import convert_masks
    from ..output_lock import locked_folder

    bad: list[str] = []
    for data in [
        SegmentationSet(name, options.root, options.split, max_pixels=options.max_pixels)
        for name in _names(options.data)
    ]:
        assert data.root is not None
        with locked_folder(data.root, "the root", "data convert"):
            written, left, failed = convert_masks(data, progress=True)
        print(
            f"{data.description.name}: {written} masks written as "
            f"{data.description.layouts(options.split)[0].path}, {left} were there"
            + (f", {len(failed)} skipped" if failed else "")
        )
        bad += failed
    for line in bad:
        print(f"skipped: {line}", file=sys.stderr)
    return 3 if bad else 0


def _superpixels(options: argparse.Namespace) -> int:
    import sys

    from ..data.folders import look
    from ..data.superpixels import SuperpixelOptions, write_superpixels
    from ..errors import InputError
    from ..output_lock import locked_file
    from ..progress import note
    from ..replacing import file_for

    out = file_for(options.out, "superpixel file")
    options.held.enter_context(locked_file(out, "--out", "data superpixels"))
    seen = look(options.root)
    if not seen.pictures:
        raise InputError(
            f"root {options.root!r} holds no picture but {seen.found()}; expected pictures, in "
            "any depth of folders"
        )
    for line in seen.left_out():
        note(line)
    count, bad = write_superpixels(
        [(name, seen.root / name) for name in seen.pictures],
        out,
        SuperpixelOptions(
            options.scale, options.sigma, options.min_size, options.workers, options.max_pixels
        ),
        progress=True,
    )
    bad = seen.bad + bad
    print(
        f"{count} pictures cut up into {out} ({out.stat().st_size / 2**20:.1f} MiB), {len(bad)} "
        "skipped"
    )
    for line in bad:
        print(f"skipped: {line}", file=sys.stderr)
    return 3 if bad else 0


def _entities(options: argparse.Namespace) -> int:
    from pathlib import Path

    from ..data.entities import load_entities
    from ..data.entity_index import filter_captions
    from ..errors import InputError
    from ..output_lock import locked_file
    from ..replacing import file_for

    if options.column < 0:
        raise InputError(f"--column is {options.column}; expected 0 or more")
    entities = load_entities(options.entities)
    options.held.enter_context(
        locked_file(file_for(options.out, "--out"), "--out", "data entities")
    )
    found = filter_captions(
        Path(options.captions),
        Path(options.out),
        entities,
        column=options.column,
        key=options.key,
        exact=options.exact,
        progress=True,
    )
    print(
        f"{found.kept} of {found.read} captions name one of {len(entities)} entities: {options.out}"
    )
    return _told(found.counts, found.bad, "bad line")


def _cross_pairs(options: argparse.Namespace) -> int:
    from pathlib import Path

    from ..data.entities import load_entities
    from ..data.entity_index import write_index
    from ..data.sources.base import ModelInputs
    from ..data.sources.folder import FolderPairs, captions_of
    from ..errors import DataError, InputError
    from ..output_lock import locked_file
    from ..replacing import file_for

    if Path(options.out).suffix != ".safetensors":
        raise InputError(f"--out is {options.out!r}; expected a name that ends in .safetensors")
    entities = load_entities(options.entities)
    options.held.enter_context(
        locked_file(file_for(options.out, "index of entities"), "--out", "data cross-pairs")
    )
    pairs = FolderPairs(options.root, ModelInputs(224))

    def captions():
        for name in pairs.names:
            try:
                yield captions_of(pairs.root / name)
            except DataError as error:
                yield str(error)

    counts, bad = write_index(pairs.names, captions(), entities, Path(options.out), progress=True)
    print(
        f"{len(pairs)} pictures indexed by {len(entities)} entities: {options.out} "
        f"({Path(options.out).stat().st_size / 2**20:.1f} MiB)"
    )
    return _told(counts, bad, "skipped")


def _told(counts: Counter[str], bad: list[str], what: str) -> int:
    """How often each entity was found, most first; what was left out, and the exit code that says
    so.
    """
    import sys

    print(*(f"{name} {count}" for name, count in counts.most_common() if count), sep=", ")
    for line in bad:
        print(f"{what}: {line}", file=sys.stderr)
    return 3 if bad else 0


def _browse(options: argparse.Namespace) -> int:

    import numpy as np

    from ..data.images import SUFFIXES
    from ..data.scenes import Scenes
    from ..errors import InputError
    from ..inference.segmentation import colour, contact_sheet, palette
    from ..output_lock import locked_file
    from ..replacing import file_for, replacing

    out = file_for(options.out, "--out")
    if not 1 <= options.count <= _MOST_SCENES:
        raise InputError(f"--count is {options.count}; expected 1 to {_MOST_SCENES}")
    if out.suffix.lower() not in SUFFIXES:
        raise InputError(f"--out is {options.out!r}; expected a picture's name, such as scenes.png")
    options.held.enter_context(locked_file(out, "--out", "data browse"))
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
    with replacing(out) as part:
        contact_sheet(rows, titles, legend).save(part)
    for scene in scenes[:6]:
        print(
            f"{scene.index}: {', '.join(scene.things) or 'nothing'} on {scene.stuff}: "
            f"{[c.text for c in scene.captions]}"
        )
    print(out)
    return 0
