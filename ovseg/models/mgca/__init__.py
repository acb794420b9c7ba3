"""MGCA, a reconstruction."""

from .model import MGCA as System

__all__ = ["System"]
