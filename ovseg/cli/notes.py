"""Notes of a command, before its work, about what will not come of it."""

from __future__ import annotations

from ..libraries import installed, remedy


def no_plots(what: str) -> None:
    """Say once, in the first of several processes, that ``what`` follows from a missing matplotlib."""
    from .. import distributed
    from ..progress import note

    if distributed.is_main() and not installed("matplotlib"):
        note(f"matplotlib is not installed: {what} ({remedy('matplotlib')})")
