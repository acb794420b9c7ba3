"""Extension points, all found one way: by the name of a file or folder, or as a caller registers.

A ``Registry`` maps names to what they stand for. What the package itself holds is found where it
lies: a module or a folder of a package, a YAML file of a folder. A caller adds to it with
``register``. Nothing is imported or read before it is asked for, and every unknown name ends in the
same sentence, with the closest name that exists.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import ConfigError

T = TypeVar("T")
Found = Mapping[str, Callable[[], Any]]  # name -> what loads the entry


class Registry(Mapping[str, T], Generic[T]):
    """A mapping of the names of one extension point to what stands behind them.

    Args:
        what: the argument or key that names an entry, for messages: "data.kind".
        find: lists what the package holds; it is called whenever that is asked for.
        error: the class of the error for an unknown name.
    """

    def __init__(self, what: str, find: Callable[[], Found], error: type[Exception] = ConfigError):
        self.what = what
        self.error = error
        self._find = find
        self._added: dict[str, Any] = {}

    def __getitem__(self, name: str) -> T:
        if isinstance(name, str):  # recipes may hold anything
            if name in self._added:
                return self._added[name]
            load = self._find().get(name)
            if load is not None:
                return load()
        raise self.error(self.unknown(name))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._find(), *self._added}))

    def __len__(self) -> int:
        return len({*self._find(), *self._added})

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._added or name in self._find())

    def unknown(self, name: Any) -> str:
        """Return the sentence for a name that does not exist."""
        known = list(self)
        close = get_close_matches(name, known, 1, 0.75) if isinstance(name, str) else []
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"{self.what} is {name!r}; expected one of {known}{hint}"

    def register(self, name: str, value: T, *, override: bool = False) -> T:
        """Add ``value`` under ``name``, for this process, and return it.

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
        """Take back what ``register`` added; what the package holds under the name is back."""
        del self._added[name]


def modules(package: str, attribute: str | None = None) -> Found:
    """Find the modules of a package but ``base``; each stands for its ``attribute``, or itself."""
    return _inside(package, attribute, lambda info: not info.ispkg and info.name != "base")


def folders(package: str, attribute: str | None = None) -> Found:
    """Find the packages inside a package; each stands for its ``attribute``, or itself."""
    return _inside(package, attribute, lambda info: info.ispkg)


def named(places: Mapping[str, str]) -> Found:
    """Find what lies at given places, each written ``package.module:attribute``."""
    return {name: _loader(*place.split(":")) for name, place in places.items()}


def table(entries: Mapping[str, Any]) -> Found:
    """Find what is there already."""
    return {name: _constant(value) for name, value in entries.items()}


def yaml_files(*places: Path) -> Found:
    """Find the ``.yaml`` files of folders, which need not exist; each stands for its path."""
    return table({path.stem: path for place in places for path in place.glob("*.yaml")})


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
