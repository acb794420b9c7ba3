"""CLIP and its dense readouts: ``System``, the model, and ``Objective``, what trains it."""

from .model import ClipDense as System
from .objective import ClipDenseObjective as Objective

__all__ = ["Objective", "System"]
