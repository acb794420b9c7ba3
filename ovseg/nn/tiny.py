"""TinyClip: a trainable two-tower CLIP of 0.3 M parameters, the embedded default.

The vision tower mixes locally first (a convolution stem to a grid of patch tokens, then depth-wise
blocks) and globally last (transformer blocks with a class token). Without the local part a model of
this size learns to retrieve captions and not where things are. There is no position embedding: any
picture size works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ..bounds import bounded
from .backbone import ClipBackbone
from .blocks import (
    LOCAL_PATCH,
    AttentionBlock,
    LocalBlock,
    local_stem,
    local_tokens,
    split_heads,
)
from .features import Grid, PatchFeatures
from .readout import CLIP, ProxyFeatures, Readout, run_blocks


@dataclass
class TinyOptions:
    """Sizes of a ``TinyClip``.

    Attributes:
        width: of both towers, a multiple of ``heads``.
        embed_dim: E.
        local_depth, depth, text_depth: blocks of the local, global and text parts.
        heads: of all attentions.
        image_size: side in pixels of the pictures it is trained on.
        context_length: tokens of the longest text.
    """

    width: int = bounded(64, low=1)
    embed_dim: int = bounded(64, low=1)
    local_depth: int = bounded(3, low=0)
    depth: int = bounded(1, low=0)
    text_depth: int = bounded(2, low=0)
    heads: int = bounded(4, low=1)
    image_size: int = bounded(48, low=1)
    context_length: int = bounded(16, low=3)


class _Block(AttentionBlock):
    """The block of both towers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.norm_2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def project(self, normed: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(self.qkv(normed), self.heads)

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        D = normed.shape[2]
        kv = F.linear(normed, self.qkv.weight[D:], self.qkv.bias[D:])
        return split_heads(kv, self.heads, 2)

    def merge(self, o: Tensor) -> Tensor:
        return self.out(o.transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm_2(x))


class TinyClip(ClipBackbone):
    """Both towers, over known words.

    Without a global part (``depth=0``) there is no image embedding; systems that pool patches
    themselves, as SegCLIP does, need none.

    Args:
        options: sizes.
        tokenizer: texts to ids [T, context_length] below ``vocab_size``; 0 is padding, ``end`` ends
            a text.
    """

    patch_size = LOCAL_PATCH
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.25, 0.25, 0.25)
    taps = ("local", "pre_norm", "post_norm")
    tokenizer: Any

    def __init__(self, options: TinyOptions, tokenizer: Any):
        super().__init__()
        o = options
        width = o.width
        if width % o.heads:
            raise ValueError(f"heads is {o.heads}; expected a divisor of the width, {width}")
        self.token_dim = width
        self.embed_dim = o.embed_dim
        self.image_size = o.image_size
        self.heads = o.heads
        self.tokenizer = tokenizer
        self.stem = local_stem(width)
        self.local = nn.Sequential(*(LocalBlock(width) for _ in range(o.local_depth)))
        self.cls = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, o.heads) for _ in range(o.depth))
        self.norm = nn.LayerNorm(width)
        self.image_projection = nn.Linear(width, o.embed_dim, bias=False)
        self.words = nn.Embedding(tokenizer.vocab_size, width)
        self.word_positions = nn.Parameter(torch.randn(o.context_length, width) * 0.02)
        self.text_blocks = nn.ModuleList(_Block(width, o.heads) for _ in range(o.text_depth))
        self.text_norm = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, o.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.words.weight, std=0.1)

    @override
    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        return local_tokens(self.stem, self.local, images)

    @override
    def sequence(self, images: Tensor, class_weight: float = 1.0) -> tuple[Tensor, Grid]:
        x, grid = self.embed(images)
        cls = (class_weight * self.cls).to(x.dtype).expand(len(x), 1, -1)
        return torch.cat([cls, x], dim=1), grid

    @override
    def encode_patches(
        self,
        images: Tensor,
        *,
        tap: str = "post_norm",
        readout: Readout = CLIP,
        proxy: ProxyFeatures | None = None,
    ) -> PatchFeatures:
        self._check_tap(tap)
        if tap == "local":  # before the blocks, where the class token is the same for all pictures
            x, grid = self.embed(images)
            return PatchFeatures(self.cls.to(x.dtype).expand(len(x), -1), x, grid)
        x, grid = self.sequence(images)
        found = run_blocks(self.vision_blocks, x, readout, grid, proxy=proxy)
        if tap == "pre_norm":
            return found
        return PatchFeatures(self.norm(found.embedding), self.norm(found.tokens), found.grid)

    @override
    def encode_image(self, images: Tensor) -> Tensor:
        if len(self.blocks) == 0:
            raise ValueError(
                "depth is 0; expected at least one block in which the class token sees the patches"
            )
        x, _ = self.sequence(images)
        for block in self.vision_blocks[:-1]:
            x = block(x)
        return self.project(self.norm(self.vision_blocks[-1](x, first=1)[:, 0]))

    @override
    def encode_text(self, token_ids: Tensor) -> Tensor:
        token_ids = token_ids.to(self.words.weight.device)
        keep = token_ids != 0
        x = F.embedding(token_ids, self.words.weight) + self.word_positions[: token_ids.shape[1]]
        for block in self.text_blocks:
            x = block(x, attn_mask=keep[:, None, None, :])
        end = (token_ids == self.tokenizer.end).int().argmax(dim=1)
        x = self.text_norm(x[torch.arange(len(x), device=x.device), end])
        return self.text_projection(x)

    @override
    def project(self, tokens: Tensor) -> Tensor:
        return self.image_projection(tokens)

    @override
    def final_norm(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens)

    @override
    def set_image_size(self, size: int, interpolation: str) -> None:
        self.image_size = size

    @property
    @override
    def class_token(self) -> nn.Parameter:
        return self.cls

    @property
    @override
    def vision_blocks(self) -> Sequence[AttentionBlock]:
        return self.blocks

    @override
    def new_blocks(self, count: int) -> nn.ModuleList:
        return nn.ModuleList(_Block(self.token_dim, self.heads) for _ in range(count))

    @override
    def embedding_parameters(self) -> list[nn.Parameter]:
        return [self.words.weight, self.word_positions, *self.stem.parameters()]

    @override
    def vision_parameters(self, tap: str = "post_norm") -> list[nn.Parameter]:
        self._check_tap(tap)
        parts: list[nn.Module] = [self.stem, self.local]
        if tap != "local":
            parts.append(self.blocks)
        if tap == "post_norm":
            parts.append(self.norm)
        found = [p for part in parts for p in part.parameters()]
        return found if tap == "local" else [*found, self.cls]

    @override
    def text_parameters(self) -> list[nn.Parameter]:
        parts: tuple[Any, ...] = (
            self.words,
            self.text_blocks,
            self.text_norm,
            self.text_projection,
        )
        return [self.word_positions, *(p for part in parts for p in part.parameters())]
