"""Plots and pictures beside the work: whether they can be drawn or not, the results are kept.

They are drawn by matplotlib's ``Figure`` alone, without pyplot: no window, and no account of the
backend that a notebook or a terminal asks for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from . import distributed
from .data.file_types import SOFTWARE
from .errors import first_line
from .libraries import installed, remedy
from .progress import note
from .replacing import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
_P = ParamSpec("_P")
_said_missing = False  # whether the user knows already that matplotlib is not installed


def say_if_missing(what: str) -> None:
    """Say before the work that matplotlib is missing, and ``what`` follows; it is not said again.

    Of several processes the first speaks.
    """
    global _said_missing
    if not installed("matplotlib"):
        _said_missing = True
        if distributed.is_main():
            note(f"matplotlib is not installed: {what} ({remedy('matplotlib')})")


def beside_the_work(what: str) -> Callable[[Callable[_P, Path | None]], Callable[_P, Path | None]]:
    """Make a function that draws into a file one that cannot fail: it then warns and returns None.

    Args:
        what: is drawn, for the warning: "loss curve".
    """

    def around(draw: Callable[_P, Path | None]) -> Callable[_P, Path | None]:
        @functools.wraps(draw)
        def drawn(*arguments: _P.args, **options: _P.kwargs) -> Path | None:
            try:
                return draw(*arguments, **options)
            except Exception as error:
                why = f"{type(error).__name__}: {first_line(error)}"
                missing = error.name if isinstance(error, ModuleNotFoundError) else None
                if (missing or "").startswith("matplotlib"):
                    if _said_missing:
                        return None
                    why = f"matplotlib is not installed ({remedy('matplotlib')})"
                logger.warning("no %s is drawn: %s", what, why)
                return None

        return drawn

    return around


def new_figure(**options: Any) -> Figure:
    """Return an empty matplotlib figure; ``options`` are those of ``matplotlib.figure.Figure``."""
    if "matplotlib" not in sys.modules:
        _import_matplotlib()
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def _import_matplotlib() -> None:
    """Import it without MPLBACKEND: it fails with one that is not installed, as a notebook's."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:  # for the rest of the program, as if it had imported matplotlib
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


def save_figure(figure: Figure, out: Path, dpi: int) -> Path:
    """Write a figure as a PNG that is known as no input of later runs; the file appears whole."""
    with replacing(out) as part:
        figure.savefig(part, dpi=dpi, metadata={"Software": SOFTWARE})
    return out
