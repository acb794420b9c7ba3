"""GroupViT: ``System``, the model, and ``Objective``, what trains it."""

from .model import GroupViT as System
from .objective import GroupViTObjective as Objective

__all__ = ["Objective", "System"]
