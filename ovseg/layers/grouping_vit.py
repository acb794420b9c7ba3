"""The image tower of GroupViT (arXiv:2202.11094) and OVSegmentor (arXiv:2301.09121): a ViT in stages, grouping blocks between them.

A stage puts learned group tokens behind its tokens, runs its blocks over both, and a grouping block makes fewer tokens of them. GroupViT:
196 patches, 64 groups, 8 groups; OVSegmentor: 196 patches, 8 groups. Over several stages the maps multiply, A = A_2 A_1.

Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from .grouping_block import Grouped, GroupingBlock
from .local_block import LOCAL_PATCH, LocalBlock, local_stem
from .positions import resize_positions
from .vit_block import Mlp, VitBlock

_TOKEN_RATIO = 0.5  # of the width: the hidden layer of MLPs over tokens
POOLS = ("mean", "max")
Noise: TypeAlias = torch.Tensor | None


class VisionGroups(NamedTuple):
    """``groups`` [B, G, D] after the norm, ``pooled`` [B, D], their mean or maximum; ``grid``; ``stages``: what each grouping block
    gave."""

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
        self.stem, self.local = local_stem(width), nn.Sequential(*(LocalBlock(width) for _ in range(depth)))

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
    """Blocks over tokens and ``tokens`` group tokens, and a grouping block into ``groups``; neither with 0 tokens. ``before``: group tokens
    of the stage before, from which those of this one are made too."""

    def __init__(self, width: int, heads: int, hidden: int, rates: Sequence[float], tokens: int, groups: int, before: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList(VitBlock(width, heads, hidden, rate) for rate in rates)
        self.group_token: nn.Parameter | None = None
        self.downsample: GroupingBlock | None = None
        self.group_projector: _TokenMixer | None = None
        if tokens:
            self.group_token = nn.Parameter(torch.zeros(1, tokens, width))
            self.downsample = GroupingBlock(width, heads, tokens, groups, int(_TOKEN_RATIO * width), hidden)
            if before:
                self.group_projector = _TokenMixer(width, before, tokens)

    def tokens(self, x: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(x [B, L, D], group tokens [B, T, D]) after the blocks; ``before``: the group tokens of the stage before, after its own."""
        L = x.shape[1]
        if self.group_token is not None:
            own = self.group_token.to(x.dtype).expand(len(x), -1, -1)
            if self.group_projector is not None and before is not None:
                own = own + self.group_projector(before)
            x = torch.cat([x, own], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, :L], x[:, L:] if self.group_token is not None else None

    def forward(self, x: torch.Tensor, before: torch.Tensor | None,
                noise: Noise) -> tuple[torch.Tensor, torch.Tensor | None, Grouped | None]:
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
        local_depth: None for patches; else a convolution stem and so many local blocks, without positions: the tiny models.
        init_std: of linear layers in the beginning; None: 1 / sqrt(inputs). A narrow tower needs it: with 0.02 and 64 channels the logits
            of a grouping block begin at 0.02 beside noise of 1.3, and all groups take the same patches.
        pool: ``mean`` of the groups, as published, or elementwise ``max``, as in SegCLIP: what one group alone shows is not diluted, so
            that it pays to keep things apart.
    """

    def __init__(self, width: int, heads: int, hidden: int, depths: Sequence[int], group_tokens: Sequence[int], groups: Sequence[int],
                 image_size: int, patch_size: int, patch_norm: bool = False, drop_path: float = 0.0, local_depth: int | None = None,
                 init_std: float | None = 0.02, pool: str = "mean"):
        super().__init__()
        with_tokens = [count for count in group_tokens if count]
        if len(depths) != len(group_tokens) or len(groups) != len(with_tokens) or not with_tokens or not group_tokens[0]:
            raise ValueError(f"depths, group_tokens and groups are {list(depths)}, {list(group_tokens)} and {list(groups)}; expected a "
                             "depth and a number of group tokens a stage, tokens in the first, and groups for each stage with tokens")
        if local_depth is not None and patch_size != LOCAL_PATCH:
            raise ValueError(f"patch_size is {patch_size} and local_depth {local_depth}; expected {LOCAL_PATCH}, the step of the stem")
        if pool not in POOLS:
            raise ValueError(f"pool is {pool!r}; expected one of {list(POOLS)}")
        self.pool = pool
        self.side, self.patch_size = image_size // patch_size, patch_size
        if local_depth is None:
            self.patch_embed: nn.Module = _PatchEmbed(width, patch_size, patch_norm)
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.side**2, width), std=0.02))
        else:
            self.patch_embed, self.pos_embed = _LocalEmbed(width, local_depth), None
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        left, stages, before = list(groups), [], 0
        for i, (depth, tokens) in enumerate(zip(depths, group_tokens, strict=True)):
            first = sum(depths[:i])
            stages.append(Stage(width, heads, hidden, rates[first : first + depth], tokens, left.pop(0) if tokens else 0, before))
            before = tokens
        self.layers, self.norm = nn.ModuleList(stages), nn.LayerNorm(width)
        self.layers.apply(partial(_initialize, std=init_std))
        nn.init.trunc_normal_(stages[0].group_token, std=0.02)  # those of later stages are made of these and begin at zero

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
            x = x + resize_positions(self.pos_embed[0], (self.side, self.side), grid, antialias=False, prefix=0)
        return x, grid

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        """(h, w) of the tokens of pictures of (H, W) pixels."""
        partial = self.pos_embed is None  # the stem sees what is left at the border, a convolution of patches does not
        height, width = (-(-side // self.patch_size) if partial else side // self.patch_size for side in size)
        return height, width

    def forward(self, images: torch.Tensor, noises: Sequence[Noise] | None = None) -> VisionGroups:
        """``images`` [B, 3, H, W], normalised; ``noises``: of each grouping block, see ``GroupingBlock``."""
        x, grid = self.embed(images)
        left, tokens, found = list(noises or ()), None, []
        for stage in self.layers:
            x, tokens, grouped = stage(x, tokens, left.pop(0) if left and stage.downsample is not None else None)
            if grouped is not None:
                found.append(grouped)
        groups = self.norm(x)
        return VisionGroups(groups, groups.mean(1) if self.pool == "mean" else groups.amax(1), grid, tuple(found))

    def first_centers(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(projected queries [B, G, D], normed patches [B, L, D]) of the first grouping block; nothing behind it is computed."""
        x, _ = self.embed(images)
        x, tokens = self.layers[0].tokens(x, None)
        grouping = self.groupings[0]
        centers, normed = grouping.centers(x, tokens)
        return grouping.assign.q_proj(centers), normed


def _initialize(module: nn.Module, std: float | None) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5 if std is None else std)
        nn.init.zeros_(module.bias)
