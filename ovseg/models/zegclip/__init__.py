"""ZegCLIP."""

from .model import ZegCLIP as System

__all__ = ["System"]
