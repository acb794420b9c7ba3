"""timm's ViTs as open_clip takes them, and which tower an open_clip model gets.

VisionTransformer and Eva cover SigLIP, PE, EVA, MobileCLIP's ViT and ViTamin. Their blocks become
modules in parts, like ``ClipBlock``; timm itself is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from .blocks import AttentionBlock, split_heads
from .features import Grid
from .towers import (
    BlockTower,
    ClipResNet,
    ClipVit,
    FeatureMap,
    ImageTower,
    image_size_of,
    is_feature_map,
    patch_size_of,
    timm_embed_dim,
)
from .vit_blocks import resize_positions, rotate

ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")
POOLINGS = {"token": "class token", "avg": "average", "map": "attention"}
SUPPORTED = (
    "open_clip's VisionTransformer and ModifiedResNet, timm's VisionTransformer and Eva, and "
    "timm's towers whose map [B, D, h, w] is averaged (ConvNeXt, FastViT)"
)
KINDS = ("Block", "EvaBlock", "EvaBlockPostNorm")


def check_timm_block(block: nn.Module) -> None:
    """Raise ValueError for a block that ``TimmBlock`` would not compute as timm does."""
    kind = type(block).__name__
    attn = getattr(block, "attn", None)
    if kind not in KINDS or type(attn).__name__ not in ATTENTIONS:
        raise ValueError(
            f"blocks are {kind} with {type(attn).__name__}; expected one of {list(KINDS)} with "
            "plain or rotary attention"
        )
    if (
        getattr(attn, "gate", None) is not None
        or getattr(attn, "num_kv_groups", 1) != 1
        or attn.attn_drop.p > 0  # type: ignore[union-attr]
    ):
        raise ValueError(
            f"blocks are {kind} with gates, grouped queries or dropout in the attention; expected "
            "none of them"
        )


class TimmBlock(AttentionBlock):
    """timm's Block, EvaBlock or EvaBlockPostNorm over its own parts.

    They keep their names: state dicts do not change. Queries and keys are normed where the block
    does that, then turned (``rope``); values are neither. With norms after the branches ``norm_1``
    is the identity, and what ``merge`` and ``feed`` return has been normed.
    """

    def __init__(self, block: nn.Module, attention_backend: str = "sdpa"):
        super().__init__()
        check_timm_block(block)
        for name, parameter in block.named_parameters(recurse=False):  # EVA's layer scales
            self.register_parameter(name, parameter)
        for name, module in block.named_children():
            self.add_module(name, module)
        self.after = type(block).__name__ == "EvaBlockPostNorm"
        self.attention_backend = attention_backend

    @override
    def norm_1(self, x: Tensor) -> Tensor:
        return x if self.after else self.norm1(x)

    @override
    def project(self, normed: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.attn
        if attn.qkv is None:
            q, k, v = (
                layer(normed).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
                for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
        else:
            if getattr(attn, "q_bias", None) is None:
                qkv = attn.qkv(normed)
            else:
                qkv = F.linear(
                    normed, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
                )
            q, k, v = split_heads(qkv, attn.num_heads)
        q = attn.q_norm(q)
        k = attn.k_norm(k)
        if rope is not None:
            half = getattr(attn, "rotate_half", False)
            q, k = (
                rotate(t, rope, prefix=attn.num_prefix_tokens, half=half).to(v.dtype)
                for t in (q, k)
            )
        return q, k, v

    @override
    def merge(self, o: Tensor) -> Tensor:
        attn = self.attn
        return self._branch(attn.proj_drop(attn.proj(attn.norm(o.transpose(1, 2).flatten(2)))), "1")

    @override
    def feed(self, x: Tensor) -> Tensor:
        return self._branch(self.mlp(x if self.after else self.norm2(x)), "2")

    def _branch(self, x: Tensor, which: str) -> Tensor:
        """Apply what follows a branch: a norm, or a layer scale; then stochastic depth."""
        if self.after:
            x = getattr(self, f"norm{which}")(x)
        elif (scale := getattr(self, f"gamma_{which}", None)) is not None:
            x = scale * x
        elif hasattr(self, f"ls{which}"):
            x = getattr(self, f"ls{which}")(x)
        return getattr(self, f"drop_path{which}")(x)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        first: int | None = None,
    ) -> Tensor:
        """Run the block as it is; the first arguments are those of timm's own forward.

        ``first`` is as in ``AttentionBlock``.
        """
        if is_causal:
            raise ValueError(
                "is_causal is True; expected False: the patches of an image tower see each other"
            )
        return super().forward(x, attn_mask=attn_mask, first=first, rope=rope)


class TimmVit(BlockTower):
    """timm's VisionTransformer or Eva.

    With x the tokens after the last block, and W what follows: fc_norm, timm's head and
    open_clip's, in this order.

    ===========  ============================  ====================================================
    pooling      embedding                     dense
    ===========  ============================  ====================================================
    class token  W norm(x_0)                   W norm(x_n)
    average      W mean_n(norm(x_n))           W norm(x_n)
    attention    W f(O attention(norm(x)))     W f(O V norm(x_n)),  f(y) = y + mlp(norm_p(y))
    ===========  ============================  ====================================================

    O and V are the pool's output and value projections, attention that of its learned query.
    Whether the pool looks at the prefix (PE's does, its class token) is timm's business; so is the
    rule by which positions, learned or rotary, stretch over another grid.
    """

    def __init__(self, visual: Any, stride: int | None = None, attention_backend: str = "sdpa"):
        trunk = visual.trunk
        self.visual = visual
        self.embedder = trunk.patch_embed
        self.hybrid = type(self.embedder).__name__ == "HybridEmbed"
        self._check_trunk()
        self.pooling = POOLINGS[trunk.global_pool]
        behind = " behind a convolutional stem" if self.hybrid else ""
        self.kind = f"timm's {type(trunk).__name__} pooled by {self.pooling}{behind}"
        for i, block in enumerate(trunk.blocks):
            trunk.blocks[i] = TimmBlock(block, attention_backend)
        self.prefix = trunk.num_prefix_tokens
        self.first = 1 if trunk.global_pool == "token" else None
        self.patch_size = patch_size_of(self.embedder.patch_size)
        if self.hybrid:
            self.patch_size *= patch_size_of(self.embedder.feature_ratio)
        self.overlaps = not self.hybrid
        self.stride = self.step(stride)
        self.image_size = image_size_of(visual)
        self.token_dim = trunk.embed_dim
        self.embed_dim = timm_embed_dim(visual)

    def _check_trunk(self) -> None:
        """Raise ValueError for what this class does not compute as timm does."""
        trunk = self.visual.trunk
        if trunk.global_pool not in POOLINGS:
            raise ValueError(
                f"the image tower is timm's {type(trunk).__name__} and pools by "
                f"{trunk.global_pool!r}; expected one of {list(POOLINGS)}"
            )
        rope = getattr(trunk, "rope", None)
        if rope is not None and type(rope).__name__ != "RotaryEmbeddingCat":
            raise ValueError(
                f"the image tower has positions of type {type(rope).__name__}; expected learned "
                "ones, or RotaryEmbeddingCat"
            )
        pool = getattr(trunk, "attn_pool", None)
        latent = type(pool).__name__ == "AttentionPoolLatent"
        if pool is not None and (not latent or pool.pos_embed is not None):
            raise ValueError(
                f"the image tower is pooled by {type(pool).__name__}; expected "
                "AttentionPoolLatent without positions"
            )
        patches = type(self.embedder).__name__
        if not self.hybrid and (patches != "PatchEmbed" or self.embedder.dynamic_img_pad):
            raise ValueError(
                f"the image tower has patches by {patches}; expected PatchEmbed without padding, "
                "or HybridEmbed"
            )

    @property
    @override
    def blocks(self) -> Sequence[AttentionBlock]:
        return list(self.visual.trunk.blocks)

    @override
    def sequence(self, images: Tensor) -> tuple[Tensor, Tensor | None, Grid]:
        self.check_size(images)
        trunk = self.visual.trunk
        embedder = self.embedder
        if self.hybrid:
            x = embedder.backbone(images)
            x = embedder.proj(x[-1] if isinstance(x, (list, tuple)) else x)
        else:
            x = F.conv2d(images, embedder.proj.weight, embedder.proj.bias, stride=self.stride)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        x = x if self.hybrid else embedder.norm(x)
        apart = trunk.pos_embed is not None and trunk.no_embed_class
        if apart:
            x = x + self._positions(grid, 0).to(x.dtype)
        first = [
            t.to(x.dtype).expand(len(x), -1, -1)
            for t in (trunk.cls_token, getattr(trunk, "reg_token", None))
            if t is not None
        ]
        x = torch.cat([*first, x], 1)
        if trunk.pos_embed is not None and not apart:
            x = x + self._positions(grid, self.prefix).to(x.dtype)
        return trunk.norm_pre(trunk.pos_drop(x)), self._rope(grid), grid

    def _positions(self, grid: Grid, prefix: int) -> Tensor:
        trained = tuple(self.embedder.grid_size)
        table = self.visual.trunk.pos_embed[0]
        return resize_positions(table, trained, grid, antialias=self.antialias, prefix=prefix)

    def _rope(self, grid: Grid) -> Tensor | None:
        """Return rotary positions [N, 2 d] of ``grid``, made where the model is.

        timm's own way to another grid copies from the host.
        """
        rope = getattr(self.visual.trunk, "rope", None)
        if rope is None:
            return None
        if grid == tuple(self.embedder.grid_size) and rope.pos_embed is not None:
            return rope.get_embed()
        return rope._build_embed_cat(list(grid), rope.bands)

    @override
    def pool(self, tokens: Tensor) -> Tensor:
        trunk = self.visual.trunk
        return self.visual.head(trunk.forward_head(trunk.norm(tokens)))

    @override
    def dense(self, tokens: Tensor) -> Tensor:
        trunk = self.visual.trunk
        x = trunk.norm(tokens)
        pool = getattr(trunk, "attn_pool", None)
        if pool is not None:
            D = pool.kv.weight.shape[0] // 2
            bias = None if pool.kv.bias is None else pool.kv.bias[D:]
            x = pool.proj_drop(pool.proj(F.linear(x, pool.kv.weight[D:], bias)))
            x = x if pool.mlp is None else x + pool.mlp(pool.norm(x))
        return self.visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(x))))


def image_tower(
    visual: Any, stride: int | None = None, attention_backend: str = "sdpa"
) -> ImageTower:
    """Return the tower over ``visual`` of an open_clip model; it takes its blocks over in place.

    Raises:
        ValueError: for a tower of another kind, and for a stride that it cannot have.
    """
    kind = type(visual).__name__
    if kind == "VisionTransformer":
        return ClipVit(visual, stride, attention_backend)
    if kind == "ModifiedResNet":
        return ClipResNet(visual, stride)
    trunk = getattr(visual, "trunk", None)
    if type(trunk).__name__ in ("VisionTransformer", "Eva"):
        return TimmVit(visual, stride, attention_backend)
    if trunk is not None and is_feature_map(visual):
        return FeatureMap(visual, stride)
    name = type(trunk).__name__ if trunk is not None else kind
    fixed = "RelPos" in name or name.startswith("Swin")
    because = ", whose tables of relative positions are those of one picture size" if fixed else ""
    raise ValueError(f"the image tower is {name}{because}; expected {SUPPORTED}")
