"""MGCA, a reconstruction: ``System``, the model, and ``Objective``, what trains it."""

from .model import MGCA as System
from .objective import MGCAObjective as Objective

__all__ = ["Objective", "System"]
