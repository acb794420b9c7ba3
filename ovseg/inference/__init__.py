"""Pictures in, label maps out.

How a picture is seen is a ``View``, what is asked are ``Queries``, how it is decided is a
``Decision``, one of ``rules``.
"""

from .predictor import Predictor, segment
from .queries import Queries
from .rules import Decision
from .rules.groups import GroupTables
from .rules.masks import ClassMasks
from .rules.patches import PatchArgmax
from .rules.units import SemanticUnits
from .segmentation import Segmentation
from .view import View

__all__ = [
    "ClassMasks",
    "Decision",
    "GroupTables",
    "PatchArgmax",
    "Predictor",
    "Queries",
    "Segmentation",
    "SemanticUnits",
    "View",
    "segment",
]
