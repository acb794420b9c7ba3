"""The blocks of timm's ViTs as modules in parts, like ``ClipBlock``. timm itself is not imported.

timm's ViTs as open_clip takes them (VisionTransformer, Eva): SigLIP, PE, EVA, MobileCLIP's ViT,
ViTamin.

Image towers by kind: one small class for each way that open_clip's models see a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import AttentionBlock, attention
from .towers import (
    BlockTower,
    ClipResNet,
    ClipVit,
    Encoded,
    FeatureMap,
    ImageTower,
    image_size_of,
    is_feature_map,
    patch_size_of,
    timm_embed_dim,
)
from .vit_blocks import resize_positions, rotate

KINDS = ("Block", "EvaBlock", "EvaBlockPostNorm")


def check_timm_block(block: nn.Module) -> None:
    """Raises ValueError for a block that ``TimmBlock`` would not compute as timm does."""
    kind, attn = type(block).__name__, getattr(block, "attn", None)
    if kind not in KINDS or type(attn).__name__ not in (
        "Attention",
        "EvaAttention",
        "AttentionRope",
    ):
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
    """timm's Block, EvaBlock or EvaBlockPostNorm over its own parts, under their own names: state
    dicts do not change.

    Queries and keys are normed where the block does that, then turned (``rope``); values are
    neither. With norms after the branches ``norm_1`` is the identity, and what ``merge`` and
    ``feed`` return has been normed.
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

    def norm_1(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.after else self.norm1(x)

    def project(
        self, normed: torch.Tensor, rope: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
            q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            half = getattr(attn, "rotate_half", False)
            q, k = (
                rotate(t, rope, prefix=attn.num_prefix_tokens, half=half).to(v.dtype)
                for t in (q, k)
            )
        return q, k, v

    def merge(self, o: torch.Tensor) -> torch.Tensor:
        attn = self.attn
        return self._branch(attn.proj_drop(attn.proj(attn.norm(o.transpose(1, 2).flatten(2)))), "1")

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return self._branch(self.mlp(x if self.after else self.norm2(x)), "2")

    def _branch(self, x: torch.Tensor, which: str) -> torch.Tensor:
        """What stands between a branch and the residual stream: a norm, or a layer scale; then
        stochastic depth.
        """
        if self.after:
            x = getattr(self, f"norm{which}")(x)
        elif (scale := getattr(self, f"gamma_{which}", None)) is not None:
            x = scale * x
        elif hasattr(self, f"ls{which}"):
            x = getattr(self, f"ls{which}")(x)
        return getattr(self, f"drop_path{which}")(x)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        *,
        first: int | None = None,
    ) -> torch.Tensor:
        """The block as it is; the first arguments as timm's own forward gives them.

        ``first`` as in ``AttentionBlock``.
        """
        if is_causal:
            raise ValueError(
                "is_causal is True; expected False: the patches of an image tower see each other"
            )
        q, k, v = self.project(self.norm_1(x), rope)
        x = x[:, :first] + self.merge(
            attention(q[:, :, :first], k, v, mask=attn_mask, backend=self.attention_backend)
        )
        return x + self.feed(x)


POOLINGS = {"token": "class token", "avg": "average", "map": "attention"}


class TimmVit(BlockTower):
    """With x the tokens after the last block, and W what follows: fc_norm, timm's head and
    open_clip's, in this order.

    =========================  ==============================  ======================================================
    pooling                    embedding                       dense
    =========================  ==============================  ======================================================
    class token                W norm(x_0)                     W norm(x_n)
    average                    W mean_n(norm(x_n))             W norm(x_n)
    attention                  W f(O attention(norm(x)))       W f(O V norm(x_n)),  f(y) = y + mlp(norm_p(y))
    =========================  ==============================  ======================================================

    O and V are the pool's output and value projections, attention that of its learned query.
    Whether the pool looks at the prefix (PE's does, its class token) is timm's business; so is the
    rule by which positions, learned or rotary, stretch over another grid.
    """

    def __init__(self, visual: Any, stride: int | None = None, attention_backend: str = "sdpa"):
        self.visual, trunk = visual, visual.trunk
        name, rope = type(trunk).__name__, getattr(trunk, "rope", None)
        if trunk.global_pool not in POOLINGS:
            raise ValueError(
                f"the image tower is timm's {name} and pools by {trunk.global_pool!r}; expected "
                f"one of {list(POOLINGS)}"
            )
        if rope is not None and type(rope).__name__ != "RotaryEmbeddingCat":
            raise ValueError(
                f"the image tower has positions of type {type(rope).__name__}; expected learned "
                "ones, or RotaryEmbeddingCat"
            )
        pool = getattr(trunk, "attn_pool", None)
        if pool is not None and (
            type(pool).__name__ != "AttentionPoolLatent" or pool.pos_embed is not None
        ):
            raise ValueError(
                f"the image tower is pooled by {type(pool).__name__}; expected "
                "AttentionPoolLatent without positions"
            )
        self.embedder = trunk.patch_embed
        self.hybrid = type(self.embedder).__name__ == "HybridEmbed"
        if not self.hybrid and (
            type(self.embedder).__name__ != "PatchEmbed" or self.embedder.dynamic_img_pad
        ):
            raise ValueError(
                f"the image tower has patches by {type(self.embedder).__name__}; expected "
                "PatchEmbed without padding, or "
                "HybridEmbed"
            )
        self.pooling = POOLINGS[trunk.global_pool]
        self.kind = f"timm's {name} pooled by {self.pooling}" + (
            " behind a convolutional stem" if self.hybrid else ""
        )
        for i, block in enumerate(trunk.blocks):
            trunk.blocks[i] = TimmBlock(block, attention_backend)
        self.prefix = trunk.num_prefix_tokens
        self.first = 1 if trunk.global_pool == "token" else None
        patch = patch_size_of(self.embedder.patch_size)
        self.patch_size = (
            patch * patch_size_of(self.embedder.feature_ratio) if self.hybrid else patch
        )
        self.overlaps = not self.hybrid
        self.stride = self.step(stride)
        self.image_size, self.token_dim, self.embed_dim = (
            image_size_of(visual),
            trunk.embed_dim,
            timm_embed_dim(visual),
        )

    @property
    def blocks(self) -> Sequence[AttentionBlock]:
        return list(self.visual.trunk.blocks)

    def sequence(
        self, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[int, int]]:
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
        first = [
            t.to(x.dtype).expand(len(x), -1, -1)
            for t in (trunk.cls_token, getattr(trunk, "reg_token", None))
            if t is not None
        ]
        positions = trunk.pos_embed
        if positions is None:
            x = torch.cat([*first, x], 1)
        else:
            prefix = 0 if trunk.no_embed_class else self.prefix
            positions = resize_positions(
                positions[0],
                tuple(embedder.grid_size),
                grid,
                antialias=self.antialias,
                prefix=prefix,
            ).to(x.dtype)
            x = (
                torch.cat([*first, x + positions], 1)
                if trunk.no_embed_class
                else torch.cat([*first, x], 1) + positions
            )
        return trunk.norm_pre(trunk.pos_drop(x)), self._rope(grid), grid

    def _rope(self, grid: tuple[int, int]) -> torch.Tensor | None:
        """[N, 2 d]: of ``grid``, made where the model is: timm's own way to another grid copies
        from the host.
        """
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
            x = pool.proj_drop(
                pool.proj(
                    F.linear(
                        x,
                        pool.kv.weight[value:],
                        None if pool.kv.bias is None else pool.kv.bias[value:],
                    )
                )
            )
            x = x if pool.mlp is None else x + pool.mlp(pool.norm(x))
        return self.visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(x))))


def is_timm_vit(trunk: nn.Module) -> bool:
    """Whether ``TimmVit`` knows how the tokens of ``trunk`` are made."""
    return type(trunk).__name__ in ("VisionTransformer", "Eva")


__all__ = ["ClipVit", "Encoded", "ImageTower", "image_tower"]

SUPPORTED = (
    "open_clip's VisionTransformer and ModifiedResNet, timm's VisionTransformer and Eva, and "
    "timm's towers whose map "
    "[B, D, h, w] is averaged (ConvNeXt, FastViT)"
)


def image_tower(
    visual: Any, stride: int | None = None, attention_backend: str = "sdpa"
) -> ImageTower:
    """The tower over ``visual`` of an open_clip model; its blocks are taken over in place.

    Raises:
        ValueError: for a tower of another kind, and for a stride that it cannot have.
    """
    kind = type(visual).__name__
    if kind == "VisionTransformer":
        return ClipVit(visual, stride, attention_backend)
    if kind == "ModifiedResNet":
        return ClipResNet(visual, stride)
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and is_timm_vit(trunk):
        return TimmVit(visual, stride, attention_backend)
    if trunk is not None and is_feature_map(visual):
        return FeatureMap(visual, stride)
    name = type(trunk).__name__ if trunk is not None else kind
    fixed = "RelPos" in name or name.startswith("Swin")
    because = ", whose tables of relative positions are those of one picture size" if fixed else ""
    raise ValueError(f"the image tower is {name}{because}; expected {SUPPORTED}")
