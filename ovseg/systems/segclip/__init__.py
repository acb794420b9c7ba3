"""SegCLIP: ``System``, the model, and ``Objective``, what trains it."""

from .model import SegCLIP as System
from .objective import SegCLIPObjective as Objective

__all__ = ["Objective", "System"]
