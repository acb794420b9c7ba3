"""A ViT's block with a packed projection, for pictures [B, L, D] and for packed texts [N, D]; stochastic depth.

Parameter names are those of timm and of the published checkpoints of GroupViT and OVSegmentor.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .attention import attention
from .block import AttentionBlock
from .packing import Packing
from .quick_gelu import quick_gelu_linear

ACTIVATIONS = ("gelu", "quick_gelu")


def drop_path(branch: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """A residual branch [B, ...] left out for a share ``rate`` of the rows, the others scaled up to keep the mean."""
    if not rate or not training:
        return branch
    kept = torch.empty(len(branch), *[1] * (branch.dim() - 1), dtype=branch.dtype, device=branch.device).bernoulli_(1 - rate)
    return branch * kept / (1 - rate)


class Mlp(nn.Module):
    """Two layers, ``width`` to ``hidden`` to ``out`` (``width`` if None)."""

    def __init__(self, width: int, hidden: int, out: int | None = None, act: str = "gelu"):
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"act is {act!r}; expected one of {list(ACTIVATIONS)}")
        self.fc1, self.fc2, self.act = nn.Linear(width, hidden), nn.Linear(hidden, width if out is None else out), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x)
        if self.act == "quick_gelu":
            return quick_gelu_linear(hidden, self.fc2.weight, self.fc2.bias)
        return self.fc2(F.gelu(hidden))


class _Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)


class VitBlock(AttentionBlock):
    """Norm before attention and MLP.

    Args:
        width, heads: D and the number of heads, which no tensor shows.
        hidden: width of the MLP.
        drop_path: share of the rows that a branch is left out for in training; both branches have one rate.
        act: ``gelu`` (erf) or ``quick_gelu``.
    """

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float = 0.0, act: str = "gelu"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width} and heads {heads}; expected a whole number of channels a head")
        self.heads, self.rate = heads, drop_path
        self.norm1, self.attn = nn.LayerNorm(width), _Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, hidden, act=act)

    @property
    def norm_1(self) -> nn.Module:  # type: ignore[override]
        return self.norm1

    def project(self, normed: torch.Tensor, rope: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.attn.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, o: torch.Tensor) -> torch.Tensor:
        return drop_path(self.attn.proj(o.transpose(1, 2).flatten(2)), self.rate, self.training)

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return drop_path(self.mlp(self.norm2(x)), self.rate, self.training)


class PackedBlock(VitBlock):
    """The block of a text tower: over packed tokens [N, D], attention within each text."""

    def __init__(self, width: int, heads: int, hidden: int, act: str = "gelu", causal: bool = False):
        super().__init__(width, heads, hidden, act=act)
        self.causal = causal

    def forward(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:  # type: ignore[override]
        q, k, v = packing.pad(self.attn.qkv(self.norm1(x))).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Causal attention never looks at the padding behind a text.
        mask = None if self.causal else packing.seen[:, None, None, :]
        o = packing.take(attention(q, k, v, mask=mask, causal=self.causal, backend=self.attention_backend).transpose(1, 2).flatten(2))
        x = x + self.attn.proj(o)
        return x + self.mlp(self.norm2(x))
