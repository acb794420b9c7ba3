"""CLIP and its dense readouts."""

from .model import ClipDense as System

__all__ = ["System"]
