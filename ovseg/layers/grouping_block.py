"""The grouping block of GroupViT (Xu et al., arXiv:2202.11094) and OVSegmentor (Xu et al., arXiv:2301.09121): learned tokens become G
groups, the groups look at the patches, then every patch goes to one group.

    x' = LN_x(x);  g_0 = LN_post(M(LN_tok(t)^T)^T)              M mixes the T tokens to G, channel by channel    (1)
    g_1 = g_0 + MHA(g_0, x', x');  g_2 = LN_c(g_1 + MLP(LN_2(g_1)))                                              (2)
    pooled, index, soft = folded_center_assignment(W_q g_2 + b_q, x', ...)      mean_plus_one, scale 1 / sqrt(D) (3)
    o = W_o pooled + b_o + g_2;  out = o + MLP(LN_new(o))                                                        (4)

(3) is hard with a straight-through gradient, with Gumbel noise in training. In (2), as in (3), the projections of keys and values move to
the side of the queries where that is less work, exactly:

    q_h . (W_K,h x + b_K,h) = (W_K,h^T q_h) . x + q_h . b_K,h        sum_l a_l (W_V,h x_l + b_V,h) = W_V,h sum_l a_l x_l + b_V,h

Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

import ovseg_kernels as ok

from .attention import attention
from .vit_block import Mlp


class Grouped(NamedTuple):
    """``tokens`` [B, G, D] of (4); ``index`` [B, L]; ``soft`` [B, G, L] without noise; ``queries`` [B, G, D], W_q g_2 + b_q."""

    tokens: torch.Tensor
    index: torch.Tensor
    soft: torch.Tensor
    queries: torch.Tensor


class Projections(nn.Module):
    """Queries, keys, values and what comes after, a linear layer each."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(width, width) for _ in range(4))


class CrossBlock(nn.Module):
    """(2): attention to ``keys`` and an MLP, norms after the branches."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width} and heads {heads}; expected a whole number of channels a head")
        self.heads = heads
        self.attn, self.norm2, self.mlp, self.norm_post = Projections(width), nn.LayerNorm(width), Mlp(width, hidden), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """``x`` [B, G, D], ``keys`` [B, L, D]."""
        x = x + self.attn.proj(self._attend(x, keys))
        return self.norm_post(x + self.mlp(self.norm2(x)))

    def _attend(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        (G, D), L, heads = x.shape[1:], keys.shape[1], self.heads
        q = self.attn.q_proj(x).unflatten(2, (heads, -1)).transpose(1, 2)
        if G * (D + heads * L) >= L * (D + G):  # products of D: keys and values of all tokens, against folded queries and their values
            k, v = (layer(keys).unflatten(2, (heads, -1)).transpose(1, 2) for layer in (self.attn.k_proj, self.attn.v_proj))
            return attention(q, k, v).transpose(1, 2).flatten(2)
        of_key, of_value = (layer.weight.unflatten(0, (heads, -1)) for layer in (self.attn.k_proj, self.attn.v_proj))
        q = q * (D // heads) ** -0.5
        constant = torch.einsum("bhgd,hd->bhg", q, self.attn.k_proj.bias.unflatten(0, (heads, -1)))  # cancels, but for rounding
        folded = torch.einsum("bhgd,hdi->bhgi", q, of_key).flatten(1, 2)
        weights = (folded @ keys.transpose(1, 2) + constant.flatten(1)[..., None]).softmax(-1).to(keys.dtype)
        seen = (weights @ keys).unflatten(1, (heads, G))
        return torch.einsum("bhgi,hdi->bghd", seen, of_value).flatten(2) + self.attn.v_proj.bias


class GroupingBlock(nn.Module):
    """The block of this file.

    Args:
        width: D.
        heads: of (2).
        tokens, groups: T and G.
        token_hidden, hidden: widths of the MLP over tokens and of those over channels.
    """

    def __init__(self, width: int, heads: int, tokens: int, groups: int, token_hidden: int, hidden: int):
        super().__init__()
        self.norm_tokens, self.norm_post_tokens, self.norm_x, self.norm_new_x = (nn.LayerNorm(width) for _ in range(4))
        self.mlp_inter = Mlp(tokens, token_hidden, groups)
        self.pre_assign_attn = CrossBlock(width, heads, hidden)
        self.assign = Projections(width)
        self.mlp_channels = Mlp(width, hidden)
        self.groups, self.scale = groups, width**-0.5

    def centers(self, x: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(g_2 [B, G, D] of (2), x' [B, L, D] of (1)) of patches ``x`` [B, L, D] and group ``tokens`` [B, T, D]."""
        normed = self.norm_x(x)
        mixed = self.mlp_inter(self.norm_tokens(tokens).transpose(1, 2)).transpose(1, 2)
        return self.pre_assign_attn(self.norm_post_tokens(mixed), normed), normed

    def forward(self, x: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor | None = None, *, tau: float = 1.0, hard: bool = True,
                normalizer: str = "mean_plus_one") -> Grouped:
        """Patches into groups.

        Args:
            x: [B, L, D].
            tokens: [B, T, D].
            noise: Gumbel noise [B, G, L], or int64 [seed, offset] from which the operator draws it; None: none, as in evaluation.
            tau, hard, normalizer: of the assignment, see ``center_assignment``.
        """
        centers, normed = self.centers(x, tokens)
        queries = self.assign.q_proj(centers)
        drawn = noise is not None and not noise.is_floating_point()
        pooled, index, soft = ok.folded_center_assignment(
            queries, normed, self.assign.k_proj.weight, self.assign.v_proj.weight, self.assign.k_proj.bias, self.assign.v_proj.bias,
            scale=self.scale, tau=tau, rng=noise if drawn else None, noise=None if drawn else noise, hard=hard, normalizer=normalizer,
            return_soft=True,
        )  # fmt: skip
        assert soft is not None
        out = self.assign.proj(pooled) + centers
        return Grouped(out + self.mlp_channels(self.norm_new_x(out)), index, soft, queries)

    def scores(self, queries: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """[B, G, L]: scaled products of projected queries, of whichever block, with this block's keys of x'."""
        key = self.assign.k_proj
        return self.scale * ((queries @ key.weight) @ normed.transpose(1, 2) + (queries @ key.bias)[..., None])
