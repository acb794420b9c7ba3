"""The folder for what can be made again: ``OVSEG_CACHE`` (``off``: none), else ``$XDG_CACHE_HOME/ovseg`` or ``~/.cache/ovseg``."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """None where there is to be no cache. It need not exist, nor be writable: who writes into it goes on without."""
    asked = os.environ.get("OVSEG_CACHE", "")
    if asked.lower() in ("off", "0", "no", "false"):
        return None
    if asked:
        return Path(asked).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "ovseg"
    except RuntimeError:  # a user without a home
        return None
