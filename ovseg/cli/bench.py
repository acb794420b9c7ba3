"""Time the operators against plain torch, losses shown too.

  ovseg bench
  ovseg bench patch_text_similarity --case pacl --json out.json
  ovseg bench --pictures                                 a picture from pixels to labels, ViT-B/16
"""

from __future__ import annotations

import argparse


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("ops", nargs="*", help="operators; all if none is given")
    sub.add_argument("--case", action="append", default=[], help="name of a case; may be repeated")
    sub.add_argument("--pictures", action="store_true", help="a whole picture in place of operators")
    sub.add_argument("--repeats", type=int, default=7)
    sub.add_argument("--json", dest="out", help="file for the rows")


def run(options: argparse.Namespace) -> int:
    if options.pictures:
        from ovseg_benchmarks.segmentation import run as segment

        if options.ops or options.case:
            raise ValueError(f"--pictures is given with {[*options.ops, *options.case]}; expected no operator or case beside it")
        segment(repeats=options.repeats, out=options.out)
        return 0
    from ovseg_benchmarks.run import run as measure

    measure(options.ops, options.case, repeats=options.repeats, out=options.out)
    return 0
