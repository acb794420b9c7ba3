"""CLIP's ResNet: a convolutional tower with attention pooling."""

from __future__ import annotations

from typing import Any

import torch

from ...layers.attention import attention
from ...layers.positions import resize_positions
from .base import MapTower, image_size_of


class ClipResNet(MapTower):
    """With x the last map, p the pool's positions, Q, K, V and C its projections, and x_0 the mean of the patches:

        embedding = C attention(Q (x_0 + p_0), K (x + p), V (x + p))        dense = C V x_n

    Positions say where a patch is, and a patch's own vector should say what it is: they are left out. Tokens that are alike give the
    embedding exactly where V p is zero.
    """

    pooling = "attention"
    kind = "CLIP's ResNet, convolutional"
    patch_size = 32

    def __init__(self, visual: Any, stride: int | None = None):
        self.visual = visual
        self.image_size, self.token_dim, self.embed_dim = image_size_of(visual), visual.attnpool.v_proj.in_features, visual.output_dim
        self.stride = self.step(stride)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        visual = self.visual
        return visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        pool, grid = self.visual.attnpool, (features.shape[2], features.shape[3])
        trained = self.image_size // self.patch_size
        positions = resize_positions(pool.positional_embedding, (trained, trained), grid, antialias=self.antialias)
        x = features.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + positions.to(x.dtype)
        q, k, v = (layer(t).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
                   for layer, t in ((pool.q_proj, x[:, :1]), (pool.k_proj, x), (pool.v_proj, x)))
        return pool.c_proj(attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]

    def dense(self, tokens: torch.Tensor) -> torch.Tensor:
        pool = self.visual.attnpool
        return pool.c_proj(pool.v_proj(tokens))
