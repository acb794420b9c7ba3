"""ovseg: one verb a file. Exit codes, the same for all (docs/commands.md): 0 done; 1 it failed, or what lies on the disk is damaged; 2 it
cannot be followed as it was given; 3 finished, some input left out and named; 130 and 143 interrupted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module

import torch

from ovseg_kernels import BackendError

from .. import __version__, distributed
from ..errors import CheckpointError, ConfigError, DataError, InputError, first_line
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
        lists = [action.dest for action in sub._get_positional_actions() if action.nargs in ("*", "+")]
        sub.set_defaults(run=module.run, many=lists[-1] if lists else None)
    return top


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Positional arguments may stand on both sides of an option, `ovseg train RECIPE --resume run=FOLDER`; argparse takes those before."""
    top = parser()
    options, rest = top.parse_known_args(argv)
    if rest and (options.many is None or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        setattr(options, options.many, [*getattr(options, options.many), *rest])
    return options


def main(argv: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    options = parsed(argv)
    try:
        with in_force(options):
            return options.run(options) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        text = str(error) if code == 2 or not isinstance(error, RuntimeError) or isinstance(error, _FAILED) else first_line(error)
        lines = [line.strip() for line in (text or first_line(error)).splitlines()]  # those of libraries have several
        print(f"ovseg {options.verb}: {'; '.join(line for line in lines if line)}", file=sys.stderr)
        return code
    finally:
        distributed.close()


_FAILED = (CheckpointError, DataError, ImportError, FloatingPointError, OSError, UnicodeError, json.JSONDecodeError, MemoryError)


def exit_code(error: Exception) -> int | None:
    """Of a command that ends so; None for what only a fault of this package raises, which is shown whole."""
    if isinstance(error, (InputError, ConfigError, BackendError, FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return 2
    if isinstance(error, (*_FAILED, torch.OutOfMemoryError)):
        return 1
    if isinstance(error, RuntimeError) and any(words in str(error) for words in ("can't allocate memory", "out of memory")):
        return 1  # how torch says it of the CPU
    return 2 if isinstance(error, ValueError) else None  # the operators' word for an argument


if __name__ == "__main__":
    sys.exit(main())
