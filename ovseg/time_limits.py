"""How long this package waits for other processes.

Each limit is a variable of the environment, in seconds (docs/commands.md).
"""

from __future__ import annotations

import math
import os

from .errors import ConfigError

_MOST = 1e7  # about four months; what torch is given must fit into its milliseconds


def start_limit() -> float:
    """Return the limit of several processes, until all have come."""
    return _seconds("OVSEG_START_TIMEOUT", 30.0)


def rank_limit() -> float:
    """Return the limit of several processes, until the others take part in what all do together."""
    return _seconds("OVSEG_RANK_TIMEOUT", 1800.0)


def data_limit() -> float:
    """Return the limit until the processes that read training data give a batch."""
    return _seconds("OVSEG_DATA_TIMEOUT", 600.0)


def _seconds(name: str, usual: float) -> float:
    text = os.environ.get(name, "")
    if not text:
        return usual
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MOST:
        raise ConfigError(
            f"{name} is {text!r} in the environment; "
            f"expected seconds, above 0 and at most {_MOST:g}"
        )
    return value
