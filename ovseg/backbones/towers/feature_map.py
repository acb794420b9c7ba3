"""timm's convolutional towers, pooled by their average: ConvNeXt, FastViT (MobileCLIP's hybrid)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import MapTower, image_size_of, timm_embed_dim


class FeatureMap(MapTower):
    """With x the map before the pooling and W all that follows it, norms and MLPs included, timm's head, then open_clip's:

        embedding = W(mean_n(x_n))        dense = W(x_n)

    Where W is linear, the mean over the dense map is the embedding. W comes per token by giving each token to the head as a map of its own
    of one patch, whose average it is.
    """

    pooling = "average"

    def __init__(self, visual: Any, stride: int | None = None):
        self.visual, trunk = visual, visual.trunk
        self.kind = f"timm's {type(trunk).__name__}, convolutional"
        self.patch_size = int(trunk.feature_info[-1]["reduction"])
        self.image_size, self.token_dim, self.embed_dim = image_size_of(visual), trunk.num_features, timm_embed_dim(visual)
        self.stride = self.step(stride)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual.trunk.forward_features(images)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        return self.visual.head(self.visual.trunk.forward_head(features))

    def dense(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.pool(tokens.flatten(0, 1)[..., None, None]).unflatten(0, tokens.shape[:2])


def is_feature_map(visual: Any) -> bool:
    """Whether the tower ends in a map [B, D, h, w] that timm's head averages before all else."""
    trunk = visual.trunk
    pool = getattr(getattr(trunk, "head", None), "global_pool", None)
    averaged = getattr(pool, "pool_type", None) in ("avg", "fast", "fastavg") and getattr(trunk.head, "input_fmt", "NCHW") == "NCHW"
    return averaged and isinstance(visual.head, nn.Sequential) and "pool" not in dict(visual.head.named_children())
