"""SegCLIP."""

from .model import SegCLIP as System

__all__ = ["System"]
