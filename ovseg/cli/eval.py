"""Measure models on benchmarks: mIoU by a named protocol, every choice of it printed.

  ovseg eval pacl_tiny --data digits                                        the embedded scenes
  ovseg eval clip_dense_tiny --readout clip,sclip,naclip --data digits_things --sweep
  ovseg eval ViT-B-16:openai ViT-B-16:laion2b_s34b_b88k --data voc21 --root /data --protocol naclip
  ovseg eval runs/mine --data voc21,context59 --root /data --protocol sclip --plots --out results
  torchrun --nproc-per-node 2 -m ovseg eval runs/mine --data ade150 --root /data
  ovseg eval runs/mine --data imagefolder --root /data/imagenet/val         zero-shot classification

Benchmarks: ovseg data list. Check your copy first: ovseg data check."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from .options import (
    MODEL_HELP,
    add_device,
    add_inference_options,
    add_weights,
    at_least,
    device_of,
    given_inference_options,
    load_model,
    no_plots,
    no_readouts,
    proxy_option,
    to_device,
)

logger = logging.getLogger(__name__)


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("models", nargs="+", metavar="model", help=MODEL_HELP)
    sub.add_argument(
        "--data",
        default="digits",
        help="comma-separated: digits, shapes, digits_things, shapes_things; a benchmark; a .yaml "
        "description; imagefolder",
    )
    sub.add_argument("--root", help="the folder that holds the benchmarks, or one of them")
    sub.add_argument("--split", default="val")
    sub.add_argument(
        "--protocol",
        default="plain",
        help="a named protocol (--list-protocols) or a .yaml file (default: %(default)s)",
    )
    sub.add_argument(
        "--list-protocols", action=_ListProtocols, nargs=0, help="name the protocols and stop"
    )
    sub.add_argument(
        "--labels-file",
        help="texts of the classes in their order, in place of the protocol's; see ovseg segment",
    )
    sub.add_argument(
        "--present-only",
        action="store_true",
        help="only the classes of a picture's truth compete in it (uses the truth)",
    )
    sub.add_argument("--boundary", action="store_true", help="Boundary IoU too")
    sub.add_argument(
        "--sweep", action="store_true", help="mIoU at 101 background thresholds, in one pass"
    )
    sub.add_argument("--limit", type=int, help="only so many pictures")
    sub.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out pictures and masks that cannot be read, and say so; exit code 3",
    )
    sub.add_argument("--scenes", type=int, default=300, help="of embedded data")
    sub.add_argument("--seed", type=int, default=0, help="of embedded data")
    sub.add_argument("--out", help="folder for results.json, table.md, classes.csv and pictures")
    sub.add_argument(
        "--plots", action="store_true", help="confusion matrix and classes too, into --out"
    )
    sub.add_argument(
        "--batch",
        type=int,
        default=1,
        help="pictures that are encoded together: faster on a GPU (default: 1)",
    )
    add_weights(sub, several=True)
    add_device(sub)
    add_inference_options(sub)


class _ListProtocols(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        from ..evaluation.protocols import list_protocols, read_protocol

        for name in list_protocols():
            tree = read_protocol(name)
            print(
                f"{name:12} v{tree['version']}  {tree['title']}; "
                f"{', '.join(tree['data']) or 'any data set'}"
            )
        parser.exit()


def run(options: argparse.Namespace) -> int:
    from .. import distributed
    from ..errors import InputError
    from ..libraries import require
    from ..output_lock import locked_folder
    from ..paths import no_folder
    from ..replacing import file_for, folder_for

    rank = distributed.rank()  # variables that do not fit are refused before any work
    at_least(1, options, "limit", "scenes", "batch")
    at_least(0, options, "seed")
    if options.plots and options.out is None:
        raise InputError("--plots is given and --out is missing; expected a folder for the plots")
    if options.out is not None:
        for name in ("results.json", "table.md", "classes.csv", "gallery.png"):
            file_for(folder_for(options.out, "--out") / name, "--out needs a file, and")
    if options.root is not None and (what := no_folder(options.root)) is not None:
        raise InputError(f"--root {options.root!r} {what}; expected the folder that holds the data")
    if options.labels_file == "":
        raise InputError("--labels-file is ''; expected a file")
    if options.plots:
        require("matplotlib", "--plots")
    if options.boundary:
        require("scipy", "--boundary")
    if options.sweep and options.out is not None:
        no_plots("no curve of --sweep is drawn")
    distributed.group()  # whoever does not come is known before anything is loaded
    if options.out is not None:
        options.held.enter_context(locked_folder(Path(options.out), "--out", "eval"))
    return _classify(options, rank) if options.data == "imagefolder" else _segment(options, rank)


def _models(options: argparse.Namespace, quiet: bool):
    """(title, model) of every model and readout."""
    several = len({Path(name).name for name in options.models}) < len(options.models)
    for name in options.models:
        title = name if several else Path(name).name
        model = to_device(load_model(name, **proxy_option(options)), options, quiet=quiet)
        set_readout = getattr(model, "set_readout", None)  # of training-free models
        if options.readout is not None and set_readout:
            for readout in options.readout.split(","):
                set_readout(readout)
                yield f"{title} {readout}", model
        elif options.readout is not None and len(options.models) == 1:
            raise no_readouts("--readout", name)
        else:
            yield title, model


def _segment(options: argparse.Namespace, rank: int) -> int:
    import numpy as np

    from ..data.benchmark_sets import SegmentationSet, describe
    from ..data.labels import LabelSet
    from ..environment import environment
    from ..errors import InputError
    from ..evaluation.evaluate import Report, class_table, evaluate, table, write_results
    from ..evaluation.protocols import protocol
    from ..evaluation.scenes import SCENE_SETS, SceneSet, evaluate_scene_set, save_gallery

    changes = given_inference_options(options)
    labels = LabelSet.read(options.labels_file) if options.labels_file else None
    sets: list[Any] = []
    for name in options.data.split(","):
        if name in SCENE_SETS:
            sets.append(SceneSet(name, options.scenes, options.seed))
            continue
        about = describe(name)
        if options.root is None:
            raise InputError(f"--root is missing; expected the folder that holds {about.title}")
        sets.append(SegmentationSet(name, options.root, options.split, description=about))
    if options.out is not None:
        facts = {"command": _command(options), "environment": environment(device_of(options))}
    reports: dict[str, Report] = {}
    shown: dict[str, Any] = {}
    for data in sets:
        for title, model in _models(options, quiet=rank > 0):
            chosen = protocol(
                options.protocol,
                data.description,
                model,
                labels=labels,
                present_only=options.present_only,
                **changes,
            )
            if isinstance(data, SegmentationSet):
                data.max_pixels = (
                    chosen.view.max_pixels
                )  # one limit: of what is read and of what is seen
            choices = chosen.choices(model, data.description)
            if rank == 0 and choices != shown:
                _print_choices(title, choices)
                shown = choices
            _, top = chosen.decision.score_range or (
                0.0,
                1.0,
            )  # without a range the sweep is refused
            thresholds = np.linspace(0, top, 101) if options.sweep else None
            scored = {
                "boundary": options.boundary,
                "thresholds": thresholds,
                "limit": options.limit,
                "skip_bad": options.skip_bad,
                "keep": 10,
                "progress": True,
                "batch": options.batch,
            }
            if isinstance(data, SceneSet):
                report = evaluate_scene_set(model, data, chosen=chosen, **scored)
            else:
                report = evaluate(model, data, chosen, **scored)
            report.summary["model"] = title
            reports[title if len(sets) == 1 else f"{title} {data.description.name}"] = report
            if rank == 0:
                logger.info(
                    "%s on %s: mIoU %s", title, data.description.name, report.summary["miou"]
                )
            if rank == 0 and options.out:  # what is done outlives a run that is stopped
                write_results(list(reports.values()), Path(options.out), **facts)
    rows = list(reports.values())
    skipped = sum(len(report.skipped) for report in rows)
    if rank > 0:
        return 3 if skipped else 0
    print(table([report.summary for report in rows]))
    if len(rows) == 1:
        print("\n" + class_table(rows[0]))
    for line in dict.fromkeys(
        line for report in rows for line in report.skipped
    ):  # models share data
        print(f"left out: {line}")
    if options.out:
        from ..evaluation.plots import plot_classes, plot_confusion, plot_sweeps

        out = Path(options.out)
        written: list[Path | None] = [*write_results(rows, out, **facts)]
        for data in sets:
            some = {
                title: report
                for title, report in reports.items()
                if report.data is data.description
            }
            stem = "" if len(sets) == 1 else f"{data.description.name}_"
            written.append(save_gallery(some, out / f"{stem}gallery.png"))
            if options.sweep:
                written.append(plot_sweeps(some, out / f"{stem}sweep.png"))
            if options.plots:
                for title, report in some.items():
                    name = title.replace("/", "_").replace(" ", "_")
                    written += [
                        plot_confusion(report, out / f"{name}_confusion.png"),
                        plot_classes(report, out / f"{name}_classes.png"),
                    ]
        print(*(path for path in written if path), sep="\n")
    return 3 if skipped else 0


def _print_choices(title: str, choices: dict[str, Any]) -> None:
    """The protocol, line by line; long lists are cut, results.json has them whole."""
    print(f"{title}:")
    for key, value in choices.items():
        if key in ("settings", "class_texts") or value in (None, [], {}, 0.0, False):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        print(f"  {key:18} {text if len(text) < 160 else text[:157] + '...'}")


def _command(options: argparse.Namespace) -> dict[str, Any]:
    left_out = ("run", "verb", "out", "held", "list_protocols")
    return {
        key: value
        for key, value in vars(options).items()
        if key not in left_out and value is not None
    }


def _classify(options: argparse.Namespace, rank: int) -> int:
    import json

    from ..data.labels import LabelSet
    from ..errors import InputError
    from ..evaluation.classification import ClassFolders, evaluate_classification
    from ..evaluation.evaluate import table
    from ..replacing import write_text

    if options.root is None:
        raise InputError(
            "--root is missing; expected a folder with a sub-folder of pictures for each class"
        )
    data = ClassFolders(
        options.root, LabelSet.read(options.labels_file) if options.labels_file else None
    )
    found = []
    for title, model in _models(options, quiet=rank > 0):
        result = evaluate_classification(
            model,
            data,
            skip_bad=options.skip_bad,
            limit=options.limit,
            progress=True,
            **given_inference_options(options),
        )
        result.summary["model"] = title
        found.append(result)
        if rank == 0 and options.out:
            write_text(
                Path(options.out) / "results.json",
                json.dumps(
                    {"command": _command(options), "results": [r.to_dict() for r in found]},
                    indent=1,
                ),
            )
    if rank > 0:
        return 3 if found[0].skipped else 0
    names = {
        "model": "model",
        "data": "data",
        "pictures": "pictures",
        "classes": "classes",
        "top1": "top-1",
        "top5": "top-5",
        "mean_top1": "mean over classes",
        "templates": "templates",
    }
    print(table([result.summary for result in found], names))
    for line in found[0].skipped:
        print(f"left out: {line}")
    if options.out:
        print(Path(options.out) / "results.json")
    return 3 if found[0].skipped else 0
