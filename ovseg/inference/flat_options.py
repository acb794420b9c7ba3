"""Flat options, ``crop=448, background_threshold=0.2``, sorted into the three values.

Each goes to the one of ``View``, ``Queries`` and the rule of labelling that has such a field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from ..errors import InputError
from .queries import Queries
from .rules import Decision, rule, rule_names
from .view import View


def option_names(value: type | Any) -> list[str]:
    """Return the fields of a value that callers set by name; the label set is given apart."""
    return [field.name for field in fields(value) if field.name != "labels"]


def route(
    options: Mapping[str, Any], view: View, queries: Queries, decision: Decision
) -> tuple[View, Queries, Decision]:
    """Return the three values with ``options`` changed.

    Raises:
        InputError: for an option that none of them has, naming the closest or the rule of labelling
            that has it; for values that cannot be.
    """
    values: list[Any] = [view, queries, decision]
    owner = {name: i for i, value in enumerate(values) for name in option_names(value)}
    given: list[dict[str, Any]] = [{}, {}, {}]
    for name, value in options.items():
        if name not in owner:
            raise _refusal(name, value, decision, sorted(owner))
        given[owner[name]][name] = value
    view, queries, decision = (
        replace(value, **changes) if changes else value
        for value, changes in zip(values, given, strict=True)
    )
    return view, queries, decision


def _refusal(name: str, value: Any, decision: Decision, known: list[str]) -> InputError:
    """Return the error for an option that none of the three values has."""
    others = [other for other in rule_names() if name in option_names(rule(other))]
    if others:
        return InputError(
            f"{name} is {value!r}, an option of the rule of labelling {' and '.join(others)}; "
            f"this model labels by {decision.name}, whose options are "
            f"{', '.join(option_names(decision))}"
        )
    close = get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}? Expected" if close else "expected"
    return InputError(f"unknown option {name!r}; {hint} some of {known}")
