"""Pictures in, label maps out."""

from .predictor import Predictor, Segmentation, segment

__all__ = ["Predictor", "Segmentation", "segment"]
