"""PACL: ``System``, the model, and ``Objective``, what trains it."""

from .model import PACL as System
from .objective import PACLObjective as Objective

__all__ = ["Objective", "System"]
