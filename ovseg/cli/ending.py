"""How the process of a command ends.

Signals, and a reader of stdout that has left, change the exit code and leave no traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import NoReturn

from .. import stop_signals

INTERRUPTED = 130  # Ctrl-C
STOPPED = 143  # a signal, once the state is saved
NO_READER = 141  # as a program that SIGPIPE ends


def program() -> NoReturn:
    """Run the command line as a process: ``ovseg`` and ``python -m ovseg``."""
    training = sys.argv[1:2] == ["train"]
    # From the start, as whoever sends a signal does not know how far the run is.
    with stop_signals.noted() if training else contextlib.nullcontext():
        try:
            from .main import main

            code: str | int | None = main()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except SystemExit as ended:  # argparse, after --help or a mistake
            code = ended.code
    if reader_left():
        code = NO_READER
    if training or code in (INTERRUPTED, STOPPED):
        stop_signals.ignore()
    sys.exit(code)


def say(text: str) -> None:
    """Print a line on stderr; where the terminal is closed, the command ends as if it were not."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def reader_left() -> bool:
    """Return whether a program that read stdout or stderr has ended.

    What leads to it, or to a closed terminal, leads nowhere from then on: Python flushes once more
    at its end.
    """
    left = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a full disk is said by Python itself
                continue
            left |= error.errno == errno.EPIPE
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        except (ValueError, AttributeError):  # closed, or none at all
            continue
    return left
