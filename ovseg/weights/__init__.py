"""Weights: where they come from, what files hold them, and how they are saved."""
