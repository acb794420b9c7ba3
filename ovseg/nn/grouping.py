"""The grouping block of GroupViT and OVSegmentor: learned tokens become G groups.

The groups look at the patches, then every patch goes to one group (Xu et al., arXiv:2202.11094; Xu
et al., arXiv:2301.09121).

    x' = LN_x(x);  g_0 = LN_post(M(LN_tok(t)^T)^T)     M mixes the T tokens to G, by channel     (1)
    g_1 = g_0 + MHA(g_0, x', x');  g_2 = LN_c(g_1 + MLP(LN_2(g_1)))                              (2)
    pooled, index, soft = folded_center_assignment(W_q g_2 + b_q, x', ...)                       (3)
    o = W_o pooled + b_o + g_2;  out = o + MLP(LN_new(o))                                        (4)

(3) has the normalizer mean_plus_one and the scale 1 / sqrt(D), and is hard with a straight-through
gradient, with Gumbel noise in training. In (2), as in (3), the projections of keys and values move
to the side of the queries where that is less work, exactly:

    q_h . (W_K,h x + b_K,h) = (W_K,h^T q_h) . x + q_h . b_K,h                                    (5)
    sum_l a_l (W_V,h x_l + b_V,h) = W_V,h sum_l a_l x_l + b_V,h                                  (6)

Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import ovseg_kernels as ok

from .blocks import attention
from .vit_blocks import Mlp


class Grouped(NamedTuple):
    """Groups of pictures, as a grouping block gives them.

    Attributes:
        tokens: [B, G, D] of (4).
        index: [B, L], the group of each patch.
        soft: [B, G, L], its shares without noise.
        queries: [B, G, D], W_q g_2 + b_q of (3).
    """

    tokens: Tensor
    index: Tensor
    soft: Tensor
    queries: Tensor


class Projections(nn.Module):
    """Linear layers for queries, keys, values and what comes after."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)


class CrossBlock(nn.Module):
    """Attention to ``keys`` and an MLP, norms after the branches, (2)."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width is {width} and heads {heads}; expected a whole number of channels a head"
            )
        self.heads = heads
        self.attn = Projections(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)
        self.norm_post = nn.LayerNorm(width)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """Let ``x`` [B, G, D] look at ``keys`` [B, L, D]."""
        x = x + self.attn.proj(self._attend(x, keys))
        return self.norm_post(x + self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, keys: Tensor) -> Tensor:
        G, D = x.shape[1:]
        L = keys.shape[1]
        heads = self.heads
        q = self.attn.q_proj(x).unflatten(2, (heads, -1)).transpose(1, 2)
        # Products of D: keys and values of all tokens, against folded queries and their values.
        if G * (D + heads * L) >= L * (D + G):
            k, v = (
                layer(keys).unflatten(2, (heads, -1)).transpose(1, 2)
                for layer in (self.attn.k_proj, self.attn.v_proj)
            )
            return attention(q, k, v).transpose(1, 2).flatten(2)
        of_key, of_value = (
            layer.weight.unflatten(0, (heads, -1)) for layer in (self.attn.k_proj, self.attn.v_proj)
        )
        q = q * (D // heads) ** -0.5
        of_bias = self.attn.k_proj.bias.unflatten(0, (heads, -1))
        constant = torch.einsum("bhgd,hd->bhg", q, of_bias)  # cancels, but for rounding
        folded = torch.einsum("bhgd,hdi->bhgi", q, of_key).flatten(1, 2)
        scores = folded @ keys.transpose(1, 2) + constant.flatten(1)[..., None]
        seen = (scores.softmax(-1).to(keys.dtype) @ keys).unflatten(1, (heads, G))
        return torch.einsum("bhgi,hdi->bghd", seen, of_value).flatten(2) + self.attn.v_proj.bias


class GroupingBlock(nn.Module):
    """The grouping block, (1) to (4).

    Args:
        width: D.
        heads: of (2).
        tokens, groups: T and G.
        token_hidden, hidden: widths of the MLP over tokens and of those over channels.
    """

    def __init__(
        self, width: int, heads: int, tokens: int, groups: int, token_hidden: int, hidden: int
    ):
        super().__init__()
        self.norm_tokens = nn.LayerNorm(width)
        self.norm_post_tokens = nn.LayerNorm(width)
        self.norm_x = nn.LayerNorm(width)
        self.norm_new_x = nn.LayerNorm(width)
        self.mlp_inter = Mlp(tokens, token_hidden, groups)
        self.pre_assign_attn = CrossBlock(width, heads, hidden)
        self.assign = Projections(width)
        self.mlp_channels = Mlp(width, hidden)
        self.groups = groups
        self.scale = width**-0.5

    def centers(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return (g_2 [B, G, D] of (2), x' [B, L, D] of (1)).

        Args:
            x: patches [B, L, D].
            tokens: group tokens [B, T, D].
        """
        normed = self.norm_x(x)
        mixed = self.mlp_inter(self.norm_tokens(tokens).transpose(1, 2)).transpose(1, 2)
        return self.pre_assign_attn(self.norm_post_tokens(mixed), normed), normed

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        noise: Tensor | None = None,
        *,
        tau: float = 1.0,
        hard: bool = True,
        normalizer: str = "mean_plus_one",
    ) -> Grouped:
        """Gather patches into groups.

        Args:
            x: [B, L, D].
            tokens: [B, T, D].
            noise: Gumbel noise [B, G, L], or int64 [seed, offset] from which the operator draws it;
                None: none, as in evaluation.
            tau: of the assignment, see ``ovseg_kernels.center_assignment``.
            hard: whether it is straight-through.
            normalizer: of the sums over the patches of a group.
        """
        centers, normed = self.centers(x, tokens)
        queries = self.assign.q_proj(centers)
        drawn = noise is not None and not noise.is_floating_point()
        pooled, index, soft = ok.folded_center_assignment(
            queries,
            normed,
            self.assign.k_proj.weight,
            self.assign.v_proj.weight,
            self.assign.k_proj.bias,
            self.assign.v_proj.bias,
            scale=self.scale,
            tau=tau,
            rng=noise if drawn else None,
            noise=None if drawn else noise,
            hard=hard,
            normalizer=normalizer,
            return_soft=True,
        )
        assert soft is not None
        out = self.assign.proj(pooled) + centers
        return Grouped(out + self.mlp_channels(self.norm_new_x(out)), index, soft, queries)

    def scores(self, queries: Tensor, normed: Tensor) -> Tensor:
        """Return scaled products of queries with this block's keys of x', [B, G, L].

        Args:
            queries: [B, G, D], projected, of whichever block.
            normed: x' of (1).
        """
        key = self.assign.k_proj
        products = (queries @ key.weight) @ normed.transpose(1, 2)
        return self.scale * (products + (queries @ key.bias)[..., None])
