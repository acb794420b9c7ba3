"""Measure models on benchmarks: mIoU by a named protocol, every choice of it printed.

  ovseg eval pacl_tiny --data digits                            the embedded scenes
  ovseg eval clip_dense_tiny --readout clip,sclip,naclip --data digits_things --sweep
  ovseg eval ViT-B-16:openai ViT-B-16:laion2b_s34b_b88k --data voc21 --root /data --protocol naclip
  ovseg eval runs/mine --data voc21,context59 --root /data --protocol sclip --plots --out results
  torchrun --nproc-per-node 2 -m ovseg eval runs/mine --data ade150 --root /data
  ovseg eval runs/mine --data imagefolder --root /data/imagenet/val
                                                                zero-shot classification

Benchmarks: ovseg data list. Check your copy first: ovseg data check.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from .options import (
    MODEL_HELP,
    add_device,
    add_fields,
    add_inference_options,
    add_weights,
    device_of,
    given_inference_options,
    model_to_run,
    no_plots,
    no_readouts,
)

_NO_COMMAND = ("run", "verb", "many", "out", "held", "list_protocols", "inference")


def arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from ..evaluation.jobs import EvaluationJob

    sub.add_argument("models", nargs="+", metavar="model", help=MODEL_HELP)
    add_fields(sub, EvaluationJob)
    sub.add_argument(
        "--list-protocols", action=_ListProtocols, nargs=0, help="name the protocols and stop"
    )
    sub.add_argument(
        "--labels-file",
        help="texts of the classes in their order, in place of the protocol's; see ovseg segment",
    )
    add_weights(sub, several=True)
    add_device(sub)
    add_inference_options(sub)


class _ListProtocols(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        """Print the protocols, one a line, and end."""
        from ..evaluation.protocols import list_protocols, read_protocol

        for name in list_protocols():
            tree = read_protocol(name)
            print(
                f"{name:12} v{tree['version']}  {tree['title']}; "
                f"{', '.join(tree['data']) or 'any data set'}"
            )
        parser.exit()


def run(options: argparse.Namespace) -> int:
    """Measure the models; returns the exit code."""
    from .. import distributed
    from ..data.labels import LabelSet
    from ..environment import environment
    from ..errors import InputError
    from ..evaluation.jobs import EvaluationJob, measure

    distributed.place()  # variables that do not fit are refused before any work
    if options.labels_file == "":
        raise InputError("--labels-file is ''; expected a file")
    if options.sweep and options.out is not None:
        no_plots("no curve of --sweep is drawn")
    asked = {field.name for field in fields(EvaluationJob)} & vars(options).keys()
    values = {name: getattr(options, name) for name in asked}
    job = EvaluationJob(
        **values,
        labels=LabelSet.read(options.labels_file) if options.labels_file else None,
        options=given_inference_options(options),
        command=_command(options),
        environment={} if options.out is None else environment(device_of(options)),
        tell=print,
    )
    return 3 if measure(job, lambda: _models(options)) else 0


def _models(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield (title, model) of every model and readout."""
    several = len({Path(name).name for name in options.models}) < len(options.models)
    for name in options.models:
        title = name if several else Path(name).name
        model = model_to_run(name, options)
        set_readout = getattr(model, "set_readout", None)  # of training-free models
        if options.readout is not None and set_readout:
            for readout in options.readout.split(","):
                set_readout(readout)
                yield f"{title} {readout}", model
        elif options.readout is not None and len(options.models) == 1:
            raise no_readouts("--readout", name)
        else:
            yield title, model


def _command(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was asked for, for the results."""
    asked = {key: value for key, value in vars(options).items() if value is not None}
    return {key: value for key, value in asked.items() if key not in _NO_COMMAND}
