"""Bounds of options are declared beside their fields and checked in one place, here.

    @dataclass
    class Options:
        steps: int = bounded(1000, low=1)
        share: float = bounded(0.5, low=0, high=1, expected="a share, 0 to 1")
        kind: str = bounded("cosine", one_of=("cosine", "poly"), help="of the schedule")

``check_bounds(options, "schedule.", ConfigError)`` says "schedule.steps is 0; expected 1 or more".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError


@dataclass(frozen=True)
class Bound:
    """The bound of a value, or of every value in a list or a mapping; None is "not given".

    Attributes:
        low, high: the least and the largest number that mean something, both included.
        above: whether ``low`` itself means nothing.
        below: whether ``high`` itself means nothing.
        one_of: the values to choose from, in place of numbers.
        pattern: what a text must match from end to end, in place of numbers.
        integer: whether only integers count.
        pair: whether the value is two numbers, which messages show together.
        ordered: whether it is a pair of which the second is no smaller.
        form: ``any``: a value, or a list or a mapping of values, where something else checks which;
            ``one``: a value alone; ``mapping``: values by name, none of them None.
        expected: what was expected in words, for the message; made from the rest if empty.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    one_of: Sequence[Any] | None = None
    pattern: str = ""
    integer: bool = False
    pair: bool = False
    ordered: bool = False
    form: str = "any"
    expected: str = ""

    def holds(self, value: Any) -> bool:
        """Return whether a single value lies within."""
        if self.one_of is not None:
            return any(type(value) is type(one) and value == one for one in self.one_of)
        if self.pattern:
            return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None
        if isinstance(value, bool) or not isinstance(value, Integral if self.integer else Real):
            return False
        # An integer is compared as it is: the nearest float of a large one may lie beyond.
        number: Any = value if isinstance(value, Integral) else float(value)
        if not self.low <= number <= self.high or number in (math.inf, -math.inf):
            return False
        return not (self.above and number == self.low) and not (self.below and number == self.high)

    def words(self, value: Any = None) -> str:
        """Return what was expected in place of ``value``, as messages end."""
        if self.expected:
            return self.expected
        if self.one_of is not None:
            return f"one of {list(self.one_of)}"
        kind = "an integer, " if self.integer and not isinstance(value, int) else ""
        if self.pair or self.ordered:
            kind = f"two {'integers' if self.integer else 'numbers'}{' in order' * self.ordered}, "
        if math.isinf(self.high):
            if math.isinf(self.low):
                return "a finite number"
            if self.above and self.low == 0 and not kind:
                return "a positive number"
            return (
                f"{kind}above {_digits(self.low)}"
                if self.above
                else f"{kind}{_digits(self.low)} or more"
            )
        most = f"below {_digits(self.high)}" if self.below else _digits(self.high)
        if self.above:
            return f"{kind}above {_digits(self.low)} and {'' if self.below else 'up to '}{most}"
        return f"{kind}{_digits(self.low)} to {most}"

    def check(self, name: str, value: Any, error: type[Exception] = ConfigError) -> None:
        """Refuse a value, or one inside a list or a mapping, that does not lie within.

        Raises:
            error: naming it, what came and what was expected.
        """
        if value is None and not (self.form == "one" and self.one_of is not None):
            return
        if self.form == "mapping" and not isinstance(value, Mapping):
            raise error(f"{name} is a {type(value).__name__}; expected numbers by name")
        if self.pair or self.ordered:
            numbers = list(value) if isinstance(value, (list, tuple)) else []
            if len(numbers) != 2 or not all(map(self.holds, numbers)) or self._reversed(numbers):
                raise error(f"{name} is {numbers or shown(value)}; expected {self.words(value)}")
            return
        inside: Any = [("", value)]
        if isinstance(value, Mapping) and self.form != "one":
            inside = value.items()
        elif isinstance(value, (list, tuple)) and self.form != "one":
            inside = enumerate(value)
        for part, one in inside:
            if not self.holds(one) and (one is not None or self.form != "any"):
                where = name if part == "" else f"{name}.{part}"
                if self.form == "mapping":
                    where = f"{name} of {part!r}"
                raise error(f"{where} is {shown(one)}; expected {self.words(one)}")

    def _reversed(self, pair: list[Any]) -> bool:
        return self.ordered and pair[0] > pair[1]


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
        default_factory: as ``default``.
        **bound: attributes of ``Bound`` in place of ``within``; without either the field is not
            checked.
    """
    metadata: dict[str, Any] = {"bound": Bound(**bound) if bound else within}
    if help:
        metadata["help"] = help
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_bounds(options: Any, where: str = "", error: type[Exception] = ConfigError) -> None:
    """Check every field of a dataclass that declares a bound, and those of dataclasses inside it.

    Args:
        options: the instance.
        where: before the names of fields in messages, with its dot: "schedule.".
        error: the class of the error.
    """
    for one in fields(options):
        bound = one.metadata.get("bound")
        value = getattr(options, one.name)
        if bound is not None:
            bound.check(f"{where}{one.name}", value, error)
        elif is_dataclass(value):
            check_bounds(value, f"{where}{one.name}.", error)


def _digits(number: float) -> str:
    """Return all digits of an integer, and of another number those that count."""
    return str(number) if isinstance(number, int) else f"{number:g}"


def shown(value: Any) -> str:
    """Return a value as messages show it; of a long one its kind, as of a tensor."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"
