"""ovseg: one verb a file.

Exit codes, the same for all (docs/commands.md): 0 done; 1 it failed, or what lies on the disk is
damaged; 2 it cannot be followed as it was given; 3 finished, some input left out and named; 130 and
143 interrupted; 141 nobody reads stdout any more.

Nothing here imports torch before ``threads.set_up``, and what is asked about the command line alone
imports it not at all.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import CheckpointError, ConfigError, DataError, InputError, ProcessError, first_line
from ..libraries import MissingLibrary, reason
from . import ending as threads
from .ending import INTERRUPTED, NO_READER, reader_left, say
from .options import in_force

_LONGEST_WORD = 500  # letters that are printed of a name in a message: a long path is left whole
VERBS = ("segment", "train", "eval", "demo", "data", "convert", "bench", "models", "info")


def parser(verb: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line, with the arguments of ``verb`` alone.

    Those of other verbs may need libraries.
    """
    top = argparse.ArgumentParser(
        prog="ovseg", description="Open-vocabulary semantic segmentation from text supervision."
    )
    top.add_argument(
        "--version", action=_Version, nargs=0, help="show program's version number and exit"
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        module = import_module(f".{name}", __package__)
        sub = verbs.add_parser(
            name,
            help=(module.__doc__ or name).strip().splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == verb:
            module.arguments(sub)
        lists = [
            action.dest for action in sub._get_positional_actions() if action.nargs in ("*", "+")
        ]
        sub.set_defaults(run=module.run, many=lists[-1] if lists else None)
    return top


class _Version(argparse.Action):
    """Print the version, which lies in a package whose import is torch's too."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        spec = find_spec("ovseg_kernels")
        assert spec is not None and spec.origin is not None
        found = runpy.run_path(str(Path(spec.origin).with_name("_version.py")))
        print(f"ovseg {found['__version__']}")
        parser.exit()


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Positional arguments may stand on both sides of an option, `ovseg train RECIPE --resume
    run=FOLDER`; argparse takes those before.
    """
    top = parser(_verb(argv))
    options, rest = top.parse_known_args(argv)
    if rest and (options.many is None or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        setattr(options, options.many, [*getattr(options, options.many), *rest])
    return options


def _verb(argv: Sequence[str] | None) -> str | None:
    """Return the first word, unless an option stands before it.

    Options of ``ovseg`` itself end the program.
    """
    words = sys.argv[1:] if argv is None else argv
    return words[0] if words and words[0] in VERBS else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    threads.set_up()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Names of files need not be UTF-8; results are seen as they come, in a file or a pipe
            # too.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        if (verb := _verb(argv)) is not None:
            _import_torch()
        options = parsed(argv)
        from .. import distributed  # not before _import_torch

        quiet = getattr(options, "quiet", False)
        with (
            in_force(options),
            told(quiet=quiet),
            distributed.others_watched(),
            ExitStack() as options.held,
        ):
            return options.run(options) or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_left(failed=True):
            return NO_READER
        code = exit_code(error)
        if code is None:
            raise
        say(f"ovseg {verb}: {_message(error, code)}")
        return code
    finally:
        if "ovseg.distributed" in sys.modules:
            sys.modules["ovseg.distributed"].close()


def _import_torch() -> None:
    """Import what every verb needs.

    Raises:
        MissingLibrary: if it is not installed.
        ImportError: in one sentence, if it does not import: a CUDA library or the machine's C
            library is not what it expects.
    """
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingLibrary(reason(error), name=error.name) from error
    except (ImportError, OSError) as error:
        raise ImportError(
            f"needs torch, which is installed and does not import: {first_line(error)}; expected "
            "a release that fits this machine, pip install --force-reinstall torch"
        ) from error


class _Stderr(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is at the moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


_levels: dict[
    logging.Handler | None, int
] = {}  # those of the commands that run now, behind what was there before the first
_changing = Lock()


@contextmanager
def told(*, quiet: bool = False) -> Iterator[None]:
    """Send what this package logs to stderr, a plain line each.

    Ranks beyond the first tell errors only, other libraries nothing. Commands may run at the same
    time, in threads: the last that ends puts back the level that was there before them all.
    """
    from .. import distributed

    package = logging.getLogger("ovseg")
    level = (logging.WARNING if quiet else logging.INFO) if distributed.is_main() else logging.ERROR
    handler = _Stderr()
    try:
        with _changing:
            _levels.setdefault(None, package.level)
            _levels[handler] = level
            package.setLevel(level)
            package.addHandler(handler)
        yield
    finally:
        with _changing:
            package.removeHandler(handler)
            _levels.pop(handler, None)
            if _levels:
                package.setLevel(list(_levels.values())[-1])
            if len(_levels) == 1:
                _levels.clear()


_FAILED = (
    CheckpointError,
    DataError,
    ProcessError,
    ImportError,
    FloatingPointError,
    OSError,
    UnicodeError,
    json.JSONDecodeError,
    MemoryError,
)


def _message(error: Exception, code: int) -> str:
    """Return the one line that is printed of an error that ends a command.

    A name without end is cut in its middle.
    """
    if isinstance(error, ImportError):
        return reason(error)
    whole = code == 2 or not isinstance(error, RuntimeError) or isinstance(error, _FAILED)
    text = (str(error) if whole else "") or first_line(error)
    lines = (line.strip() for line in text.splitlines())  # those of libraries have several
    text = "; ".join(line for line in lines if line)
    return re.sub(
        rf"\S{{{_LONGEST_WORD},}}", lambda word: f"{word[0][:60]}...{word[0][-20:]}", text
    )


def exit_code(error: Exception) -> int | None:
    """Return the code of a command that ends so.

    None for what only a fault of this package raises, which is shown whole.
    """
    refused = (InputError, ConfigError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
    if isinstance(error, (refused, _class("ovseg_kernels", "BackendError"))):
        return 2
    if isinstance(error, (_FAILED, _class("torch", "OutOfMemoryError"))):
        return 1
    if isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "out of memory")
    ):
        return 1  # how torch says it of the CPU
    return 2 if isinstance(error, ValueError) else None  # the operators' word for an argument


def _class(module: str, name: str) -> Any:
    """Return a class for isinstance.

    Where its module was never imported there is no object of it.
    """
    return getattr(sys.modules.get(module), name, ())


if __name__ == "__main__":
    sys.exit(main())
