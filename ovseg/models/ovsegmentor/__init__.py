"""OVSegmentor."""

from .model import OVSegmentor as System

__all__ = ["System"]
