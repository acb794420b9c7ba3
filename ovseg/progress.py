"""How far long work is: a bar on a terminal and in notebooks, lines of the log elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sized
from typing import Any

logger = logging.getLogger(__name__)
FIRST = 5.0  # seconds to the first line of a log
EVERY = 20.0  # from one to the next


def bar(
    items: Iterable | None = None,
    *,
    show: bool = True,
    total: int | None = None,
    initial: int = 0,
    unit: str = "part",
    unit_scale: bool = False,
    desc: str = "",
    leave: bool = True,
    delay: float = 0.0,
) -> Any:
    """Return tqdm's bar over ``items``, or ``Lines`` of the same methods where nobody looks at one.

    Args:
        items: what is gone through; None: ``update`` says how far it is.
        show: False: nothing is said.
        total: how many there are, where ``items`` does not tell.
        initial: how many are done already.
        unit: what is counted, in the singular.
        unit_scale: whether the numbers are large: in thousands and millions.
        desc: what is done.
        leave: whether a bar stays on the terminal at its end.
        delay: seconds before a bar is drawn.
    """
    if not (show and _watched()):
        return Lines(items, total=total, initial=initial, unit=unit, desc=desc, speak=show)
    from tqdm.auto import tqdm

    return tqdm(
        items,
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=unit_scale,
        desc=desc or None,
        leave=leave,
        delay=delay,
        mininterval=0.5,
    )


def waiting(what: str, *, show: bool = True) -> Lines:
    """Return lines about one step that cannot say how far it is, for a ``with`` around it."""
    return Lines(desc=what, speak=show)


class Lines:
    """A line of the log after five seconds and every twenty.

    It comes from a thread of its own: a step that blocks is not silent either. Where nobody listens
    to the log there is no thread. It ends with ``close``, or with the object.
    """

    def __init__(
        self,
        items: Iterable | None = None,
        *,
        total: int | None = None,
        initial: int = 0,
        unit: str = "part",
        desc: str = "",
        speak: bool = True,
    ):
        self.items = items
        self.unit = unit
        self.desc = desc
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.n = self.initial = initial
        self.postfix = ""
        self._began = time.monotonic()
        self._spoken = False
        self._ended = threading.Event()
        weakref.finalize(self, self._ended.set)  # its owner may leave by an exception
        if speak and logger.isEnabledFor(logging.INFO):
            threading.Thread(
                target=_speak, args=(weakref.ref(self), self._ended), name="progress", daemon=True
            ).start()

    def __iter__(self) -> Iterator[Any]:
        assert self.items is not None
        try:
            for item in self.items:
                yield item
                self.n += 1
        finally:
            self.close()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count ``n`` more as done."""
        self.n += n

    def set_postfix(self, **values: Any) -> None:
        """Set what else a line tells, in place of what it told before."""
        self.postfix = ", ".join(
            f"{key} {value}" for key, value in values.items() if key != "refresh"
        )

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Set in words what else a line tells."""
        self.postfix = text

    def close(self) -> None:
        """Say how it ended, if there was a line before."""
        if not self._ended.is_set() and self._spoken:
            self.speak(last=True)
        self._ended.set()

    def speak(self, *, last: bool = False) -> None:
        """Write a line: "evaluate pacl_tiny: 120/300 pictures, 4.1/s, 44 s left"."""
        self._spoken = True
        passed = time.monotonic() - self._began
        done = self.n - self.initial
        parts = [self._count()] if self.total is not None or self.n else []
        if last:
            parts.append(f"ended after {duration(passed)}")
        elif done <= 0 or passed <= 0:
            parts.append(f"{duration(passed)} so far")
        else:
            parts.append(_rate(done / passed, self.unit))
            parts.append(
                f"{duration(passed)} so far"
                if self.total is None
                else f"{duration((self.total - self.n) * passed / done)} left"
            )
        parts += [self.postfix] if self.postfix else []
        logger.info("%s%s", f"{self.desc}: " if self.desc else "", ", ".join(parts))

    def _count(self) -> str:
        scale = 1.0
        unit = f"{self.unit}{'es' if self.unit.endswith('ch') else 's'}"
        if self.unit == "B":
            scale = 1e6
            unit = "MB"
        whole = "" if self.total is None else f"/{self.total / scale:.0f}"
        return f"{self.n / scale:.0f}{whole} {unit}"


def _speak(lines: weakref.ref[Lines], ended: threading.Event) -> None:
    wait = FIRST
    while not ended.wait(wait):
        if (found := lines()) is None:
            return
        found.speak()
        del found
        wait = EVERY


def _rate(rate: float, unit: str) -> str:
    if unit == "B":
        return f"{rate / 1e6:.1f} MB/s"
    return f"{rate:.1f}/s" if rate >= 1 else f"{duration(1 / rate)} each"


def duration(seconds: float) -> str:
    """Say how long something takes: "0.4 s", "44 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _watched() -> bool:
    """Return whether bars are seen: on a terminal, and in a notebook."""
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def note(text: str) -> None:
    """Write a line for the user on stderr, beside results."""
    sys.stderr.write(f"{text}\n")
