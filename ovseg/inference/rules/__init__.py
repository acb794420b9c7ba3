"""Rules of labelling, a file each.

A model names its rule by the file, ``model.decision``; each file calls its rule ``Rule``.
"""

from __future__ import annotations

from ...errors import InputError
from ...registration import Registry, modules
from ...systems import OVSegModel
from .base import Decision

RULES: Registry[type[Decision]] = Registry(
    "decision", lambda: modules(__name__, "Rule"), InputError
)


def rule_names() -> list[str]:
    """Return the names of the rules: those of the files beside this one."""
    return list(RULES)


def rule(name: str) -> type[Decision]:
    """Return the rule of a file.

    Raises:
        InputError: if there is none of this name.
    """
    return RULES[name]


def rule_of(model: OVSegModel) -> Decision:
    """Return the rule of a model, with the model's own choices and the rule's defaults."""
    return rule(model.decision)(**model.decision_options)


__all__ = ["Decision", "rule", "rule_names", "rule_of"]
