"""Embeddings of the label sets that a predictor was asked for last, and when they are stale."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..layers.kept import Version
from ..models import OVSegModel
from .queries import EncodedQueries, Queries

_REMEMBERED = 64  # label sets


class RememberedTexts:
    """``EncodedQueries`` by all that they depend on: the texts and how they are read, the weights of the text tower, the file of
    embeddings. Threads may ask at once; what two of them ask for is encoded once. Copies and pickles begin empty."""

    def __init__(self) -> None:
        self._found: OrderedDict[Any, tuple[Version, EncodedQueries]] = OrderedDict()
        self._looking = threading.Lock()
        self._encoding = threading.RLock()  # a hook of the model may ask too

    def __len__(self) -> int:
        return len(self._found)

    def __reduce__(self) -> tuple[type[RememberedTexts], tuple[()]]:
        return RememberedTexts, ()

    def encoded(self, model: OVSegModel, queries: Queries) -> EncodedQueries:
        """The queries as the model, as it is now, reads them."""
        queries = replace(queries, templates=queries.templates_for(model))
        key = (queries, _file_state(queries.embeddings))
        found = self._find(model, key)
        if found is not None:
            return found
        with self._encoding:
            found = self._find(model, key)  # another thread may have been first
            if found is None:
                version = _version(model)  # before: what is written meanwhile makes it stale
                found = EncodedQueries.encode(model, queries)
                self._keep(key, version, found)
        return found

    def _find(self, model: OVSegModel, key: Any) -> EncodedQueries | None:
        with self._looking:
            version, found = self._found.get(key, (None, None))
            if version is None or not version.holds(*_made_of(model)):
                return None
            self._found.move_to_end(key)
            return found

    def _keep(self, key: Any, version: Version, found: EncodedQueries) -> None:
        with self._looking:
            self._found[key] = (version, found)
            self._found.move_to_end(key)
            if len(self._found) > _REMEMBERED:
                self._found.popitem(last=False)


def _made_of(model: OVSegModel) -> tuple[list[Any], Any]:
    like = next(model.parameters())
    return model.text_parameters(), (like.dtype, like.device)  # what given embeddings are moved to


def _version(model: OVSegModel) -> Version:
    return Version(*_made_of(model))


def _file_state(path: str | None) -> Any:
    """Return what changes when a file is written again; its reader says what is wrong with one that is not there."""
    try:
        status = Path(path).stat() if path is not None else None
    except (OSError, ValueError):
        return None
    return status and (status.st_size, status.st_mtime_ns, status.st_ino)
