"""Deep prompts: learned tokens in front of every block of a frozen ViT (VPT, Jia et al.,
arXiv:2203.12119), as ZegCLIP tunes CLIP.

    P_i = dropout(W e_i + b)                 e_i [T, D] of block i, one W for all                (1)
    x   = block_i([x_0; P_i; x_1 .. x_N])    and its T outputs are replaced by P_{i+1}           (2)

Nobody reads the outputs of (2) at the prompts, so there a block has to give keys and values only:

    x = x + attention(Q(x), [K(P_i); K(x)], [V(P_i); V(x)]), then x + mlp(x), for the class token and patches alone      (3)

the same numbers without the prompts' queries, output projections and MLP. K(P_i) and V(P_i) depend
on parameters only: in evaluation they are computed once.

Masks of classes from patches: queries made of texts look at the patches, and the last attention's
scores are the masks.

    q_c = W1 (g * t_c) + W2 t_c + b              relationship descriptor of picture g and text t_c [E]             (1)
    q   = LN2(q + drop(O attend(q, F)));  q = LN3(q + drop(W'' drop(relu(W' q))))      in all layers but the last  (2)
    mask_c(n) = mean over heads of Q_h(q_c) . K_h(F_n) / sqrt(d) = Q(q_c) . K(F_n) / (heads sqrt(d))     the last  (3)
              = (Q(q_c) W_K) . F_n / (heads sqrt(d)) + Q(q_c) . b_K / (heads sqrt(d))            (4)

(4) is one product with the patches for all heads. W2 t_c + b depends on the vocabulary only. The
decoder is that of ZegCLIP (arXiv:2212.03588), after SegViT (arXiv:2210.05844), without the parts
that it holds and never uses. Parameter names are those of the published checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ...nn.blocks import AttentionBlock, attention
from ...nn.tensors import Kept


class DeepPrompts(nn.Module):
    """The prompts of (1), and the norm over what the last block gives.

    Args:
        depth: blocks of the tower.
        count: T.
        width: D.
        patch_size: of the tower; the prompts are drawn as VPT draws them.
        dropout: of (1), another mask for each picture.
    """

    def __init__(self, depth: int, count: int, width: int, patch_size: int, dropout: float = 0.1):
        super().__init__()
        self.bound = math.sqrt(6 / (3 * patch_size * patch_size + width))
        self.embeddings = nn.Parameter(
            torch.empty(depth, count, width).uniform_(-self.bound, self.bound)
        )
        self.proj = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.proj.weight, mode="fan_out")
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = dropout
        self._kept = Kept()

    def resize(self, count: int) -> None:
        """Fresh prompts, so many tokens of each."""
        depth, _, width = self.embeddings.shape
        fresh = (
            self.embeddings.detach()
            .new_empty(depth, count, width)
            .uniform_(-self.bound, self.bound)
        )
        self.embeddings = nn.Parameter(fresh, requires_grad=self.embeddings.requires_grad)

    def _apply(self, fn, recurse=True):
        self._kept.clear()
        return super()._apply(fn, recurse)

    def forward(self, batch: int) -> torch.Tensor:
        """(1): [depth, 1, T, D], or [depth, batch, T, D] where dropout is on."""
        x = self.proj(self.embeddings)[:, None]
        if not self.training or self.dropout == 0:
            return x
        return F.dropout(x.expand(-1, batch, -1, -1), self.dropout)

    def run(self, blocks: Sequence[AttentionBlock], x: torch.Tensor) -> torch.Tensor:
        """(3) over all blocks: [B, 1 + N, D] to the same, before the norm."""
        prefixes: Sequence[torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
        if self.training or torch.is_grad_enabled():
            prefixes = self(len(x)).unbind(
                0
            )  # blocks project them: sharded parameters are whole inside of a block alone
        else:
            made_of = [*self.parameters(), *(p for block in blocks for p in block.parameters())]
            prefixes = self._kept(made_of, lambda: self._keys_values(blocks))
        for block, prefix in zip(blocks, prefixes, strict=True):
            x = block(x, prefix=prefix)
        return x

    def _keys_values(
        self, blocks: Sequence[AttentionBlock]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            block.keys_values(block.norm_1(prompts))
            for block, prompts in zip(blocks, self(1), strict=True)
        ]


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
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (attn.q(queries), attn.k(patches), attn.v(patches))
        )
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
        return torch.baddbmm(
            (q @ attn.k.bias)[..., None], q @ attn.k.weight, patches.transpose(1, 2)
        )


class ClassDecoder(nn.Module):
    """Layers of (2), one of (4).

    Args:
        width: E.
        heads: of each attention.
        layers: of both kinds; they begin alike, as published.
        hidden: of the MLPs.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int = 3,
        hidden: int | None = None,
        dropout: float = 0.1,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads is {heads}; expected a divisor of {width}, the width of texts")
        if layers < 1:
            raise ValueError(f"decoder_layers is {layers}; expected at least 1")
        self.layers = nn.ModuleList(
            DecoderLayer(width, heads, hidden or 4 * width, dropout) for _ in range(layers - 1)
        )
        self.layers.append(MaskLayer(width, heads))
        first = self.layers[0].state_dict()
        for layer in self.layers:
            layer.load_state_dict({name: first[name] for name in layer.state_dict()})

    def forward(self, queries: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Mask logits [B, C, N] of queries [B, C, E] over patches [B, N, E]."""
        for layer in self.layers[:-1]:
            queries = layer(queries, patches)
        return self.layers[-1](queries, patches)
