"""open_clip's own ViT: class token, average or attention pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...layers.block import AttentionBlock, ClipBlock
from ...layers.positions import resize_positions
from ...layers.readout import ProxyFeatures, Readout, run_blocks
from .base import BlockTower, image_size_of, patch_size_of


class ClipVit(BlockTower):
    """With x the tokens after the last block, class token first, and W the projection:

    =========================  ==============================  ===========================
    pooling                    embedding                       dense
    =========================  ==============================  ===========================
    class token                norm(x_0) W                     norm(x_n) W
    average                    mean_n(norm(x_n)) W, or         norm(x_n) W
                               norm(mean_n(x_n)) W (CLIPA)
    attention (CoCa)           norm(attention_0(x)) W          norm(O V norm_k(x_n)) W
    =========================  ==============================  ===========================

    O and V are the attention's output and value projections, attention_0 its first query.
    """

    prefix = 1
    overlaps = True

    def __init__(self, visual: Any, stride: int | None = None, attention_backend: str = "sdpa"):
        self.visual = visual
        if getattr(visual, "attn_pool_contrastive", None) is not None:
            raise ValueError(f"the image tower has two attention poolings ({visual.attn_pool_type!r}); expected one, as CoCa has it")
        if visual.attn_pool is None and visual.pool_type not in ("tok", "avg"):
            raise ValueError(f"the image tower pools by {visual.pool_type!r}; expected 'tok', 'avg' or attention")
        self.first = 1 if visual.attn_pool is None and visual.pool_type == "tok" else None
        self.pooling = "attention" if visual.attn_pool is not None else {"tok": "class token", "avg": "average"}[visual.pool_type]
        self.kind = f"open_clip's ViT pooled by {self.pooling}"
        blocks = visual.transformer.resblocks
        if not isinstance(getattr(blocks[0], "attn", None), nn.MultiheadAttention):
            raise ValueError(f"the image tower has blocks of type {type(blocks[0]).__name__}; expected CLIP's")
        visual.transformer.resblocks = nn.ModuleList(ClipBlock(block, attention_backend) for block in blocks)
        self.patch_size, self.image_size = patch_size_of(visual.patch_size), image_size_of(visual)
        self.stride = self.step(stride)
        self.token_dim, self.embed_dim = visual.conv1.out_channels, visual.output_dim

    @property
    def blocks(self) -> Sequence[AttentionBlock]:
        return self.visual.transformer.resblocks

    def patches(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """(patches [B, N, D], positions [1 + N, D] of this grid, grid)."""
        self.check_size(images)
        visual = self.visual
        x = F.conv2d(images, visual.conv1.weight, visual.conv1.bias, stride=self.stride)
        grid, trained = (x.shape[2], x.shape[3]), (visual.grid_size[0], visual.grid_size[1])
        positions = resize_positions(visual.positional_embedding, trained, grid, antialias=self.antialias, mode=self.interpolation)
        return x.flatten(2).transpose(1, 2), positions, grid

    def set_image_size(self, size: int, interpolation: str) -> None:
        """See ``ClipBackbone.set_image_size``."""
        if size < self.patch_size or size % self.patch_size:
            raise ValueError(f"image_size is {size}; expected a multiple of the patch, {self.patch_size} pixels")
        self.interpolation, self.image_size, visual = interpolation, size, self.visual
        side = size // self.patch_size
        trained, grid = (visual.grid_size[0], visual.grid_size[1]), (side, side)
        table = resize_positions(visual.positional_embedding.detach(), trained, grid, antialias=self.antialias, mode=interpolation)
        visual.positional_embedding = nn.Parameter(table.clone(), requires_grad=visual.positional_embedding.requires_grad)
        visual.grid_size, visual.image_size = grid, (size, size)

    def tokens(self, images: torch.Tensor, readout: Readout,
               proxy: ProxyFeatures | None) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """(patches [B, N, D], class token [B, D], grid) after the last block, before the final norm."""
        x, _, grid = self.sequence(images)
        read = run_blocks(self.blocks, x, readout, grid, proxy=proxy)
        return read.patches, read.own[:, 0], read.grid

    def sequence(self, images: torch.Tensor, class_weight: float = 1.0) -> tuple[torch.Tensor, None, tuple[int, int]]:
        x, positions, grid = self.patches(images)
        cls = (class_weight * self.visual.class_embedding).to(x.dtype)
        x = torch.cat([cls.expand(len(x), 1, -1), x], dim=1) + positions.to(x.dtype)
        return self.visual.ln_pre(x), None, grid

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """(patches [B, N, D] as the first block sees them, without the class token; grid)."""
        x, positions, grid = self.patches(images)
        return self.visual.ln_pre(x + positions[1:].to(x.dtype)), grid

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        visual = self.visual
        if visual.attn_pool is not None:
            pooled = visual.ln_post(visual.attn_pool(tokens))
            return self.project(pooled[:, 0] if visual.pool_type == "tok" else pooled[:, 1:].mean(1))
        if visual.pool_type == "tok":
            return self.project(visual.ln_post(tokens[:, 0]))
        if visual.final_ln_after_pool:
            return self.project(visual.ln_post(tokens[:, 1:].mean(1)))
        return self.project(visual.ln_post(tokens[:, 1:]).mean(1))

    def dense(self, tokens: torch.Tensor) -> torch.Tensor:
        pool = self.visual.attn_pool
        if pool is not None:
            attn = pool.attn
            weight = attn.in_proj_weight.chunk(3)[2] if attn.in_proj_weight is not None else attn.v_proj_weight
            tokens = attn.out_proj(F.linear(pool.ln_k(tokens), weight, attn.in_proj_bias.chunk(3)[2]))
        return self.project(self.visual.ln_post(tokens))

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if self.visual.proj is None else tokens @ self.visual.proj
