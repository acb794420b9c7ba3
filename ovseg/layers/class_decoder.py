"""Masks of classes from patches: queries made of texts look at the patches, and the last attention's scores are the masks.

    q_c = W1 (g * t_c) + W2 t_c + b              relationship descriptor of picture g and text t_c [E]             (1)
    q   = LN2(q + drop(O attend(q, F)));  q = LN3(q + drop(W'' drop(relu(W' q))))      in all layers but the last  (2)
    mask_c(n) = mean over heads of Q_h(q_c) . K_h(F_n) / sqrt(d) = Q(q_c) . K(F_n) / (heads sqrt(d))     the last  (3)
              = (Q(q_c) W_K) . F_n / (heads sqrt(d)) + Q(q_c) . b_K / (heads sqrt(d))                              (4)

(4) is one product with the patches for all heads. W2 t_c + b depends on the vocabulary only. The decoder is that of ZegCLIP
(arXiv:2212.03588), after SegViT (arXiv:2210.05844), without the parts that it holds and never uses. Parameter names are those of the
published checkpoint.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .attention import attention
from .kept import Kept


class Descriptor(nn.Module):
    """(1), without the concatenation."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(2 * width, width)
        self._kept = Kept()

    def _apply(self, fn, recurse=True):
        self._kept.clear()
        return super()._apply(fn, recurse)

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """[B, C, E] of pictures [B, E] and texts [C, E]."""
        weight, bias = self.proj.weight, self.proj.bias
        of_both, of_text = weight.chunk(2, 1)
        half = self._kept((texts, weight, bias), lambda: F.linear(texts, of_text, bias))
        return F.linear(images[:, None] * texts, of_both) + half


class _Attention(nn.Module):
    """The projections of one attention; the last layer's has queries and keys only."""

    def __init__(self, width: int, last: bool):
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        if not last:
            self.v, self.proj = nn.Linear(width, width), nn.Linear(width, width)


class DecoderLayer(nn.Module):
    """(2)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.multihead_attn = _Attention(width, last=False)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, queries: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        attn, rate = self.multihead_attn, self.dropout if self.training else 0.0
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (attn.q(queries), attn.k(patches), attn.v(patches)))
        o = attn.proj(attention(q, k, v, dropout=rate).transpose(1, 2).flatten(2))
        queries = self.norm2(queries + F.dropout(o, rate))
        hidden = F.dropout(self.linear1(queries).relu(), rate)
        return self.norm3(queries + F.dropout(self.linear2(hidden), rate))


class MaskLayer(nn.Module):
    """(4)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.scale = 1 / (heads * (width // heads) ** 0.5)
        self.multihead_attn = _Attention(width, last=True)

    def forward(self, queries: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        attn = self.multihead_attn
        q = attn.q(queries) * self.scale
        return torch.baddbmm((q @ attn.k.bias)[..., None], q @ attn.k.weight, patches.transpose(1, 2))


class ClassDecoder(nn.Module):
    """Layers of (2), one of (4).

    Args:
        width: E.
        heads: of each attention.
        layers: of both kinds; they begin alike, as published.
        hidden: of the MLPs.
    """

    def __init__(self, width: int, heads: int, layers: int = 3, hidden: int | None = None, dropout: float = 0.1):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads is {heads}; expected a divisor of {width}, the width of texts")
        if layers < 1:
            raise ValueError(f"decoder_layers is {layers}; expected at least 1")
        self.layers = nn.ModuleList(DecoderLayer(width, heads, hidden or 4 * width, dropout) for _ in range(layers - 1))
        self.layers.append(MaskLayer(width, heads))
        first = self.layers[0].state_dict()
        for layer in self.layers:
            layer.load_state_dict({name: first[name] for name in layer.state_dict()})

    def forward(self, queries: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Mask logits [B, C, N] of queries [B, C, E] over patches [B, N, E]."""
        for layer in self.layers[:-1]:
            queries = layer(queries, patches)
        return self.layers[-1](queries, patches)
