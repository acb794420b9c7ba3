"""Pictures that could not be used: named once, counted, and too many of them end training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import DataError


class SkipLimit:
    """Counts different bad pictures against a share of all.

    Args:
        pictures: number of pictures of the source.
        share: of them that may be bad; one always may.
    """

    def __init__(self, pictures: int, share: float = 0.01):
        self.pictures, self.share = pictures, share
        self.seen: dict[str, None] = {}

    def add(self, lines: Iterable[str]) -> list[str]:
        """Take note of ``Batch.skipped`` of all ranks; returns the lines that are new.

        Raises:
            DataError: past the limit. On every rank alike if every rank is given the lines of all.
        """
        new = [line for line in dict.fromkeys(lines) if line not in self.seen]
        self.seen.update(dict.fromkeys(new))
        if len(self.seen) > max(1, self.share * self.pictures):
            raise DataError(f"{len(self.seen)} of {self.pictures} pictures cannot be used, {100 * self.share:g} % may; "
                            f"the last: {next(reversed(self.seen))}")
        return new

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = dict.fromkeys(state["seen"])
