"""Deep prompts: learned tokens in front of every block of a frozen ViT (VPT, Jia et al., arXiv:2203.12119), as ZegCLIP tunes CLIP.

    P_i = dropout(W e_i + b)                 e_i [T, D] of block i, one W for all                             (1)
    x   = block_i([x_0; P_i; x_1 .. x_N])    and its T outputs are replaced by P_{i+1}                         (2)

Nobody reads the outputs of (2) at the prompts, so there a block has to give keys and values only:

    x = x + attention(Q(x), [K(P_i); K(x)], [V(P_i); V(x)]), then x + mlp(x), for the class token and patches alone      (3)

the same numbers without the prompts' queries, output projections and MLP. K(P_i) and V(P_i) depend on parameters only: in evaluation
they are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .block import AttentionBlock
from .kept import Kept


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
        self.embeddings = nn.Parameter(torch.empty(depth, count, width).uniform_(-self.bound, self.bound))
        self.proj = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.proj.weight, mode="fan_out")
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = dropout
        self._kept = Kept()

    def resize(self, count: int) -> None:
        """Fresh prompts, so many tokens of each."""
        depth, _, width = self.embeddings.shape
        fresh = self.embeddings.detach().new_empty(depth, count, width).uniform_(-self.bound, self.bound)
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
            prefixes = self(len(x)).unbind(0)  # blocks project them: sharded parameters are whole inside of a block alone
        else:
            made_of = [*self.parameters(), *(p for block in blocks for p in block.parameters())]
            prefixes = self._kept(made_of, lambda: self._keys_values(blocks))
        for block, prefix in zip(blocks, prefixes, strict=True):
            x = block(x, prefix=prefix)
        return x

    def _keys_values(self, blocks: Sequence[AttentionBlock]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [block.keys_values(block.norm_1(prompts)) for block, prompts in zip(blocks, self(1), strict=True)]
