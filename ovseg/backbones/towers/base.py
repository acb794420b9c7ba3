"""What an image tower of a CLIP is to the backbone: pictures to tokens and an embedding, tokens to the space of the texts.

A tower is no module: it walks over the parts of open_clip's image tower, whose parameters keep their names.

    embedding = pool(tokens)             what the model was trained with                                     (1)
    dense     = pool of the token alone, as if all that is pooled were like it                               (2)

(2) is the dense map of every head (docs/towers.md): if the tokens are alike, dense and embedding are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ...layers.block import AttentionBlock
from ...layers.readout import NAMED, READOUTS, ProxyFeatures, Readout, run_blocks, run_plain


class Encoded(NamedTuple):
    """``tokens`` [B, N, D] before the head, over ``grid``; ``embedding`` [B, E] of the pictures."""

    tokens: torch.Tensor
    grid: tuple[int, int]
    embedding: torch.Tensor


class ImageTower:
    """Base of the towers.

    Attributes:
        kind: in words, for messages.
        pooling: in words: what makes one vector of the tokens.
        token_dim, embed_dim: D and E.
        patch_size, image_size: in pixels.
        overlaps: whether the step between patches can be smaller than a patch.
        stride: that step in pixels.
        antialias, interpolation: how positions are resized to another grid, where there are any.
    """

    kind: str
    pooling: str
    token_dim: int
    embed_dim: int
    patch_size: int
    image_size: int
    overlaps: bool = False
    stride: int
    antialias: bool = True
    interpolation: str = "bicubic"

    @property
    def blocks(self) -> Sequence[AttentionBlock]:
        """Those that a readout can change."""
        return ()

    def encode(self, images: torch.Tensor, readout: Readout = READOUTS["clip"], proxy: ProxyFeatures | None = None) -> Encoded:
        raise NotImplementedError

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """[B, E], the embedding of (1) alone."""
        return self.encode(images).embedding

    def dense(self, tokens: torch.Tensor) -> torch.Tensor:
        """(2): tokens before the head [B, N, D] to [B, N, E]."""
        raise NotImplementedError

    def check_readout(self, readout: Readout) -> None:
        """Raises ValueError for a readout that this tower does not have."""

    def step(self, stride: int | None) -> int:
        """``stride``, or the patch size if None; ValueError for one that this tower cannot have."""
        if stride is not None and not 1 <= stride <= self.patch_size:
            raise ValueError(f"stride is {stride}; expected 1 to {self.patch_size}, the patch size")
        if stride not in (None, self.patch_size) and not self.overlaps:
            raise ValueError(f"stride is {stride} and the image tower is {self.kind}; expected None: a smaller step needs a tower that "
                             "cuts the picture into patches by one convolution")
        return self.patch_size if stride is None else stride

    def check_size(self, images: torch.Tensor) -> None:
        if images.shape[-1] < self.patch_size or images.shape[-2] < self.patch_size:
            raise ValueError(f"images have size {tuple(images.shape[-2:])}; expected at least one patch of {self.patch_size}")


class BlockTower(ImageTower):
    """Towers of transformer blocks.

    Attributes:
        prefix: how many tokens stand before the patches: a class token and registers, or none.
        first: how many of the leading tokens the pooling looks at; None for all.
    """

    prefix: int
    first: int | None

    def sequence(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, tuple[int, int]]:
        """(tokens [B, prefix + N, D] as the first block sees them, rotary positions or None, grid)."""
        raise NotImplementedError

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """(1): what the last block gives, [B, prefix + N, D], to the embeddings [B, E]."""
        raise NotImplementedError

    def encode(self, images: torch.Tensor, readout: Readout = READOUTS["clip"], proxy: ProxyFeatures | None = None) -> Encoded:
        x, rope, grid = self.sequence(images)
        read = run_blocks(self.blocks, x, readout, grid, prefix=self.prefix, first=self.first, rope=rope, proxy=proxy)
        return Encoded(read.patches, read.grid, self.pool(read.own))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        x, rope, _ = self.sequence(images)
        return self.pool(run_plain(self.blocks, x, rope=rope, first=self.first))


class MapTower(ImageTower):
    """Towers that end in a map of features and have no attention that a readout could change."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[B, D, h, w] before the pooling."""
        raise NotImplementedError

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """(1): the map [B, D, h, w] to the embeddings [B, E]."""
        raise NotImplementedError

    def encode(self, images: torch.Tensor, readout: Readout = READOUTS["clip"], proxy: ProxyFeatures | None = None) -> Encoded:
        self.check_readout(readout)
        self.check_size(images)
        x = self.features(images)
        return Encoded(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]), self.pool(x))

    def check_readout(self, readout: Readout) -> None:
        if readout != READOUTS["clip"]:
            names = [name for name, known in NAMED.items() if known == readout]
            raise ValueError(f"readout is {names[0] if names else readout!r} and the image tower is {self.kind}, whose last layers are no "
                             "attention over patches; expected 'clip'")


def patch_size_of(size: int | Sequence[int]) -> int:
    """The side of square patches."""
    side = [size, size] if isinstance(size, int) else list(size)
    if side[0] != side[1]:
        raise ValueError(f"the image tower has patches of {tuple(side)}; expected square ones")
    return int(side[0])


def image_size_of(visual: Any) -> int:
    size = visual.image_size
    return int(size if isinstance(size, int) else min(size))


def timm_embed_dim(visual: Any) -> int:
    """E of timm's tower: of open_clip's head, or of timm's own where that is the projection."""
    linear = [module for module in visual.head.modules() if isinstance(module, nn.Linear)]
    return linear[-1].out_features if linear else visual.trunk.num_classes or visual.trunk.num_features
