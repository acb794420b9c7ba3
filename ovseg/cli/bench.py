"""Time the operators against plain torch, losses shown too.

ovseg bench
ovseg bench patch_text_similarity --case pacl --json out.json
ovseg bench --whole pictures                           a picture from pixels to labels, ViT-B/16
ovseg bench --whole segclip                            SegCLIP: inference, and memory of a training step
ovseg bench --whole ovsegmentor                        OVSegmentor: inference, texts of a training step, the mask loss
ovseg bench --whole zegclip                            ZegCLIP: head and loss of a training step, and inference
ovseg bench --whole mgca                               MGCA-style: the losses of a training step
ovseg bench show results/*.jsonl                       tables of result files, of a run that was killed too"""

from __future__ import annotations

import argparse

from .options import at_least


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "ops", nargs="*", help="operators, all if none is given; or show and result files"
    )
    sub.add_argument("--case", action="append", default=[], help="name of a case; may be repeated")
    sub.add_argument(
        "--whole",
        choices=("mgca", "ovsegmentor", "pictures", "segclip", "zegclip"),
        help="a whole procedure in place of operators",
    )
    sub.add_argument("--repeats", type=int, default=7)
    sub.add_argument("--json", dest="out", help="file for the rows")


def run(options: argparse.Namespace) -> int:
    from ..output_lock import locked_file
    from ..replacing import file_for

    at_least(1, options, "repeats")
    if options.ops[:1] == ["show"]:
        if options.case or options.whole or options.out:
            raise ValueError(
                "bench show reads files and measures nothing; expected paths and no option beside "
                "it"
            )
        from ovseg_benchmarks.show import run as show

        return show(options.ops[1:])
    if options.out is not None:
        options.held.enter_context(locked_file(file_for(options.out, "--json"), "--json", "bench"))
    if options.whole:
        from importlib import import_module

        if options.ops or options.case:
            raise ValueError(
                f"--whole is given with {[*options.ops, *options.case]}; expected no operator or "
                "case beside it"
            )
        module = import_module(
            "ovseg_benchmarks." + {"pictures": "segmentation"}.get(options.whole, options.whole)
        )
        module.run(repeats=options.repeats, out=options.out)
        return 0
    from ovseg_benchmarks.run import run as measure

    measure(options.ops, options.case, repeats=options.repeats, out=options.out)
    return 0
