"""PACL's vision embedder: the only trained module of the system."""

from __future__ import annotations

import torch
from torch import nn


class VisionEmbedder(nn.Module):
    """Residual block from token width to text width: ``skip(x) + out(relu(hidden(x)))``, the paper's appendix A.1.

    Shapes: [..., D_v] to [..., D]. For ViT-B/16 (768, 512) it has 1 050 112 parameters.
    """

    def __init__(self, token_dim: int, embed_dim: int, hidden_dim: int | None = None):
        super().__init__()
        hidden_dim = hidden_dim or embed_dim
        self.hidden = nn.Linear(token_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, embed_dim)
        self.skip = nn.Linear(token_dim, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.skip(x) + self.out(torch.relu(self.hidden(x)))
