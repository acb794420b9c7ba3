"""PACL."""

from .model import PACL as System

__all__ = ["System"]
