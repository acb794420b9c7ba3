"""Look at data: the embedded scenes, the benchmarks on disk.

ovseg data list                                     the benchmarks, their classes and folders
ovseg data check voc21,ade150 --root /data          missing and damaged files, unequal sizes,
                                                    labels off by one
ovseg data convert coco_object --root /data         masks with labels as values, for other tools
ovseg data superpixels pairs/ --out superpixels.safetensors
                                                    what SegCLIP's training needs beside the
                                                    pictures
ovseg data entities cc12m.tsv --out cc4m.tsv        the captions that name an entity: CC4M from
                                                    CC12M
ovseg data cross-pairs pairs/ --out index.safetensors
                                                    which pictures share an entity, for
                                                    OVSegmentor's second stage
ovseg data browse --form shapes --out scenes.png    a contact sheet of scenes with their masks and
                                                    captions
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bounds import Bound
from .options import COUNT, INDEX, Within, no_plots

if TYPE_CHECKING:
    from ..data.benchmark_sets import SegmentationSet

# Of a contact sheet.
_SCENES: dict[str, Any] = {"type": int, "action": Within, "bound": Bound(low=1, high=10_000)}
_COLUMN: dict[str, Any] = {
    "type": int,
    "action": Within,
    "bound": Bound(low=0, expected="0 or more"),
}


def arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments of each action."""
    actions = sub.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the benchmarks, their classes and folders")
    check = actions.add_parser(
        "check", help="find missing and damaged files, unequal sizes, labels off by one"
    )
    check.add_argument("--sample", **COUNT, help="look at so many pictures only, evenly spread")
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
    check.add_argument(
        "--partial",
        action="store_true",
        help="a part of the pictures will do: those that are there are checked",
    )
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
            "--max-pixels", **COUNT, help="pictures of more pixels are refused (64 million)"
        )
    _add_entities(actions)
    browse = actions.add_parser("browse", help="a contact sheet of embedded scenes")
    browse.add_argument("--form", default="digits", choices=("digits", "shapes"))
    browse.add_argument("--split", default="train", choices=("train", "val"))
    browse.add_argument("--count", **_SCENES, default=36)
    browse.add_argument("--seed", **INDEX, default=0)
    browse.add_argument("--out", default="scenes.png")


def _add_entities(actions: Any) -> None:
    """Declare the arguments of what looks for entities in captions."""
    named = actions.add_parser(
        "entities", help="keep the lines of a list of captions that name an entity"
    )
    named.add_argument("captions", help=".tsv (address, caption) or .jsonl")
    named.add_argument("--out", required=True, help="the new list, of the same kind")
    named.add_argument(
        "--column",
        **_COLUMN,
        default=1,
        help="of a .tsv: where the caption is, from 0 (default: 1)",
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


def run(options: argparse.Namespace) -> int:
    """Do one of the actions; returns the exit code."""
    from ..data.images import MAX_PIXELS
    from ..errors import InputError
    from ..paths import no_folder

    options.max_pixels = getattr(options, "max_pixels", None) or MAX_PIXELS
    root = getattr(options, "root", None)
    if root is not None and (what := no_folder(root)) is not None:
        raise InputError(f"root {root!r} {what}; expected the folder that holds the data")
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


def _list(options: argparse.Namespace) -> int:
    from ..data.benchmark_sets import describe, list_sets

    for name in list_sets():
        about = describe(name)
        splits = about.tree["splits"].items()
        counts = ", ".join(f"{split} {part.get('count', '?')}" for split, part in splits)
        layouts = " or ".join(layout.path for layout in about.layouts(about.splits[0]))
        print(f"{name:12} {about.title}")
        print(f"{'':12} {counts}; {about.tree['folders'][0]}: {about.tree['images']}, {layouts}")
    return 0


def _sets(options: argparse.Namespace) -> list[SegmentationSet]:
    """Return the data sets that are named."""
    from ..data.benchmark_sets import SegmentationSet
    from ..errors import InputError

    names = [name.strip() for name in options.data.split(",")]
    if not all(names):
        raise InputError(
            f"data is {options.data!r}; expected names separated by commas, such as voc21,ade150"
        )
    return [
        SegmentationSet(
            name,
            options.root,
            options.split,
            max_pixels=options.max_pixels,
            partial=getattr(options, "partial", False),
        )
        for name in names
    ]


def _check(options: argparse.Namespace) -> int:
    from ..data.check import check_set
    from ..evaluation.plots import write_check
    from ..output_lock import locked_folder
    from ..replacing import folder_for

    if options.out is not None:
        no_plots("no plot of the classes is drawn")
        out = folder_for(options.out, "--out")
        options.held.enter_context(locked_folder(out, "--out", "data check"))
    wrong = 0
    for data in _sets(options):
        report = check_set(data, sample=options.sample, progress=True)
        print(report)
        wrong += len(report.wrong)
        if options.out:
            print(*write_check(report, data, options.split, Path(options.out)), sep="\n")
    return 1 if wrong else 0


def _convert(options: argparse.Namespace) -> int:
    from ..data.check import convert_masks
    from ..output_lock import locked_folder

    bad: list[str] = []
    for data in _sets(options):
        assert data.root is not None
        with locked_folder(data.root, "the root", "data convert"):
            written, left, failed = convert_masks(data, progress=True)
        skipped = f", {len(failed)} skipped" if failed else ""
        print(
            f"{data.description.name}: {written} masks written as "
            f"{data.description.layouts(options.split)[0].path}, {left} were there{skipped}"
        )
        bad += failed
    return _told(bad, "skipped")


def _superpixels(options: argparse.Namespace) -> int:
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
    size = out.stat().st_size / 2**20
    print(f"{count} pictures cut up into {out} ({size:.1f} MiB), {len(bad)} skipped")
    return _told(bad, "skipped")


def _entities(options: argparse.Namespace) -> int:
    from ..data.entities import load_entities
    from ..data.entity_index import filter_captions
    from ..output_lock import locked_file
    from ..replacing import file_for

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
    _print_counts(found.counts)
    return _told(found.bad, "bad line")


def _cross_pairs(options: argparse.Namespace) -> int:
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

    def captions() -> Iterator[list[str] | str]:
        for name in pairs.names:
            try:
                yield captions_of(pairs.root / name)
            except DataError as error:
                yield str(error)

    counts, bad = write_index(pairs.names, captions(), entities, Path(options.out), progress=True)
    size = Path(options.out).stat().st_size / 2**20
    print(
        f"{len(pairs)} pictures indexed by {len(entities)} entities: {options.out} ({size:.1f} MiB)"
    )
    _print_counts(counts)
    return _told(bad, "skipped")


def _print_counts(counts: Counter[str]) -> None:
    """Print how often each entity was found, most first."""
    print(*(f"{name} {count}" for name, count in counts.most_common() if count), sep=", ")


def _told(bad: list[str], what: str) -> int:
    """Name what was left out; returns the exit code that says so."""
    for line in bad:
        print(f"{what}: {line}", file=sys.stderr)
    return 3 if bad else 0


def _browse(options: argparse.Namespace) -> int:
    from ..data.images import SUFFIXES
    from ..data.scenes import Scenes
    from ..errors import InputError
    from ..evaluation.scenes import scene_sheet
    from ..output_lock import locked_file
    from ..replacing import file_for, replacing

    out = file_for(options.out, "--out")
    if out.suffix.lower() not in SUFFIXES:
        raise InputError(f"--out is {options.out!r}; expected a picture's name, such as scenes.png")
    options.held.enter_context(locked_file(out, "--out", "data browse"))
    scenes = Scenes(options.form, options.split, options.count, options.seed)
    with replacing(out) as part:
        scene_sheet(scenes).save(part)
    for scene in scenes[:6]:
        captions = [caption.text for caption in scene.captions]
        things = ", ".join(scene.things) or "nothing"
        print(f"{scene.index}: {things} on {scene.stuff}: {captions}")
    print(out)
    return 0
