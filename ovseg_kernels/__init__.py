"""Fused, differentiable operators for dense image-text learning."""

from . import _backends, distributed, philox, results
from ._backends import available_backends, backend, explain
from ._checking import check_errors, checking
from ._library import BackendError
from ._version import __version__
from .ops.center_assignment import center_assignment
from .ops.contrastive_loss import contrastive_loss
from .ops.dense_contrastive_loss import dense_contrastive_loss, select_pixels
from .ops.folded_center_assignment import folded_center_assignment
from .ops.patch_text_similarity import patch_text_similarity
from .ops.segclip_center_assignment import segclip_center_assignment
from .ops.similarity_contrastive_loss import similarity_contrastive_loss
from .ops.upsample_argmax import upsample_argmax
from .ops.upsample_mask_loss import upsample_mask_loss
from .ops.window_argmax import window_argmax

OPERATORS = (
    "patch_text_similarity",
    "similarity_contrastive_loss",
    "center_assignment",
    "folded_center_assignment",
    "segclip_center_assignment",
    "contrastive_loss",
    "dense_contrastive_loss",
    "upsample_argmax",
    "upsample_mask_loss",
    "window_argmax",
)

__all__ = [
    "OPERATORS",
    "BackendError",
    "__version__",
    "available_backends",
    "backend",
    "center_assignment",
    "check_errors",
    "checking",
    "contrastive_loss",
    "dense_contrastive_loss",
    "distributed",
    "explain",
    "folded_center_assignment",
    "patch_text_similarity",
    "philox",
    "results",
    "segclip_center_assignment",
    "select_pixels",
    "similarity_contrastive_loss",
    "upsample_argmax",
    "upsample_mask_loss",
    "window_argmax",
]

_backends.start()
