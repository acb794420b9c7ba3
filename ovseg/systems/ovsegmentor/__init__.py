"""OVSegmentor: ``System``, the model, and ``Objective``, what trains it."""

from .model import OVSegmentor as System
from .objective import OVSegmentorObjective as Objective

__all__ = ["Objective", "System"]
