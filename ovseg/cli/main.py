"""ovseg: one verb a file. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 finished with skipped inputs, 130/143 interrupted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__, distributed
from ..errors import CheckpointError, ConfigError, DataError, InputError
from .weights_options import in_force

VERBS = ("segment", "train", "eval", "demo", "data", "convert", "bench", "models", "info")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="ovseg", description="Open-vocabulary semantic segmentation from text supervision.")
    top.add_argument("--version", action="version", version=f"ovseg {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        module = import_module(f".{verb}", __package__)
        sub = verbs.add_parser(verb, help=(module.__doc__ or verb).strip().splitlines()[0], description=module.__doc__,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
        module.arguments(sub)
        sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    options = parser().parse_args(argv)
    try:
        with in_force(options):
            return options.run(options) or 0
    except (InputError, ConfigError) as error:
        print(f"ovseg {options.verb}: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, DataError, ImportError, FloatingPointError, ValueError, OSError) as error:
        print(f"ovseg {options.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        distributed.close()


if __name__ == "__main__":
    sys.exit(main())
