"""Extension points, all found one way: by the name of a file or a folder, or registered by a
caller.

A ``Registry`` maps names to what they stand for. What the package itself holds is found where it
lies: a module or a folder of a package, a YAML file of a folder. A caller adds to it with
``register``. Nothing is imported or read before it is asked for, and every unknown name ends in the
same sentence, with the closest name that exists.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import ConfigError

T = TypeVar("T")
Found = Mapping[str, Callable[[], Any]]  # name -> what loads it


class Registry(Mapping[str, T], Generic[T]):
    """What stands behind the names of one extension point.

    Args:
        what: the argument or key that names an entry, for messages: "data.kind".
        find: lists what the package holds.
        error: the class of the error for an unknown name.
    """

    def __init__(self, what: str, find: Callable[[], Found], error: type[Exception] = ConfigError):
        self.what, self.error = what, error
        self._find = find
        self._added: dict[str, Any] = {}

    def __getitem__(self, name: str) -> T:
        if name in self._added:
            return self._added[name]
        load = self._own().get(name) if isinstance(name, str) else None
        if load is not None:
            return load()
        raise self.error(self.unknown(name))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._own(), *self._added}))

    def __len__(self) -> int:
        return len({*self._own(), *self._added})

    def __contains__(self, name: object) -> bool:
        return name in self._added or name in self._own()

    def unknown(self, name: Any) -> str:
        """Return the sentence for a name that does not exist."""
        known = list(self)
        close = get_close_matches(name, known, 1, 0.75) if isinstance(name, str) else []
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"{self.what} is {name!r}; expected one of {known}{hint}"

    def register(self, name: str, value: T, *, override: bool = False) -> T:
        """Add ``value`` under ``name``, for this process.

        Raises:
            ValueError: if the name stands for something already, unless ``override``.
        """
        if name in self and not override:
            raise ValueError(
                f"{self.what} {name!r} is registered already; pass override=True to replace it"
            )
        self._added[name] = value
        return value

    def unregister(self, name: str) -> None:
        """Take back what ``register`` added."""
        del self._added[name]

    def _own(self) -> Found:
        return self._find()


def modules(
    package: str, attribute: str | None = None, *, leave_out: Iterable[str] = ("base",)
) -> Found:
    """Find the modules of a package; each stands for its ``attribute``, or for itself."""
    return _inside(package, attribute, lambda info: not info.ispkg and info.name not in leave_out)


def folders(package: str, attribute: str | None = None) -> Found:
    """Find the folders of a package that are packages themselves, likewise."""
    return _inside(package, attribute, lambda info: info.ispkg)


def named(places: Mapping[str, str]) -> Found:
    """Find what lies at given places, each written ``package.module:attribute``."""
    return {name: _loader(*place.split(":")) for name, place in places.items()}


def table(entries: Mapping[str, Any]) -> Found:
    """Find what is there already."""
    return {name: _constant(value) for name, value in entries.items()}


def yaml_files(*places: Path) -> Found:
    """Find the ``.yaml`` files of folders, some of which need not exist; each stands for its path."""
    return {path.stem: _constant(path) for place in places for path in place.glob("*.yaml")}


def _inside(package: str, attribute: str | None, wanted: Callable[[Any], bool]) -> Found:
    where = import_module(package).__path__
    names = [info.name for info in pkgutil.iter_modules(where) if wanted(info)]
    return {name: _loader(f"{package}.{name}", attribute) for name in names}


def _loader(module: str, attribute: str | None) -> Callable[[], Any]:
    def load() -> Any:
        found = import_module(module)
        return found if attribute is None else getattr(found, attribute)

    return load


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value
