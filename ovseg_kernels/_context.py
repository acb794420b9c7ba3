"""Settings that a ``with`` block changes for its own thread or asyncio task alone.

Others go on as they were.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import torch


class _OfThread(threading.local):
    value: Any = None


class Setting:
    """A value that the innermost block around a call has set.

    None outside of any, where the setting of the process holds. torch.compile guards on a copy of
    the thread's, for it traces a ContextVar from torch 2.14 on only: tasks that force different
    backends and share a thread should not share compiled functions.
    """

    def __init__(self, name: str) -> None:
        self._set: contextvars.ContextVar[Any] = contextvars.ContextVar(name, default=None)
        self._traced = _OfThread()

    def get(self) -> Any:
        return self._traced.value if torch.compiler.is_compiling() else self._set.get()

    @contextlib.contextmanager
    def to(self, value: Any) -> Iterator[None]:
        token = self._set.set(value)
        self._traced.value = value
        try:
            yield
        finally:
            self._set.reset(token)
            # Not what it was before: tasks of one thread may end in any order.
            self._traced.value = self._set.get()


BACKEND = Setting("ovseg_backend")
CHECKING = Setting("ovseg_checking")
