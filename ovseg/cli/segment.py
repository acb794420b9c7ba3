"""Segment pictures with free-text labels.

  ovseg segment street.png --labels "a red car,road,sky"                        OpenAI's CLIP, from the cache or downloaded
  ovseg segment street.png --labels "car,road" -m ViT-B-16:laion2b_s34b_b88k    or other weights: ovseg models
  ovseg segment --demo                                                          a built-in scene, nothing downloaded
  ovseg segment photos/ --labels "person|man|woman,road" --background "wall,sky" -o out/
  ovseg segment photos/ list.txt "shards/*.tar" --labels-file names.txt --format
  overlay,mask,json,rle
  torchrun --nproc-per-node 2 -m ovseg segment photos/ --labels-file names.txt       # each process takes its share

Pictures that cannot be read are counted and named; the rest is done; the exit code is 3. A run that
was killed goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .options import (
    MODEL_HELP,
    add_device,
    add_inference_options,
    add_weights,
    given_inference_options,
    load_model,
    proxy_option,
    to_device,
)

if TYPE_CHECKING:
    from ..data.labels import LabelSet
    from ..inference import Segmentation
    from ..inference.sources import Source

_ENDINGS = {"overlay": ".overlay.png", "mask": ".mask.png", "json": ".json", "rle": ".rle.json"}


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "images",
        nargs="*",
        help="picture files, folders, patterns, lists (.txt, a picture on each line) and shards "
        "(.tar)",
    )
    sub.add_argument(
        "--demo",
        action="store_true",
        help="segment a built-in scene, by its own labels unless others are given",
    )
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--labels", help="comma-separated; synonyms separated by |")
    source.add_argument(
        "--labels-file",
        help=".txt: a label on each line, synonyms after it, separated by commas; or .yaml, .json",
    )
    source.add_argument(
        "--classes",
        help="the classes of a data set: voc20, context59, coco_stuff, coco_object, ade150, "
        "cityscapes",
    )
    sub.add_argument(
        "-m",
        "--model",
        help=f"{MODEL_HELP} (default: clip_dense_vit_b16:openai read out by naclip; "
        "segclip_tiny with --demo)",
    )
    sub.add_argument(
        "-o", "--out", default="segmented", help="output folder (default: %(default)s)"
    )
    sub.add_argument(
        "--format",
        default="overlay",
        help="comma-separated: overlay, mask, json, rle (default: %(default)s)",
    )
    sub.add_argument(
        "--overwrite",
        action="store_true",
        help="do pictures again that were done with the same labels, model and options",
    )
    sub.add_argument(
        "--allow-unknown",
        action="store_true",
        help="let a model that knows few words be asked for others",
    )
    add_weights(sub)
    add_device(sub)
    add_inference_options(sub)


def run(options: argparse.Namespace) -> int:
    from .. import distributed
    from ..errors import InputError
    from ..inference import Predictor
    from ..inference.jobs import Journal, fingerprint
    from ..inference.predictor import as_published, check_words
    from ..inference.segmentation import save_result, strip
    from ..inference.sources import Source, find_pictures
    from ..output_lock import locked_folder
    from ..paths import no_file
    from ..progress import bar
    from ..replacing import folder_for
    from .built_in import MODEL, built_in

    distributed.place()  # variables that do not fit are refused before any work
    formats = options.format.split(",")
    for name in formats:
        if name not in _ENDINGS:
            raise InputError(f"--format holds {name!r}; expected some of {', '.join(_ENDINGS)}")
    out = folder_for(options.out, "--out")
    labels = _labels(options)
    if "" in options.images:  # as a path, the present folder
        raise InputError(
            "a picture's name is empty; expected files, folders, patterns, lists or shards"
        )
    sources, bad = find_pictures(options.images)
    demo = built_in() if options.demo else None
    own = demo is not None and labels is None  # then its truth is known
    labels = demo.labels if demo is not None and labels is None else labels
    if not sources and demo is None:
        raise InputError("\n".join(["no pictures: give files or folders, or --demo", *bad]))
    if not labels:
        raise InputError('no labels: give --labels "cat,grass" or --labels-file')
    if (
        len(sources) == 1 and demo is None and (what := no_file(sources[0].path)) is not None
    ):  # before the weights, which may be large
        raise InputError(f"image {str(sources[0].path)!r} {what}; expected a picture")

    def files(name: str) -> list[Path]:
        return [out / f"{name}{_ENDINGS[kind]}" for kind in formats]

    _check_apart(sources, files)
    options.held.enter_context(locked_folder(out, "--out", "segment"))
    name = MODEL if options.model is None and options.demo else options.model
    model = load_model(
        name,
        **({"readout": options.readout} if options.readout is not None else {}),
        **proxy_option(options),
    )
    rank, world = distributed.rank(), distributed.world_size()
    alone = len(sources) == 1 and demo is None
    if world > 1:
        sources = sources[rank::world]  # all ranks list them in one order
        bad = bad if rank == 0 else []
    given = given_inference_options(options)
    if name is None:
        given = as_published(given)
    predictor = Predictor(to_device(model, options, quiet=rank > 0), **given)
    queries = replace(predictor.queries, labels=labels)
    try:
        check_words(model, queries)
    except InputError as error:
        if not options.allow_unknown:
            raise
        print(str(error).partition(";")[0], file=sys.stderr)
    predictor.set_labels(queries)
    few = len(sources) + (demo is not None) < 3 and world == 1
    asked = [labels.names, labels.texts, labels.templates]
    journal = Journal(
        out,
        {
            **given,
            "labels": asked,
            "model": fingerprint(model),
            "readout": str(model.config.get("readout")),
        },
    )
    bad = list(dict.fromkeys(bad))  # names may overlap
    for problem in bad:
        print(f"skipped: {problem}", file=sys.stderr)

    def write(result: Segmentation, name: str, image: str) -> None:
        for kind, file in zip(formats, files(name), strict=True):
            _write(result, kind, file, image)
        if few:
            top = sorted(result.areas.items(), key=lambda item: -item[1])[:5]
            print(
                ", ".join(f"{label} {100 * share:.1f} %" for label, share in top if share > 0)
                or "background only"
            )
            print(*files(name), sep="\n")

    if demo is not None and rank == 0:
        found = predictor.set_image(demo.image).predict()
        write(found, "demo", "demo")
        if own:
            path = out / "demo.strip.png"
            save_result(
                strip(found.image, {"truth": demo.truth, model.name: found.labels}, found.names),
                path,
            )
            print(path)
    todo = [
        source
        for source in sources
        if few or options.overwrite or not journal.has(source, files(source.name))
    ]
    before, written = len(sources) - len(todo), 0
    progress = bar(
        total=len(sources),
        initial=before,
        show=rank == 0,
        unit="picture",
        desc="segment",
        leave=not few,
        delay=2.0 * few,
    )
    for source, result in predictor.stream(todo):
        assert isinstance(source, Source)
        progress.update()
        if isinstance(result, InputError):
            if alone:
                raise result
            bad.append(str(source))
            named = "" if str(source) in str(result) else f"{source}: "
            print(f"skipped: {named}{result}", file=sys.stderr)
            continue
        try:
            write(result, source.name, str(source))
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            if alone:
                raise InputError(
                    f"{source}: the names of its results are too long for the file system: {error}"
                ) from error
            bad.append(str(source))
            print(
                f"skipped: {source}: the names of its results are too long for the file system",
                file=sys.stderr,
            )
            continue
        journal.add(source, files(source.name))
        del result  # before the next one is read
        written += 1
    progress.close()
    if not few or bad:
        earlier = f", {before} done before" if before else ""
        share = f" (process {rank} of {world})" if world > 1 else ""
        print(f"{written} pictures into {out}{earlier}, {len(bad)} skipped{share}")
    return 3 if bad else 0


def _check_apart(sources: Sequence[Source], files: Callable[[str], list[Path]]) -> None:
    """No result may replace a picture that is to be read: what is no result of an earlier run is
    the user's own.
    """
    from ..errors import InputError

    places: dict[Path, str] = {}

    def place(path: Path) -> str:
        if path.parent not in places:
            places[path.parent] = os.path.realpath(path.parent)
        return os.path.join(places[path.parent], path.name)

    pictures = {place(source.path): source for source in sources if source.offset is None}
    for source in sources:
        for file in files(source.name):
            if (other := pictures.get(place(file))) is not None:
                raise InputError(
                    f"the result of {str(source)!r} would be written over {str(other)!r}, which "
                    "is a picture to segment; "
                    "expected another --out"
                )


def _write(result: Segmentation, kind: str, path: Path, image: str) -> None:
    from ..replacing import replacing

    with replacing(path) as part:
        if kind == "overlay":
            result.save(part)
        elif kind == "mask":
            result.save_mask(part)
        elif kind == "json":
            part.write_text(json.dumps({"image": image, **result.to_dict()}, indent=2))
        else:
            with open(part, "w") as file:
                file.write(f'{{"image": {json.dumps(image)}, "labels": [')
                for i, row in enumerate(result.rle_rows()):
                    file.write(", " * (i > 0) + json.dumps(row))
                file.write("]}")


def _labels(options: argparse.Namespace) -> LabelSet | None:
    from ..data.labels import LabelSet
    from ..errors import InputError

    if options.labels_file == "":
        raise InputError("--labels-file is ''; expected a file")
    if options.labels_file is not None:
        return LabelSet.read(options.labels_file)
    if options.classes is not None:
        from ..data.benchmark_sets import describe

        return describe(options.classes).label_set
    return None if options.labels is None else LabelSet.parse(options.labels)
