"""The towers of GroupViT and OVSegmentor: a ViT in stages, a text tower, a projector for each.

A stage puts learned group tokens behind its tokens, runs its blocks over both, and a grouping block
(``grouping``) makes fewer tokens of them. GroupViT (arXiv:2202.11094): 196 patches, 64 groups, 8
groups; OVSegmentor (arXiv:2301.09121): 196 patches, 8 groups. Over several stages the maps
multiply, A = A_2 A_1.

The projectors lead into the space where pictures and texts are compared: two layers with a
BatchNorm between, y = W_2 relu(BN(W_1 x + b_1)) + b_2. Its statistics in training are those of all
rows of all ranks, with their gradient, so that many processes give what one gives.

Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import override

from ovseg_kernels.distributed import sum_over_ranks

from ..bounds import bounded
from .backbone import ClipBackbone
from .blocks import LOCAL_PATCH, AttentionBlock, LocalBlock, local_stem, local_tokens
from .features import Grid
from .grouping import Grouped, GroupingBlock
from .tensors import at_least_float32
from .text import PackedText
from .vit_blocks import Mlp, VitBlock, resize_positions

_TOKEN_RATIO = 0.5  # of the width: the hidden layer of MLPs over tokens
_POSITIONS = "image.pos_embed"
POOLS = ("mean", "max")
Noise: TypeAlias = Tensor | None


@dataclass
class GroupingOptions:
    """Options of the image tower and the projectors; the defaults are GroupViT's ViT-S.

    Attributes:
        width, heads, hidden: D, heads of all attentions, width of the blocks' MLPs.
        depths: blocks of each stage.
        group_tokens: learned tokens of each stage; 0: no grouping.
        groups: what each grouping block makes, as many numbers as stages with group tokens.
        patch_norm: a norm after the patches' convolution.
        drop_path: stochastic depth of the last block, rising from 0 in the first.
        local_depth: None for patches; else a convolution stem and so many local blocks, without
            positions: the tiny models.
        init_std: of linear layers in the beginning; None: 1 / sqrt(inputs). A narrow tower needs
            it: with 0.02 and 64 channels the logits of a grouping block begin at 0.02 beside noise
            of 1.3, and all groups take the same patches.
        pool: ``mean`` of the groups, as published, or elementwise ``max``, as in SegCLIP: what one
            group alone shows is not diluted, so that it pays to keep things apart.
        image_size, patch_size: in pixels; the table of positions is of this grid.
        embed_dim, projector: E and the width of the projectors' hidden layers.
        mean, std: of RGB in 0..1; ImageNet's.
        text: kind and options of the text tower.
    """

    width: int = bounded(384, low=1)
    heads: int = bounded(6, low=1)
    hidden: int = bounded(1536, low=1)
    depths: list[int] = bounded(default_factory=lambda: [6, 3, 3], low=0)
    group_tokens: list[int] = bounded(default_factory=lambda: [64, 8, 0], low=0)
    groups: list[int] = bounded(default_factory=lambda: [64, 8], low=1)
    patch_norm: bool = True
    drop_path: float = bounded(0.1, low=0, high=1)
    local_depth: int | None = bounded(None, low=0)
    init_std: float | None = bounded(0.02, low=1e-6)
    pool: str = bounded("mean", one_of=POOLS)
    image_size: int = bounded(224, low=1)
    patch_size: int = bounded(16, low=1)
    embed_dim: int = bounded(256, low=1)
    projector: int = bounded(4096, low=1)
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = bounded(default_factory=lambda: [0.229, 0.224, 0.225], low=1e-6)
    text: dict[str, Any] = field(default_factory=lambda: {"kind": "clip"})


class VisionGroups(NamedTuple):
    """Groups of pictures, as the image tower gives them.

    Attributes:
        groups: [B, G, D] after the norm.
        pooled: [B, D], their mean or maximum.
        grid: (h, w) of the patches.
        stages: what each grouping block gave.
    """

    groups: Tensor
    pooled: Tensor
    grid: Grid
    stages: tuple[Grouped, ...]

    @property
    def index(self) -> Tensor:
        """The last stage's group of each patch, [B, L]."""
        index = self.stages[0].index
        for stage in self.stages[1:]:
            index = stage.index.gather(1, index)
        return index

    @property
    def soft(self) -> Tensor:
        """The product of the stages' soft maps, [B, G, L]."""
        soft = self.stages[0].soft
        for stage in self.stages[1:]:
            soft = stage.soft @ soft
        return soft


class _PatchEmbed(nn.Module):
    def __init__(self, width: int, patch_size: int, norm: bool):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x = self.proj(images)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class _LocalEmbed(nn.Module):
    def __init__(self, width: int, depth: int):
        super().__init__()
        self.stem = local_stem(width)
        self.local = nn.Sequential(*(LocalBlock(width) for _ in range(depth)))

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        return local_tokens(self.stem, self.local, images)


class _TokenMixer(nn.Module):
    """A norm and an MLP over the tokens: [B, T, D] to [B, T', D]."""

    def __init__(self, width: int, tokens: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = Mlp(tokens, int(_TOKEN_RATIO * width), out)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x).transpose(1, 2)).transpose(1, 2)


class Stage(nn.Module):
    """Blocks over tokens and group tokens, and a grouping block.

    Args:
        o: the tower's options.
        rates: stochastic depth of each block.
        tokens: group tokens; with 0 there is no grouping block either.
        groups: what the grouping block makes.
        before: group tokens of the stage before, from which those of this one are made too.
    """

    def __init__(
        self, o: GroupingOptions, rates: Sequence[float], tokens: int, groups: int, before: int = 0
    ):
        super().__init__()
        width = o.width
        self.blocks = nn.ModuleList(VitBlock(width, o.heads, o.hidden, rate) for rate in rates)
        self.group_token: nn.Parameter | None = None
        self.downsample: GroupingBlock | None = None
        self.group_projector: _TokenMixer | None = None
        if tokens:
            self.group_token = nn.Parameter(torch.zeros(1, tokens, width))
            mixed = int(_TOKEN_RATIO * width)
            self.downsample = GroupingBlock(width, o.heads, tokens, groups, mixed, o.hidden)
            if before:
                self.group_projector = _TokenMixer(width, before, tokens)

    def tokens(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (x [B, L, D], group tokens [B, T, D]) after the blocks.

        Args:
            x: [B, L, D].
            before: group tokens of the stage before, after its own blocks.
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
        self, x: Tensor, before: Tensor | None, noise: Noise
    ) -> tuple[Tensor, Tensor | None, Grouped | None]:
        """Return what the next stage sees, this one's group tokens, and what its grouping gave."""
        x, tokens = self.tokens(x, before)
        if self.downsample is None or tokens is None:
            return x, None, None
        grouped = self.downsample(x, tokens, noise)
        return grouped.tokens, tokens, grouped


class GroupingViT(nn.Module):
    """The image tower: a ViT in stages, with grouping blocks between them."""

    def __init__(self, o: GroupingOptions):
        super().__init__()
        with_tokens = [count for count in o.group_tokens if count]
        stages_fit = len(o.depths) == len(o.group_tokens) and len(o.groups) == len(with_tokens)
        if not stages_fit or not with_tokens or not o.group_tokens[0]:
            raise ValueError(
                f"depths, group_tokens and groups are {list(o.depths)}, {list(o.group_tokens)} and "
                f"{list(o.groups)}; expected a depth and a number of group tokens a stage, tokens "
                "in the first, and groups for each stage with tokens"
            )
        if o.local_depth is not None and o.patch_size != LOCAL_PATCH:
            raise ValueError(
                f"patch_size is {o.patch_size} and local_depth {o.local_depth}; expected "
                f"{LOCAL_PATCH}, the step of the stem"
            )
        width = o.width
        self.pool = o.pool
        self.side = o.image_size // o.patch_size
        self.patch_size = o.patch_size
        self.patch_embed: nn.Module
        self.pos_embed: nn.Parameter | None = None
        if o.local_depth is None:
            self.patch_embed = _PatchEmbed(width, o.patch_size, o.patch_norm)
            self.pos_embed = nn.Parameter(
                nn.init.trunc_normal_(torch.empty(1, self.side**2, width), std=0.02)
            )
        else:
            self.patch_embed = _LocalEmbed(width, o.local_depth)
        blocks = sum(o.depths)
        rates = [o.drop_path * i / max(1, blocks - 1) for i in range(blocks)]
        groups = iter(o.groups)
        self.layers = nn.ModuleList()
        before = first = 0
        for depth, tokens in zip(o.depths, o.group_tokens, strict=True):
            made = next(groups) if tokens else 0
            self.layers.append(Stage(o, rates[first : first + depth], tokens, made, before))
            before = tokens
            first += depth
        self.norm = nn.LayerNorm(width)
        self.layers.apply(partial(_initialize, std=o.init_std))
        # Those of later stages are made of these and begin at zero.
        nn.init.trunc_normal_(self.layers[0].group_token, std=0.02)

    @property
    def blocks(self) -> list[VitBlock]:
        """The blocks of all stages."""
        return [block for stage in self.layers for block in stage.blocks]

    @property
    def groupings(self) -> list[GroupingBlock]:
        """The grouping blocks between the stages."""
        return [stage.downsample for stage in self.layers if stage.downsample is not None]

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Return (tokens [B, L, D] as the first block sees them, grid)."""
        x, grid = self.patch_embed(images)
        if self.pos_embed is not None:
            x = x + resize_positions(
                self.pos_embed[0], (self.side, self.side), grid, antialias=False, prefix=0
            )
        return x, grid

    def grid(self, size: Sequence[int]) -> Grid:
        """Return (h, w) of the tokens of pictures of (H, W) pixels."""
        # The stem sees what is left at the border, a convolution of patches does not.
        left = self.patch_size - 1 if self.pos_embed is None else 0
        return (size[0] + left) // self.patch_size, (size[1] + left) // self.patch_size

    def forward(self, images: Tensor, noises: Sequence[Noise] | None = None) -> VisionGroups:
        """Gather the patches of pictures into groups.

        Args:
            images: [B, 3, H, W], normalised.
            noises: for each grouping block, see ``GroupingBlock``.
        """
        x, grid = self.embed(images)
        left = iter(noises or ())
        tokens = None
        found = []
        for stage in self.layers:
            noise = next(left, None) if stage.downsample is not None else None
            x, tokens, grouped = stage(x, tokens, noise)
            if grouped is not None:
                found.append(grouped)
        groups = self.norm(x)
        pooled = groups.mean(1) if self.pool == "mean" else groups.amax(1)
        return VisionGroups(groups, pooled, grid, tuple(found))

    def first_centers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (projected queries [B, G, D], normed patches [B, L, D]) of the first grouping.

        Nothing behind it is computed.
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


class Projector(nn.Module):
    """A projector, [..., D] to [..., E] through ``hidden``.

    Parameter names are OVSegmentor's, whose layers are 1x1 convolutions.
    """

    def __init__(self, width: int, hidden: int, embed_dim: int):
        super().__init__()
        self.linear_hidden = nn.Sequential(
            nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()
        )
        self.linear_out = nn.Linear(hidden, embed_dim)

    def forward(self, x: Tensor, group: Any = None) -> Tensor:
        """Project ``x``.

        Args:
            x: [..., D].
            group: the ranks whose rows share statistics in training; None for this process alone.
        """
        linear, norm, relu = self.linear_hidden
        # Statistics are not autocast's to round.
        hidden = linear(x.flatten(0, -2)).to(norm.weight.dtype)
        if group is None or not self.training:
            hidden = norm(hidden)
        else:
            hidden = synchronized(norm, hidden, group)
        return self.linear_out(relu(hidden)).unflatten(0, x.shape[:-1])


def synchronized(norm: nn.BatchNorm1d, x: Tensor, group: Any) -> Tensor:
    """Apply ``norm`` in training over the rows [n, C] of all ranks.

    Its running statistics are updated and stay equal everywhere.
    """
    rows = at_least_float32(x)
    count = sum_over_ranks(rows.new_full((1,), len(rows)), group)
    mean = sum_over_ranks(rows.sum(0), group) / count
    variance = sum_over_ranks((rows - mean).square().sum(0), group) / count
    running_mean: Any = norm.running_mean
    running_var: Any = norm.running_var
    momentum = norm.momentum or 0.1
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean), momentum)
        running_var.lerp_((variance * count / (count - 1)).to(running_var), momentum)
        norm.num_batches_tracked += 1
    y = (rows - mean) * (variance + norm.eps).rsqrt() * norm.weight + norm.bias
    return y.to(x.dtype)


class GroupingBackbone(ClipBackbone):
    """Both towers and their projectors.

    That is GroupViT as a whole, and OVSegmentor but for what only its training needs.
    """

    def __init__(self, options: GroupingOptions, image: GroupingViT, text: PackedText):
        super().__init__()
        o = self.options = options
        self.token_dim = o.width
        self.embed_dim = o.embed_dim
        self.image_size = o.image_size
        self.patch_size = o.patch_size
        self.image_mean = tuple(o.mean)  # type: ignore[assignment]
        self.image_std = tuple(o.std)  # type: ignore[assignment]
        self.image = image
        self.text = text
        self.tokenizer = text.tokenizer
        self.image_projector = Projector(o.width, o.projector, o.embed_dim)
        self.text_projector = Projector(text.width, o.projector, o.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def groups(self, images: Tensor) -> tuple[VisionGroups, Tensor, Tensor]:
        """Return the image tower's groups, and embeddings of pictures and groups [B, G, E]."""
        found = self.image(images)
        both = self.image_projector(torch.cat([found.pooled[:, None], found.groups], 1))
        return found, both[:, 0], both[:, 1:]

    @override
    def encode_image(self, images: Tensor) -> Tensor:
        return self.image_projector(self.image(images).pooled)

    @override
    def encode_text(self, token_ids: Tensor) -> Tensor:
        return self.text_projector(self.text(token_ids).sentence)

    @override
    def text_facts(self) -> Any:
        return self.text.facts()

    @override
    def lasting_options(self) -> dict[str, Any]:
        # Weights that the text tower began with are in the saved file.
        text = dict(self.options.text)
        return {"text": text} if text.pop("weights", None) else {}

    @override
    def resize_positions(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        table = state.get(_POSITIONS)
        own = self.image.pos_embed
        if table is None or own is None or table.dim() != 3 or table.shape[2] != own.shape[2]:
            return state  # for the comparison of shapes to name
        side = math.isqrt(table.shape[1])
        if not side or side * side != table.shape[1]:
            return state
        grid = (self.image.side, self.image.side)
        resized = resize_positions(table[0], (side, side), grid, antialias=False, prefix=0)
        return {**state, _POSITIONS: resized[None]}

    @property
    @override
    def vision_blocks(self) -> Sequence[AttentionBlock]:
        return self.image.blocks

    @property
    def text_blocks(self) -> Sequence[Any]:  # type: ignore[override]
        """The blocks of the text tower, over packed tokens."""
        return self.text.blocks

    @override
    def text_parameters(self) -> list[nn.Parameter]:
        # Those of the tower first. Running statistics are no parameters and come along as values.
        norm: Any = self.text_projector.linear_hidden[1]
        return [
            *self.text.trained_parameters(),
            *self.text_projector.parameters(),
            norm.running_mean,
            norm.running_var,
        ]
