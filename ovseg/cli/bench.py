"""Time the operators against plain torch, losses shown too.

ovseg bench
ovseg bench patch_text_similarity --case pacl --json out.json
ovseg bench --whole pictures                          a whole procedure in place of operators
ovseg bench show results/*.jsonl                      tables of result files, of a run that was
                                                      killed too
"""

from __future__ import annotations

import argparse
import ast
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from ..registration import Registry, modules
from .options import COUNT

_WHOLE = "ovseg_benchmarks.whole"
WHOLE: Registry[ModuleType] = Registry("--whole", lambda: modules(_WHOLE))


def arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    sub.add_argument(
        "ops", nargs="*", help="operators, all if none is given; or show and result files"
    )
    sub.add_argument("--case", action="append", default=[], help="name of a case; may be repeated")
    sub.add_argument(
        "--whole",
        choices=list(WHOLE),
        help="; ".join(f"{name}: {_about(name)}" for name in WHOLE),
    )
    sub.add_argument("--repeats", **COUNT, default=7)
    sub.add_argument("--json", dest="out", help="file for the rows")


def _about(name: str) -> str:
    """Return the first line of a benchmark's file, which is not imported for that."""
    spec = find_spec(f"{_WHOLE}.{name}")
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or name
    return text.splitlines()[0].rstrip(".")


def run(options: argparse.Namespace) -> int:
    """Measure, or show what was measured; returns the exit code."""
    from ..output_lock import locked_file
    from ..replacing import file_for

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
        if options.ops or options.case:
            raise ValueError(
                f"--whole is given with {[*options.ops, *options.case]}; expected no operator or "
                "case beside it"
            )
        WHOLE[options.whole].run(repeats=options.repeats, out=options.out)
        return 0
    from ovseg_benchmarks.run import run as measure

    measure(options.ops, options.case, repeats=options.repeats, out=options.out)
    return 0
