"""What an option may be, declared beside its field, and the one place that checks it.

    @dataclass
    class Options:
        steps: int = bounded(1000, low=1)
        share: float = bounded(0.5, low=0, high=1, expected="a share, 0 to 1")
        kind: str = bounded("cosine", one_of=("cosine", "poly"), help="of the schedule")

``check_bounds(options, "schedule.", ConfigError)`` says "schedule.steps is 0; expected 1 or more".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError


@dataclass(frozen=True)
class Bound:
    """What a value, or every value of a list or a mapping, may be. None stands for "not given".

    Attributes:
        low, high: the least and the largest number that mean something, both included.
        above: whether ``low`` itself means nothing.
        below: whether ``high`` itself means nothing.
        one_of: the values to choose from, in place of numbers.
        integer: whether only integers count.
        form: ``any``: a value, or a list or a mapping of values, where something else checks which;
            ``one``: a value alone; ``mapping``: values by name, none of them None.
        expected: what was expected in words, for the message; made from the rest if empty.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    one_of: Sequence[Any] | None = None
    integer: bool = False
    form: str = "any"
    expected: str = ""

    def holds(self, value: Any) -> bool:
        """Return whether a single value lies within."""
        if self.one_of is not None:
            return any(
                value is one or (type(value) is type(one) and value == one) for one in self.one_of
            )
        if isinstance(value, bool) or not isinstance(value, Integral if self.integer else Real):
            return False
        number = float(value)
        if not math.isfinite(number) or not self.low <= number <= self.high:
            return False
        return not (self.above and number == self.low) and not (self.below and number == self.high)

    def words(self) -> str:
        """Return what was expected, as messages end."""
        if self.expected:
            return self.expected
        if self.one_of is not None:
            return f"one of {list(self.one_of)}"
        kind = "an integer, " if self.integer else ""
        least = f"above {self.low:g}" if self.above else f"{self.low:g}"
        if math.isinf(self.high):
            return (
                "a finite number"
                if math.isinf(self.low)
                else f"{kind}{least}{'' if self.above else ' or more'}"
            )
        most = f"below {self.high:g}" if self.below else f"{self.high:g}"
        return f"{kind}{least} {'and' if self.above else 'to'} {most}"

    def check(self, name: str, value: Any, error: type[Exception] = ConfigError) -> None:
        """Refuse a value, or one inside a list or a mapping, that does not lie within.

        Raises:
            error: naming it, what came and what was expected.
        """
        if value is None and not (self.form == "one" and self.one_of is not None):
            return
        inside: Any = [("", value)]
        if self.form == "mapping" and not isinstance(value, Mapping):
            raise error(f"{name} is a {type(value).__name__}; expected numbers by name")
        if isinstance(value, Mapping) and self.form != "one":
            inside = value.items()
        elif isinstance(value, (list, tuple)) and self.form != "one":
            inside = enumerate(value)
        for part, one in inside:
            if (one is None and self.form == "any") or self.holds(one):
                continue
            where = name if part == "" else f"{name}.{part}"
            where = f"{name} of {part!r}" if self.form == "mapping" else where
            raise error(f"{where} is {shown(one)}; expected {self.words()}")


def choice(*values: Any) -> Bound:
    """Return the bound of a single value that is one of these."""
    return Bound(one_of=values, form="one")


POSITIVE = Bound(low=1, integer=True, form="one", expected="a positive integer")
AT_LEAST_1 = Bound(low=1, integer=True, form="one", expected="at least 1")
AT_LEAST_0 = Bound(low=0, integer=True, form="one", expected="at least 0")


def bounded(
    default: Any = MISSING,
    within: Bound | None = None,
    help: str = "",
    *,
    default_factory: Callable[[], Any] | Any = MISSING,
    **bound: Any,
) -> Any:
    """Declare a field of a dataclass with the ``Bound`` of the keywords.

    Args:
        default: as of ``dataclasses.field``.
        within: the bound, where it has a name of its own.
        help: what ``--help`` says about it, where the command line makes an option of it.
        default_factory: as of ``dataclasses.field``.
        bound: attributes of ``Bound`` in place of ``within``; without either the field is not
            checked.
    """
    metadata: dict[str, Any] = {"bound": Bound(**bound) if bound else within}
    if help:
        metadata["help"] = help
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_bounds(options: Any, where: str = "", error: type[Exception] = ConfigError) -> None:
    """Check every field of a dataclass that declares a bound.

    Args:
        options: the instance.
        where: before the names of fields in messages, with its dot: "schedule.".
        error: the class of the error.
    """
    for one in fields(options):
        bound = one.metadata.get("bound")
        if bound is not None:
            bound.check(f"{where}{one.name}", getattr(options, one.name), error)


def shown(value: Any) -> str:
    """Return a value as messages show it; of a long one its kind, as of a tensor."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"
