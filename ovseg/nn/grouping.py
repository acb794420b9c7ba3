"""The grouping block of GroupViT (Xu et al., arXiv:2202.11094) and OVSegmentor (Xu et al.,
arXiv:2301.09121): learned tokens become G groups, the groups look at the patches, then every patch
goes to one group.

    x' = LN_x(x);  g_0 = LN_post(M(LN_tok(t)^T)^T)              M mixes the T tokens to G, channel by channel    (1)
    g_1 = g_0 + MHA(g_0, x', x');  g_2 = LN_c(g_1 + MLP(LN_2(g_1)))                              (2)
    pooled, index, soft = folded_center_assignment(W_q g_2 + b_q, x', ...)      mean_plus_one, scale 1 / sqrt(D) (3)
    o = W_o pooled + b_o + g_2;  out = o + MLP(LN_new(o))                                        (4)

(3) is hard with a straight-through gradient, with Gumbel noise in training. In (2), as in (3), the
projections of keys and values move to the side of the queries where that is less work, exactly:

    q_h . (W_K,h x + b_K,h) = (W_K,h^T q_h) . x + q_h . b_K,h        sum_l a_l (W_V,h x_l + b_V,h) = W_V,h sum_l a_l x_l + b_V,h

Parameter names are those of the published checkpoints.

The image tower of GroupViT (arXiv:2202.11094) and OVSegmentor (arXiv:2301.09121): a ViT in stages,
grouping blocks between them.

A stage puts learned group tokens behind its tokens, runs its blocks over both, and a grouping block
makes fewer tokens of them. GroupViT: 196 patches, 64 groups, 8 groups; OVSegmentor: 196 patches, 8
groups. Over several stages the maps multiply, A = A_2 A_1.

Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

import ovseg_kernels as ok

from .blocks import LOCAL_PATCH, LocalBlock, attention, local_stem
from .vit_blocks import Mlp, VitBlock, resize_positions


class Grouped(NamedTuple):
    """``tokens`` [B, G, D] of (4); ``index`` [B, L]; ``soft`` [B, G, L] without noise; ``queries``
    [B, G, D], W_q g_2 + b_q.
    """

    tokens: torch.Tensor
    index: torch.Tensor
    soft: torch.Tensor
    queries: torch.Tensor


class Projections(nn.Module):
    """Queries, keys, values and what comes after, a linear layer each."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.proj = (
            nn.Linear(width, width) for _ in range(4)
        )


class CrossBlock(nn.Module):
    """(2): attention to ``keys`` and an MLP, norms after the branches."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width is {width} and heads {heads}; expected a whole number of channels a head"
            )
        self.heads = heads
        self.attn, self.norm2, self.mlp, self.norm_post = (
            Projections(width),
            nn.LayerNorm(width),
            Mlp(width, hidden),
            nn.LayerNorm(width),
        )

    def forward(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """``x`` [B, G, D], ``keys`` [B, L, D]."""
        x = x + self.attn.proj(self._attend(x, keys))
        return self.norm_post(x + self.mlp(self.norm2(x)))

    def _attend(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        (G, D), L, heads = x.shape[1:], keys.shape[1], self.heads
        q = self.attn.q_proj(x).unflatten(2, (heads, -1)).transpose(1, 2)
        if G * (D + heads * L) >= L * (
            D + G
        ):  # products of D: keys and values of all tokens, against folded queries and their values
            k, v = (
                layer(keys).unflatten(2, (heads, -1)).transpose(1, 2)
                for layer in (self.attn.k_proj, self.attn.v_proj)
            )
            return attention(q, k, v).transpose(1, 2).flatten(2)
        of_key, of_value = (
            layer.weight.unflatten(0, (heads, -1)) for layer in (self.attn.k_proj, self.attn.v_proj)
        )
        q = q * (D // heads) ** -0.5
        constant = torch.einsum(
            "bhgd,hd->bhg", q, self.attn.k_proj.bias.unflatten(0, (heads, -1))
        )  # cancels, but for rounding
        folded = torch.einsum("bhgd,hdi->bhgi", q, of_key).flatten(1, 2)
        weights = (
            (folded @ keys.transpose(1, 2) + constant.flatten(1)[..., None])
            .softmax(-1)
            .to(keys.dtype)
        )
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

    def __init__(
        self, width: int, heads: int, tokens: int, groups: int, token_hidden: int, hidden: int
    ):
        super().__init__()
        self.norm_tokens, self.norm_post_tokens, self.norm_x, self.norm_new_x = (
            nn.LayerNorm(width) for _ in range(4)
        )
        self.mlp_inter = Mlp(tokens, token_hidden, groups)
        self.pre_assign_attn = CrossBlock(width, heads, hidden)
        self.assign = Projections(width)
        self.mlp_channels = Mlp(width, hidden)
        self.groups, self.scale = groups, width**-0.5

    def centers(self, x: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(g_2 [B, G, D] of (2), x' [B, L, D] of (1)) of patches ``x`` [B, L, D] and group
        ``tokens`` [B, T, D].
        """
        normed = self.norm_x(x)
        mixed = self.mlp_inter(self.norm_tokens(tokens).transpose(1, 2)).transpose(1, 2)
        return self.pre_assign_attn(self.norm_post_tokens(mixed), normed), normed

    def forward(
        self,
        x: torch.Tensor,
        tokens: torch.Tensor,
        noise: torch.Tensor | None = None,
        *,
        tau: float = 1.0,
        hard: bool = True,
        normalizer: str = "mean_plus_one",
    ) -> Grouped:
        """Patches into groups.

        Args:
            x: [B, L, D].
            tokens: [B, T, D].
            noise: Gumbel noise [B, G, L], or int64 [seed, offset] from which the operator draws it;
                None: none, as in evaluation.
            tau, hard, normalizer: of the assignment, see ``center_assignment``.
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

    def scores(self, queries: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """[B, G, L]: scaled products of projected queries, of whichever block, with this block's
        keys of x'.
        """
        key = self.assign.k_proj
        return self.scale * (
            (queries @ key.weight) @ normed.transpose(1, 2) + (queries @ key.bias)[..., None]
        )


_TOKEN_RATIO = 0.5  # of the width: the hidden layer of MLPs over tokens
POOLS = ("mean", "max")
Noise: TypeAlias = torch.Tensor | None


class VisionGroups(NamedTuple):
    """``groups`` [B, G, D] after the norm, ``pooled`` [B, D], their mean or maximum; ``grid``;
    ``stages``: what each grouping block gave.
    """

    groups: torch.Tensor
    pooled: torch.Tensor
    grid: tuple[int, int]
    stages: tuple[Grouped, ...]

    @property
    def index(self) -> torch.Tensor:
        """[B, L], the last stage's group of each patch."""
        index = self.stages[0].index
        for stage in self.stages[1:]:
            index = stage.index.gather(1, index)
        return index

    @property
    def soft(self) -> torch.Tensor:
        """[B, G, L], the product of the stages' soft maps."""
        soft = self.stages[0].soft
        for stage in self.stages[1:]:
            soft = stage.soft @ soft
        return soft


class _PatchEmbed(nn.Module):
    def __init__(self, width: int, patch_size: int, norm: bool):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        x = self.proj(images)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class _LocalEmbed(nn.Module):
    def __init__(self, width: int, depth: int):
        super().__init__()
        self.stem, self.local = (
            local_stem(width),
            nn.Sequential(*(LocalBlock(width) for _ in range(depth))),
        )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        # Channels last: the norm and the MLP of a local block then read the convolution in place.
        x = self.local(self.stem(images.contiguous(memory_format=torch.channels_last)))
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


class _TokenMixer(nn.Module):
    """Norm and an MLP over the tokens: [B, T, D] to [B, T', D]."""

    def __init__(self, width: int, tokens: int, out: int):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), Mlp(tokens, int(_TOKEN_RATIO * width), out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x).transpose(1, 2)).transpose(1, 2)


class Stage(nn.Module):
    """Blocks over tokens and ``tokens`` group tokens, and a grouping block into ``groups``; neither
    with 0 tokens. ``before``: group tokens of the stage before, from which those of this one are
    made too.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        rates: Sequence[float],
        tokens: int,
        groups: int,
        before: int = 0,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(VitBlock(width, heads, hidden, rate) for rate in rates)
        self.group_token: nn.Parameter | None = None
        self.downsample: GroupingBlock | None = None
        self.group_projector: _TokenMixer | None = None
        if tokens:
            self.group_token = nn.Parameter(torch.zeros(1, tokens, width))
            self.downsample = GroupingBlock(
                width, heads, tokens, groups, int(_TOKEN_RATIO * width), hidden
            )
            if before:
                self.group_projector = _TokenMixer(width, before, tokens)

    def tokens(
        self, x: torch.Tensor, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(x [B, L, D], group tokens [B, T, D]) after the blocks; ``before``: the group tokens of
        the stage before, after its own.
        """
        L = x.shape[1]
        if self.group_token is not None:
            own = self.group_token.to(x.dtype).expand(len(x), -1, -1)
            if self.group_projector is not None and before is not None:
                own = own + self.group_projector(before)
            x = torch.cat([x, own], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, :L], x[:, L:] if self.group_token is not None else None

    def forward(
        self, x: torch.Tensor, before: torch.Tensor | None, noise: Noise
    ) -> tuple[torch.Tensor, torch.Tensor | None, Grouped | None]:
        """(what the next stage sees, this stage's group tokens, what the grouping block gave)."""
        x, tokens = self.tokens(x, before)
        if self.downsample is None or tokens is None:
            return x, None, None
        grouped = self.downsample(x, tokens, noise)
        return grouped.tokens, tokens, grouped


class GroupingViT(nn.Module):
    """The tower of this file.

    Args:
        width, heads, hidden: D, heads of all attentions, width of the blocks' MLPs.
        depths: blocks of each stage.
        group_tokens: learned tokens of each stage; 0: no grouping.
        groups: what each grouping block makes, as many numbers as stages with group tokens.
        image_size, patch_size: in pixels; the table of positions is of this grid.
        patch_norm: a norm after the patches' convolution.
        drop_path: stochastic depth of the last block, rising from 0 in the first.
        local_depth: None for patches; else a convolution stem and so many local blocks, without
            positions: the tiny models.
        init_std: of linear layers in the beginning; None: 1 / sqrt(inputs). A narrow tower needs
            it: with 0.02 and 64 channels the logits of a grouping block begin at 0.02 beside noise
            of 1.3, and all groups take the same patches.
        pool: ``mean`` of the groups, as published, or elementwise ``max``, as in SegCLIP: what one
            group alone shows is not diluted, so that it pays to keep things apart.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        depths: Sequence[int],
        group_tokens: Sequence[int],
        groups: Sequence[int],
        image_size: int,
        patch_size: int,
        patch_norm: bool = False,
        drop_path: float = 0.0,
        local_depth: int | None = None,
        init_std: float | None = 0.02,
        pool: str = "mean",
    ):
        super().__init__()
        with_tokens = [count for count in group_tokens if count]
        if (
            len(depths) != len(group_tokens)
            or len(groups) != len(with_tokens)
            or not with_tokens
            or not group_tokens[0]
        ):
            raise ValueError(
                f"depths, group_tokens and groups are {list(depths)}, {list(group_tokens)} and "
                f"{list(groups)}; expected a "
                "depth and a number of group tokens a stage, tokens in the first, and groups for "
                "each stage with tokens"
            )
        if local_depth is not None and patch_size != LOCAL_PATCH:
            raise ValueError(
                f"patch_size is {patch_size} and local_depth {local_depth}; expected "
                f"{LOCAL_PATCH}, the step of the stem"
            )
        if pool not in POOLS:
            raise ValueError(f"pool is {pool!r}; expected one of {list(POOLS)}")
        self.pool = pool
        self.side, self.patch_size = image_size // patch_size, patch_size
        if local_depth is None:
            self.patch_embed: nn.Module = _PatchEmbed(width, patch_size, patch_norm)
            self.pos_embed = nn.Parameter(
                nn.init.trunc_normal_(torch.empty(1, self.side**2, width), std=0.02)
            )
        else:
            self.patch_embed, self.pos_embed = _LocalEmbed(width, local_depth), None
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        left, stages, before = list(groups), [], 0
        for i, (depth, tokens) in enumerate(zip(depths, group_tokens, strict=True)):
            first = sum(depths[:i])
            stages.append(
                Stage(
                    width,
                    heads,
                    hidden,
                    rates[first : first + depth],
                    tokens,
                    left.pop(0) if tokens else 0,
                    before,
                )
            )
            before = tokens
        self.layers, self.norm = nn.ModuleList(stages), nn.LayerNorm(width)
        self.layers.apply(partial(_initialize, std=init_std))
        nn.init.trunc_normal_(
            stages[0].group_token, std=0.02
        )  # those of later stages are made of these and begin at zero

    @property
    def blocks(self) -> list[VitBlock]:
        return [block for stage in self.layers for block in stage.blocks]

    @property
    def groupings(self) -> list[GroupingBlock]:
        return [stage.downsample for stage in self.layers if stage.downsample is not None]

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """(tokens [B, L, D] as the first block sees them, grid)."""
        x, grid = self.patch_embed(images)
        if self.pos_embed is not None:
            x = x + resize_positions(
                self.pos_embed[0], (self.side, self.side), grid, antialias=False, prefix=0
            )
        return x, grid

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        """(h, w) of the tokens of pictures of (H, W) pixels."""
        partial = (
            self.pos_embed is None
        )  # the stem sees what is left at the border, a convolution of patches does not
        height, width = (
            -(-side // self.patch_size) if partial else side // self.patch_size for side in size
        )
        return height, width

    def forward(self, images: torch.Tensor, noises: Sequence[Noise] | None = None) -> VisionGroups:
        """``images`` [B, 3, H, W], normalised; ``noises``: of each grouping block, see
        ``GroupingBlock``.
        """
        x, grid = self.embed(images)
        left, tokens, found = list(noises or ()), None, []
        for stage in self.layers:
            x, tokens, grouped = stage(
                x, tokens, left.pop(0) if left and stage.downsample is not None else None
            )
            if grouped is not None:
                found.append(grouped)
        groups = self.norm(x)
        return VisionGroups(
            groups, groups.mean(1) if self.pool == "mean" else groups.amax(1), grid, tuple(found)
        )

    def first_centers(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(projected queries [B, G, D], normed patches [B, L, D]) of the first grouping block;
        nothing behind it is computed.
        """
        x, _ = self.embed(images)
        x, tokens = self.layers[0].tokens(x, None)
        grouping = self.groupings[0]
        centers, normed = grouping.centers(x, tokens)
        return grouping.assign.q_proj(centers), normed


def _initialize(module: nn.Module, std: float | None) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5 if std is None else std)
        nn.init.zeros_(module.bias)
