"""Objectives, which train a system: the public names of ``ovseg.systems.objective``."""

from .systems.objective import Losses, Objective, Progress, Rows, create_objective, list_objectives

__all__ = ["Losses", "Objective", "Progress", "Rows", "create_objective", "list_objectives"]
