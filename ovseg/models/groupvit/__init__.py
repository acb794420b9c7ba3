"""GroupViT."""

from .model import GroupViT as System

__all__ = ["System"]
