"""The residual block that brings a frozen tower's patches to the space of the texts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VisionEmbedder(nn.Module):
    """Residual block from token width to text width, appendix A.1 of PACL.

    For ViT-B/16 (768, 512) it has 1 050 112 parameters.

    Args:
        token_dim: D_v.
        embed_dim: D.
        hidden_dim: of the layer in between; D if None.
        dropout: share of the hidden layer that is dropped before the output layer, in training.
    """

    def __init__(
        self, token_dim: int, embed_dim: int, hidden_dim: int | None = None, dropout: float = 0.0
    ):
        super().__init__()
        hidden_dim = hidden_dim or embed_dim
        self.hidden = nn.Linear(token_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, embed_dim)
        self.skip = nn.Linear(token_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D_v] to [..., D]."""
        return self.skip(x) + self.out(self.dropout(torch.relu(self.hidden(x))))
