"""Plots and pictures beside the work: whether they can be drawn or not, the results are kept.

They are drawn by matplotlib's ``Figure`` alone, without pyplot: no window, and no account of the
backend that a notebook or a terminal asks for."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from .data.file_types import SOFTWARE
from .errors import first_line
from .libraries import remedy
from .replacing import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
_P = ParamSpec("_P")


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
                missing = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(
                    "matplotlib"
                )
                why = (
                    f"matplotlib is not installed ({remedy('matplotlib')})"
                    if missing
                    else f"{type(error).__name__}: {first_line(error)}"
                )
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
    """Import it without MPLBACKEND: with one that is not installed, such as a notebook's, it fails."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = (
                backend  # for the rest of the program, as if it had imported it
            )


def save_figure(figure: Figure, out: Path, dpi: int) -> Path:
    """Write a figure as a PNG that is known as no input of later runs; the file appears whole."""
    with replacing(out) as part:
        figure.savefig(part, dpi=dpi, metadata={"Software": SOFTWARE})
    return out
