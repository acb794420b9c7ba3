"""timm's ViTs as open_clip takes them (VisionTransformer, Eva): SigLIP, PE, EVA, MobileCLIP's ViT, ViTamin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...layers.block import AttentionBlock
from ...layers.positions import resize_positions
from ...layers.timm_block import TimmBlock
from .base import BlockTower, image_size_of, patch_size_of, timm_embed_dim

POOLINGS = {"token": "class token", "avg": "average", "map": "attention"}


class TimmVit(BlockTower):
    """With x the tokens after the last block, and W what follows: fc_norm, timm's head and open_clip's, in this order.

    =========================  ==============================  ======================================================
    pooling                    embedding                       dense
    =========================  ==============================  ======================================================
    class token                W norm(x_0)                     W norm(x_n)
    average                    W mean_n(norm(x_n))             W norm(x_n)
    attention                  W f(O attention(norm(x)))       W f(O V norm(x_n)),  f(y) = y + mlp(norm_p(y))
    =========================  ==============================  ======================================================

    O and V are the pool's output and value projections, attention that of its learned query. Whether the pool looks at the prefix (PE's
    does, its class token) is timm's business; so is the rule by which positions, learned or rotary, stretch over another grid.
    """

    def __init__(self, visual: Any, stride: int | None = None, attention_backend: str = "sdpa"):
        self.visual, trunk = visual, visual.trunk
        name, rope = type(trunk).__name__, getattr(trunk, "rope", None)
        if trunk.global_pool not in POOLINGS:
            raise ValueError(f"the image tower is timm's {name} and pools by {trunk.global_pool!r}; expected one of {list(POOLINGS)}")
        if rope is not None and type(rope).__name__ != "RotaryEmbeddingCat":
            raise ValueError(f"the image tower has positions of type {type(rope).__name__}; expected learned ones, or RotaryEmbeddingCat")
        pool = getattr(trunk, "attn_pool", None)
        if pool is not None and (type(pool).__name__ != "AttentionPoolLatent" or pool.pos_embed is not None):
            raise ValueError(f"the image tower is pooled by {type(pool).__name__}; expected AttentionPoolLatent without positions")
        self.embedder = trunk.patch_embed
        self.hybrid = type(self.embedder).__name__ == "HybridEmbed"
        if not self.hybrid and (type(self.embedder).__name__ != "PatchEmbed" or self.embedder.dynamic_img_pad):
            raise ValueError(f"the image tower has patches by {type(self.embedder).__name__}; expected PatchEmbed without padding, or "
                             "HybridEmbed")
        self.pooling = POOLINGS[trunk.global_pool]
        self.kind = f"timm's {name} pooled by {self.pooling}" + (" behind a convolutional stem" if self.hybrid else "")
        for i, block in enumerate(trunk.blocks):
            trunk.blocks[i] = TimmBlock(block, attention_backend)
        self.prefix = trunk.num_prefix_tokens
        self.first = 1 if trunk.global_pool == "token" else None
        patch = patch_size_of(self.embedder.patch_size)
        self.patch_size = patch * patch_size_of(self.embedder.feature_ratio) if self.hybrid else patch
        self.overlaps = not self.hybrid
        self.stride = self.step(stride)
        self.image_size, self.token_dim, self.embed_dim = image_size_of(visual), trunk.embed_dim, timm_embed_dim(visual)

    @property
    def blocks(self) -> Sequence[AttentionBlock]:
        return list(self.visual.trunk.blocks)

    def sequence(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, tuple[int, int]]:
        self.check_size(images)
        trunk, embedder = self.visual.trunk, self.embedder
        if self.hybrid:
            x = embedder.backbone(images)
            x = embedder.proj(x[-1] if isinstance(x, (list, tuple)) else x)
        else:
            x = F.conv2d(images, embedder.proj.weight, embedder.proj.bias, stride=self.stride)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        x = x if self.hybrid else embedder.norm(x)
        first = [t.to(x.dtype).expand(len(x), -1, -1) for t in (trunk.cls_token, getattr(trunk, "reg_token", None)) if t is not None]
        positions = trunk.pos_embed
        if positions is None:
            x = torch.cat([*first, x], 1)
        else:
            prefix = 0 if trunk.no_embed_class else self.prefix
            positions = resize_positions(positions[0], tuple(embedder.grid_size), grid, antialias=self.antialias, prefix=prefix).to(x.dtype)
            x = torch.cat([*first, x + positions], 1) if trunk.no_embed_class else torch.cat([*first, x], 1) + positions
        return trunk.norm_pre(trunk.pos_drop(x)), self._rope(grid), grid

    def _rope(self, grid: tuple[int, int]) -> torch.Tensor | None:
        """[N, 2 d]: of ``grid``, made where the model is: timm's own way to another grid copies from the host."""
        rope = getattr(self.visual.trunk, "rope", None)
        if rope is None:
            return None
        if grid == tuple(self.embedder.grid_size) and rope.pos_embed is not None:
            return rope.get_embed()
        return rope._build_embed_cat(list(grid), rope.bands)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        trunk = self.visual.trunk
        return self.visual.head(trunk.forward_head(trunk.norm(tokens)))

    def dense(self, tokens: torch.Tensor) -> torch.Tensor:
        trunk, x = self.visual.trunk, self.visual.trunk.norm(tokens)
        pool = getattr(trunk, "attn_pool", None)
        if pool is not None:
            value = pool.kv.weight.shape[0] // 2
            x = pool.proj_drop(pool.proj(F.linear(x, pool.kv.weight[value:], None if pool.kv.bias is None else pool.kv.bias[value:])))
            x = x if pool.mlp is None else x + pool.mlp(pool.norm(x))
        return self.visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(x))))


def is_timm_vit(trunk: nn.Module) -> bool:
    """Whether ``TimmVit`` knows how the tokens of ``trunk`` are made."""
    return type(trunk).__name__ in ("VisionTransformer", "Eva")
