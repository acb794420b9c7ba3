"""ZegCLIP: ``System``, the model, and ``Objective``, what trains it."""

from .model import ZegCLIP as System
from .objective import ZegCLIPObjective as Objective

__all__ = ["Objective", "System"]
