"""The decoder that completes masked entities: a caption with its entities masked looks at the groups of its picture.

    t = LN_tok(tokens);  c = cross block of t on LN_x(groups), (2) of ``layers/grouping_block.py``                (1)
    y = LN_new(block(c) + c)                                                                                     (2)

The answer is read at the first token, [CLS], so (2) is computed there alone. Where padding is masked, nothing looks at it in (2); published
training had no mask there.
"""

from __future__ import annotations

import torch
from torch import nn

from ...layers.grouping_block import CrossBlock, Projections
from ...layers.vit_block import VitBlock


class _Layer(nn.Module):
    """``assign`` is computed by nobody: published files hold it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_tokens, self.norm_x, self.norm_new_x = (nn.LayerNorm(width) for _ in range(3))
        self.pre_assign_attn = CrossBlock(width, heads, 4 * width)
        self.post_attn = VitBlock(width, heads, 4 * width)
        self.assign = Projections(width)


class EntityDecoder(nn.Module):
    """The module of this file. ``text_width`` other than ``width``: tokens are projected first."""

    def __init__(self, width: int, text_width: int, heads: int = 8):
        super().__init__()
        self.blocks = nn.ModuleList([_Layer(width, heads)])
        self.align_proj_text = nn.Linear(text_width, width, bias=False) if text_width != width else None

    def forward(self, tokens: torch.Tensor, groups: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """[B, D] of tokens [B, L, text width] and groups [B, G, D]; ``seen`` [B, L] bool: the tokens that are no padding."""
        layer = self.blocks[0]
        if self.align_proj_text is not None:
            tokens = self.align_proj_text(tokens)
        mixed = layer.pre_assign_attn(layer.norm_tokens(tokens), layer.norm_x(groups))
        first = layer.post_attn(mixed, attn_mask=None if seen is None else seen[:, None, None, :], first=1)
        return layer.norm_new_x(first + mixed[:, :1])[:, 0]

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those that ``forward`` depends on."""
        return [p for name, p in self.named_parameters() if ".assign." not in name]
