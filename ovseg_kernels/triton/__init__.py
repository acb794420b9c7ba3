"""Triton kernels, none of which is imported, nor Triton, before an operator is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable

# Schema -> module and function. A table, so that what exists is known without importing Triton.
KERNELS = {
    "patch_text_similarity": ("patch_text_similarity", "forward"),
    "patch_text_similarity_backward": ("patch_text_similarity", "backward"),
    "similarity_contrastive_stats": ("similarity_contrastive_loss", "stats"),
    "similarity_contrastive_loss_backward": ("similarity_contrastive_loss", "backward"),
    "contrastive_stats": ("contrastive_loss", "stats"),
    "contrastive_loss_backward": ("contrastive_loss", "backward"),
    "dense_contrastive_select": ("dense_contrastive_loss", "select"),
    "dense_contrastive_gather": ("dense_contrastive_loss", "gather"),
    "dense_contrastive_gather_backward": ("dense_contrastive_loss", "backward"),
    "center_assignment": ("center_assignment", "forward"),
    "center_assignment_backward": ("center_assignment", "backward"),
    "grouped_inverse_std": ("segclip_center_assignment", "forward"),
    "grouped_inverse_std_backward": ("segclip_center_assignment", "backward"),
}


def _late(module: str, function: str) -> Callable:
    def call(*args):
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(*args)

    return call


IMPLEMENTATIONS = {schema: _late(*place) for schema, place in KERNELS.items()}
