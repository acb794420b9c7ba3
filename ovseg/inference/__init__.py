"""Pictures in, label maps out: how a picture is seen (``View``), what is asked (``Queries``), how it is decided (``decisions``)."""

from .decisions import Decision
from .decisions.groups import GroupTables
from .decisions.masks import ClassMasks
from .decisions.patches import PatchArgmax
from .decisions.units import SemanticUnits
from .predictor import Predictor, segment
from .queries import Queries
from .segmentation import Segmentation
from .view import View

__all__ = ["ClassMasks", "Decision", "GroupTables", "PatchArgmax", "Predictor", "Queries", "Segmentation", "SemanticUnits", "View",
           "segment"]
