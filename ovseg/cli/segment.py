r"""Segment pictures with free-text labels.

  ovseg segment --demo                                        a photograph of a cat, nothing
                                                              downloaded
  ovseg segment street.png --labels "a red car,road,sky"      OpenAI's CLIP, from the cache or
                                                              downloaded; without a network a
                                                              small model of some 180 names
  ovseg segment street.png --labels "car,road" -m ViT-B-16:laion2b_s34b_b88k
                                                              or other weights: ovseg models
  ovseg segment --demo scene                                  a drawn scene, its truth beside it
  ovseg segment photos/ --labels "person|man|woman,road" --background "wall,sky" -o out/
  ovseg segment photos/ list.txt "shards/*.tar" --labels-file names.txt \
      --format overlay,mask,json,rle
  torchrun --nproc-per-node 2 -m ovseg segment photos/ --labels-file names.txt
                                                              each process takes its share

Pictures that cannot be read are counted and named; the rest is done; the exit code is 3. A run that
was killed goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import (
    MODEL_HELP,
    add_device,
    add_inference_options,
    add_weights,
    demo_model,
    given_inference_options,
    model_to_run,
)

if TYPE_CHECKING:
    from ..data.labels import LabelSet


def arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    sub.add_argument(
        "images",
        nargs="*",
        help="picture files, folders, patterns, lists (.txt, a picture on each line) and shards "
        "(.tar)",
    )
    sub.add_argument(
        "--demo",
        nargs="?",
        const="auto",
        choices=("auto", "photo", "scene"),
        help="segment a built-in picture, by its own labels unless others are given: a photograph, "
        "or a drawn scene whose truth is known; auto, if no word follows: the photograph, if the "
        "model knows its words",
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
        help=f"{MODEL_HELP} (default: clip_dense_vit_b16:openai read out by naclip, or "
        "pacl_lite0:photos where that cannot be had; with --demo pacl_lite0:photos, of the scene "
        "segclip_tiny)",
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
    """Label the pictures; returns the exit code."""
    from ..inference.built_in import BUILT_IN
    from ..inference.jobs import SegmentJob, segment_pictures
    from ..libraries import require

    if options.demo:
        require("skimage", "--demo")  # whichever picture it is
    name = demo_model(options.demo) if options.model is None and options.demo else options.model
    job = SegmentJob(
        options.images,
        _labels(options),
        out=options.out,
        formats=options.format.split(","),
        options=given_inference_options(options),
        example=BUILT_IN[options.demo] if options.demo else None,
        overwrite=options.overwrite,
        allow_unknown=options.allow_unknown,
        tell=print,
    )
    outcome = segment_pictures(job, lambda: model_to_run(name, options, options.readout))
    return 3 if outcome.skipped else 0


def _labels(options: argparse.Namespace) -> LabelSet | None:
    """Return the labels that one of three options gives, or None."""
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
