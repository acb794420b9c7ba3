"""Fused, differentiable operators for dense image-text learning."""

from ._backends import available_backends, backend, explain
from ._library import BackendError
from ._version import __version__
from .ops.patch_text_similarity import patch_text_similarity
from .ops.similarity_contrastive_loss import similarity_contrastive_loss

OPERATORS = ("patch_text_similarity", "similarity_contrastive_loss")

__all__ = [
    "OPERATORS",
    "BackendError",
    "__version__",
    "available_backends",
    "backend",
    "explain",
    "patch_text_similarity",
    "similarity_contrastive_loss",
]
