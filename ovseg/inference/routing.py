"""Flat options, ``crop=448, background_threshold=0.2``, to the one of the three values that has a field of that name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any

from ..errors import InputError
from .decisions import Decision, rule, rule_names
from .queries import Queries
from .view import View


def option_names(value: type | Any) -> list[str]:
    """The fields of a value that callers set by name. The label set is given apart."""
    return [field.name for field in fields(value) if field.name != "labels"]


def route(options: Mapping[str, Any], view: View, queries: Queries, decision: Decision) -> tuple[View, Queries, Decision]:
    """The three values with ``options`` changed.

    Raises:
        InputError: for an option that none of them has, naming the closest or the rule of labelling that has it; for values that cannot be.
    """
    values = {"view": view, "queries": queries, "decision": decision}
    owner = {name: part for part, value in values.items() for name in option_names(value)}
    given: dict[str, dict[str, Any]] = {part: {} for part in values}
    for name, value in options.items():
        if name not in owner:
            raise _refusal(name, value, decision, sorted(owner))
        given[owner[name]][name] = value
    changed: dict[str, Any] = {part: replace(value, **given[part]) if given[part] else value  # type: ignore[type-var]
                               for part, value in values.items()}
    return changed["view"], changed["queries"], changed["decision"]


def _refusal(name: str, value: Any, decision: Decision, known: list[str]) -> InputError:
    others = [other for other in rule_names() if name in option_names(rule(other))]
    if others:
        return InputError(f"{name} is {value!r}, an option of the rule of labelling {' and '.join(others)}; this model labels by "
                          f"{decision.name}, whose options are {', '.join(option_names(decision))}")
    close = get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}? Expected" if close else "expected"
    return InputError(f"unknown option {name!r}; {hint} some of {known}")
