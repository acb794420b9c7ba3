"""ZegCLIP's deep prompts, and its decoder: masks of classes from patches.

Learned tokens stand in front of every block of the frozen ViT (VPT, Jia et al., arXiv:2203.12119):

    P_i = dropout(W e_i + b)                 e_i [T, D] of block i, one W for all                (1)
    x   = block_i([x_0; P_i; x_1 .. x_N])    and its T outputs are replaced by P_{i+1}           (2)

Nobody reads the outputs of (2) at the prompts, so there a block has to give keys and values only,
for the class token and patches alone:

    x = x + attention(Q(x), [K(P_i); K(x)], [V(P_i); V(x)]), then x + mlp(x)                     (3)

the same numbers without the prompts' queries, output projections and MLP. K(P_i) and V(P_i) depend
on parameters only: in evaluation they are computed once.

In the decoder queries made of texts look at the patches, and the last attention's scores are the
masks. With the relationship descriptor of picture g and text t_c [E], (5) in all layers but the
last, and (6) in the last:

    q_c = W1 (g * t_c) + W2 t_c + b                                                              (4)
    q   = LN2(q + drop(O attend(q, F)));  q = LN3(q + drop(W'' drop(relu(W' q))))                (5)
    mask_c(n) = mean over heads of Q_h(q_c) . K_h(F_n) / sqrt(d)                                 (6)
              = (Q(q_c) W_K) . F_n / (heads sqrt(d)) + Q(q_c) . b_K / (heads sqrt(d))            (7)

(7) is one product with the patches for all heads. W2 t_c + b depends on the vocabulary only. The
decoder is that of ZegCLIP (arXiv:2212.03588), after SegViT (arXiv:2210.05844), without the parts
that it holds and never uses. Parameter names are those of the published checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
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
        """Draw fresh prompts, so many tokens of each."""
        old = self.embeddings
        fresh = old.detach().new_empty(len(old), count, old.shape[2])
        fresh.uniform_(-self.bound, self.bound)
        self.embeddings = nn.Parameter(fresh, requires_grad=old.requires_grad)

    def _apply(self, fn, recurse=True):
        self._kept.clear()
        return super()._apply(fn, recurse)

    def forward(self, batch: int) -> Tensor:
        """Return (1), [depth, 1, T, D], or [depth, batch, T, D] where dropout is on."""
        x = self.proj(self.embeddings)[:, None]
        if not self.training or self.dropout == 0:
            return x
        return F.dropout(x.expand(-1, batch, -1, -1), self.dropout)

    def run(self, blocks: Sequence[AttentionBlock], x: Tensor) -> Tensor:
        """Run (3) over all blocks: [B, 1 + N, D] to the same, before the norm."""
        prefixes: Sequence[Tensor | tuple[Tensor, Tensor]]
        if self.training or torch.is_grad_enabled():
            # Blocks project them: sharded parameters are whole inside of a block alone.
            prefixes = self(len(x)).unbind(0)
        else:
            made_of = [*self.parameters(), *(p for block in blocks for p in block.parameters())]
            prefixes = self._kept(made_of, lambda: self._keys_values(blocks))
        for block, prefix in zip(blocks, prefixes, strict=True):
            x = block(x, prefix=prefix)
        return x

    def _keys_values(self, blocks: Sequence[AttentionBlock]) -> list[tuple[Tensor, Tensor]]:
        return [
            block.keys_values(block.norm_1(prompts))
            for block, prompts in zip(blocks, self(1), strict=True)
        ]


class Descriptor(nn.Module):
    """The relationship descriptor (4), without the published concatenation."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(2 * width, width)
        self._kept = Kept()

    def _apply(self, fn, recurse=True):
        self._kept.clear()
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the queries [B, C, E] of pictures [B, E] and texts [C, E]."""
        weight = self.proj.weight
        bias = self.proj.bias
        of_both, of_text = weight.chunk(2, 1)
        half = self._kept((texts, weight, bias), lambda: F.linear(texts, of_text, bias))
        return F.linear(images[:, None] * texts, of_both) + half


class _Attention(nn.Module):
    """The projections of one attention; the last layer's has queries and keys only."""

    def __init__(self, width: int, last: bool):
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        if not last:
            self.v = nn.Linear(width, width)
            self.proj = nn.Linear(width, width)


class DecoderLayer(nn.Module):
    """A layer of (5)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.multihead_attn = _Attention(width, last=False)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """Let queries [B, C, E] look at patches [B, N, E]."""
        attn = self.multihead_attn
        rate = self.dropout if self.training else 0.0
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (attn.q(queries), attn.k(patches), attn.v(patches))
        )
        o = attn.proj(attention(q, k, v, dropout=rate).transpose(1, 2).flatten(2))
        queries = self.norm2(queries + F.dropout(o, rate))
        hidden = F.dropout(self.linear1(queries).relu(), rate)
        return self.norm3(queries + F.dropout(self.linear2(hidden), rate))


class MaskLayer(nn.Module):
    """The last layer, (7)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.scale = 1 / (heads * (width // heads) ** 0.5)
        self.multihead_attn = _Attention(width, last=True)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """Return mask logits [B, C, N] of queries [B, C, E] over patches [B, N, E]."""
        attn = self.multihead_attn
        q = attn.q(queries) * self.scale
        constant = (q @ attn.k.bias)[..., None]
        return torch.baddbmm(constant, q @ attn.k.weight, patches.transpose(1, 2))


class ClassDecoder(nn.Module):
    """Layers of (5), one of (7).

    Args:
        width: E.
        heads: of each attention.
        layers: of both kinds; they begin alike, as published.
        hidden: of the MLPs; four times the width if None.
        dropout: of (5).
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
        self.layers = nn.ModuleList(
            DecoderLayer(width, heads, hidden or 4 * width, dropout) for _ in range(layers - 1)
        )
        self.layers.append(MaskLayer(width, heads))
        first = self.layers[0].state_dict()
        for layer in self.layers:
            layer.load_state_dict({name: first[name] for name in layer.state_dict()})

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """Return mask logits [B, C, N] of queries [B, C, E] over patches [B, N, E]."""
        for layer in self.layers[:-1]:
            queries = layer(queries, patches)
        return self.layers[-1](queries, patches)
