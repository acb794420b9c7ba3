"""Pictures in, label maps out."""

from .predictor import Predictor, segment
from .segmentation import Segmentation
from .settings import Settings

__all__ = ["Predictor", "Segmentation", "Settings", "segment"]
