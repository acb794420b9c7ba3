"""Options of commands that label pictures: one for each field of ``View``, ``Queries`` and the rules of labelling that has a help text."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_args, get_type_hints


def add_inference_options(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("how pictures are seen, what is asked and how it is decided")
    for name, found in _fields().items():
        texts = dict.fromkeys(text for _, text in found)
        group.add_argument(f"--{name.replace('_', '-')}", type=found[0][0], help="; or ".join(texts).replace("%", "%%"))


def given_inference_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those that the command line names, as ``Predictor`` takes them."""
    given = {name: getattr(options, name) for name in _fields() if getattr(options, name) is not None}
    if "background" in given:
        given["background"] = tuple(text.strip() for text in given["background"].split(","))
    return given


def _fields() -> dict[str, list[tuple[type, str]]]:
    """Name -> (kind, help) of the fields of that name, which rules may share."""
    from ..inference import Queries, View
    from ..inference.decisions import rule, rule_names

    found: dict[str, list[tuple[type, str]]] = {}
    for value in (View, Queries, *(rule(name) for name in rule_names())):
        hints = get_type_hints(value)
        for field in fields(value):
            if "help" in field.metadata:
                found.setdefault(field.name, []).append((_kind(hints[field.name]), field.metadata["help"]))
    return found


def _kind(hint: Any) -> type:
    """int of ``int | None``; what is neither that nor a float is read as text."""
    kinds = get_args(hint) or (hint,)
    return next((kind for kind in (int, float) if kind in kinds), str)
