"""Image towers of open_clip's models: pictures to tokens and an embedding.

A tower is no module: it walks over the parts of open_clip's image tower, whose parameters keep
their names.

    embedding = pool(tokens)             what the model was trained with                         (1)
    dense     = pool of the token alone, as if all that is pooled were like it                   (2)

(2) is the dense map of every head (docs/towers.md): if the tokens are alike, dense and embedding
are the same. Here are the contract, open_clip's own ViT, and the towers that end in a map: CLIP's
ResNet, and timm's ConvNeXt and FastViT. timm's ViTs are in ``timm_towers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from .blocks import AttentionBlock, ClipBlock, attention
from .features import Grid, PatchFeatures
from .readout import CLIP, READOUTS, Pooling, ProxyFeatures, Readout, run_blocks, run_plain
from .vit_blocks import resize_positions


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
        """Blocks that a readout can change."""
        return ()

    def encode(
        self, images: Tensor, readout: Readout = CLIP, proxy: ProxyFeatures | None = None
    ) -> PatchFeatures:
        """Return the embedding [B, E] of (1), and tokens [B, N, D] before the head."""
        raise NotImplementedError

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the embedding [B, E] of (1) alone."""
        return self.encode(images).embedding

    def dense(self, tokens: Tensor) -> Tensor:
        """Bring tokens before the head [B, N, D] to [B, N, E] by (2)."""
        raise NotImplementedError

    def check_readout(self, readout: Readout) -> None:
        """Raise ValueError for a readout that this tower does not have."""

    def step(self, stride: int | None) -> int:
        """Return ``stride``, or the patch size if None.

        Raises:
            ValueError: for a step that this tower cannot have.
        """
        if stride is not None and not 1 <= stride <= self.patch_size:
            raise ValueError(f"stride is {stride}; expected 1 to {self.patch_size}, the patch size")
        if stride not in (None, self.patch_size) and not self.overlaps:
            raise ValueError(
                f"stride is {stride} and the image tower is {self.kind}; expected None: a smaller "
                "step needs a tower that cuts the picture into patches by one convolution"
            )
        return self.patch_size if stride is None else stride

    def check_size(self, images: Tensor) -> None:
        """Raise ValueError for pictures smaller than a patch."""
        if min(images.shape[-2:]) < self.patch_size:
            raise ValueError(
                f"images have size {tuple(images.shape[-2:])}; expected at least one patch of "
                f"{self.patch_size}"
            )


class BlockTower(ImageTower):
    """Towers of transformer blocks.

    Attributes:
        prefix: how many tokens stand before the patches: a class token and registers, or none.
        first: how many of the leading tokens the pooling looks at; None for all.
    """

    prefix: int
    first: int | None

    def sequence(self, images: Tensor) -> tuple[Tensor, Tensor | None, Grid]:
        """Return (tokens [B, prefix + N, D] for the first block, rotary positions, grid)."""
        raise NotImplementedError

    def pool(self, tokens: Tensor) -> Tensor:
        """Make the embeddings [B, E] of (1) from the last block's [B, prefix + N, D]."""
        raise NotImplementedError

    @override
    def encode(
        self, images: Tensor, readout: Readout = CLIP, proxy: ProxyFeatures | None = None
    ) -> PatchFeatures:
        x, rope, grid = self.sequence(images)
        pooling = Pooling(self.pool, self.prefix, self.first)
        return run_blocks(self.blocks, x, readout, grid, pooling=pooling, rope=rope, proxy=proxy)

    @override
    def encode_image(self, images: Tensor) -> Tensor:
        x, rope, _ = self.sequence(images)
        return self.pool(run_plain(self.blocks, x, rope=rope, first=self.first))


class MapTower(ImageTower):
    """Towers that end in a map of features and have no attention that a readout could change."""

    def features(self, images: Tensor) -> Tensor:
        """Return the map [B, D, h, w] before the pooling."""
        raise NotImplementedError

    def pool(self, features: Tensor) -> Tensor:
        """Make the embeddings [B, E] of (1) from the map [B, D, h, w]."""
        raise NotImplementedError

    @override
    def encode(
        self, images: Tensor, readout: Readout = CLIP, proxy: ProxyFeatures | None = None
    ) -> PatchFeatures:
        self.check_readout(readout)
        self.check_size(images)
        x = self.features(images)
        return PatchFeatures(self.pool(x), x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]))

    @override
    def check_readout(self, readout: Readout) -> None:
        if readout != CLIP:
            names = [name for name, known in READOUTS.items() if known == readout]
            raise ValueError(
                f"readout is {names[0] if names else readout!r} and the image tower is "
                f"{self.kind}, whose last layers are no attention over patches; expected 'clip'"
            )


def patch_size_of(size: int | Sequence[int]) -> int:
    """Return the side of square patches in pixels."""
    side = [size, size] if isinstance(size, int) else list(size)
    if side[0] != side[1]:
        raise ValueError(f"the image tower has patches of {tuple(side)}; expected square ones")
    return int(side[0])


def image_size_of(visual: Any) -> int:
    """Return the shorter side in pixels of the pictures that open_clip's tower was made for."""
    size = visual.image_size
    return int(size if isinstance(size, int) else min(size))


def timm_embed_dim(visual: Any) -> int:
    """Return E of timm's tower: of open_clip's head, or of timm's own if that is the projection."""
    linear = [module for module in visual.head.modules() if isinstance(module, nn.Linear)]
    if linear:
        return linear[-1].out_features
    return visual.trunk.num_classes or visual.trunk.num_features


class ClipVit(BlockTower):
    """open_clip's own ViT, pooled by class token, average or attention.

    With x the tokens after the last block, class token first, and W the projection:

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
            raise ValueError(
                f"the image tower has two attention poolings ({visual.attn_pool_type!r}); "
                "expected one, as CoCa has it"
            )
        if visual.attn_pool is None and visual.pool_type not in ("tok", "avg"):
            raise ValueError(
                f"the image tower pools by {visual.pool_type!r}; expected 'tok', 'avg' or attention"
            )
        self.pooling = {"tok": "class token", "avg": "average"}.get(visual.pool_type, "")
        if visual.attn_pool is not None:
            self.pooling = "attention"
        self.first = 1 if self.pooling == "class token" else None
        self.kind = f"open_clip's ViT pooled by {self.pooling}"
        blocks = visual.transformer.resblocks
        if not isinstance(getattr(blocks[0], "attn", None), nn.MultiheadAttention):
            raise ValueError(
                f"the image tower has blocks of type {type(blocks[0]).__name__}; expected CLIP's"
            )
        visual.transformer.resblocks = nn.ModuleList(
            ClipBlock(block, attention_backend) for block in blocks
        )
        self.patch_size = patch_size_of(visual.patch_size)
        self.image_size = image_size_of(visual)
        self.stride = self.step(stride)
        self.token_dim = visual.conv1.out_channels
        self.embed_dim = visual.output_dim

    @property
    @override
    def blocks(self) -> Sequence[AttentionBlock]:
        return self.visual.transformer.resblocks

    def patches(self, images: Tensor) -> tuple[Tensor, Tensor, Grid]:
        """Return (patches [B, N, D], positions [1 + N, D] of this grid, grid)."""
        self.check_size(images)
        visual = self.visual
        x = F.conv2d(images, visual.conv1.weight, visual.conv1.bias, stride=self.stride)
        grid = (x.shape[2], x.shape[3])
        positions = self._positions(visual.positional_embedding, grid)
        return x.flatten(2).transpose(1, 2), positions, grid

    def _positions(self, table: Tensor, grid: Grid) -> Tensor:
        trained = (self.visual.grid_size[0], self.visual.grid_size[1])
        return resize_positions(
            table, trained, grid, antialias=self.antialias, mode=self.interpolation
        )

    def set_image_size(self, size: int, interpolation: str) -> None:
        """Take pictures of another size, see ``ClipBackbone.set_image_size``."""
        if size < self.patch_size or size % self.patch_size:
            raise ValueError(
                f"image_size is {size}; expected a multiple of the patch, {self.patch_size} pixels"
            )
        self.interpolation = interpolation
        self.image_size = size
        visual = self.visual
        grid = (size // self.patch_size, size // self.patch_size)
        old = visual.positional_embedding
        table = self._positions(old.detach(), grid).clone()
        visual.positional_embedding = nn.Parameter(table, requires_grad=old.requires_grad)
        visual.grid_size = grid
        visual.image_size = (size, size)

    def tokens(
        self, images: Tensor, readout: Readout, proxy: ProxyFeatures | None
    ) -> PatchFeatures:
        """Return class token [B, D] and patches after the last block, before the final norm."""
        x, _, grid = self.sequence(images)
        return run_blocks(self.blocks, x, readout, grid, proxy=proxy)

    @override
    def sequence(self, images: Tensor, class_weight: float = 1.0) -> tuple[Tensor, None, Grid]:
        x, positions, grid = self.patches(images)
        cls = (class_weight * self.visual.class_embedding).to(x.dtype)
        x = torch.cat([cls.expand(len(x), 1, -1), x], dim=1) + positions.to(x.dtype)
        return self.visual.ln_pre(x), None, grid

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Return (patches [B, N, D] for the first block, without the class token; grid)."""
        x, positions, grid = self.patches(images)
        return self.visual.ln_pre(x + positions[1:].to(x.dtype)), grid

    @override
    def pool(self, tokens: Tensor) -> Tensor:
        visual = self.visual
        if visual.attn_pool is not None:
            pooled = visual.ln_post(visual.attn_pool(tokens))
            first = visual.pool_type == "tok"
            return self.project(pooled[:, 0] if first else pooled[:, 1:].mean(1))
        if visual.pool_type == "tok":
            return self.project(visual.ln_post(tokens[:, 0]))
        if visual.final_ln_after_pool:
            return self.project(visual.ln_post(tokens[:, 1:].mean(1)))
        return self.project(visual.ln_post(tokens[:, 1:]).mean(1))

    @override
    def dense(self, tokens: Tensor) -> Tensor:
        pool = self.visual.attn_pool
        if pool is not None:
            attn = pool.attn
            packed = attn.in_proj_weight
            weight = attn.v_proj_weight if packed is None else packed.chunk(3)[2]
            values = F.linear(pool.ln_k(tokens), weight, attn.in_proj_bias.chunk(3)[2])
            tokens = attn.out_proj(values)
        return self.project(self.visual.ln_post(tokens))

    def project(self, tokens: Tensor) -> Tensor:
        """Multiply by the projection W, where there is one."""
        return tokens if self.visual.proj is None else tokens @ self.visual.proj


class FeatureMap(MapTower):
    """timm's convolutional towers, pooled by their average: ConvNeXt, FastViT.

    With x the map before the pooling and W all that follows it, norms and MLPs included, timm's
    head, then open_clip's:

        embedding = W(mean_n(x_n))        dense = W(x_n)

    Where W is linear, the mean over the dense map is the embedding. W comes per token by giving
    each token to the head as a map of its own of one patch, whose average it is.
    """

    pooling = "average"

    def __init__(self, visual: Any, stride: int | None = None):
        trunk = visual.trunk
        self.visual = visual
        self.kind = f"timm's {type(trunk).__name__}, convolutional"
        self.patch_size = int(trunk.feature_info[-1]["reduction"])
        self.image_size = image_size_of(visual)
        self.token_dim = trunk.num_features
        self.embed_dim = timm_embed_dim(visual)
        self.stride = self.step(stride)

    @override
    def features(self, images: Tensor) -> Tensor:
        return self.visual.trunk.forward_features(images)

    @override
    def pool(self, features: Tensor) -> Tensor:
        return self.visual.head(self.visual.trunk.forward_head(features))

    @override
    def dense(self, tokens: Tensor) -> Tensor:
        return self.pool(tokens.flatten(0, 1)[..., None, None]).unflatten(0, tokens.shape[:2])


def is_feature_map(visual: Any) -> bool:
    """Return whether the tower ends in a map [B, D, h, w] that timm's head averages first."""
    head = getattr(visual.trunk, "head", None)
    kind = getattr(getattr(head, "global_pool", None), "pool_type", None)
    if kind not in ("avg", "fast", "fastavg") or getattr(head, "input_fmt", "NCHW") != "NCHW":
        return False
    after = visual.head
    return isinstance(after, nn.Sequential) and "pool" not in dict(after.named_children())


class ClipResNet(MapTower):
    """CLIP's ResNet, with attention pooling.

    With x the last map, p the pool's positions, Q, K, V and C its projections, and x_0 the mean of
    the patches:

        embedding = C attention(Q (x_0 + p_0), K (x + p), V (x + p))        dense = C V x_n

    Positions say where a patch is, and a patch's own vector should say what it is: they are left
    out. Tokens that are alike give the embedding exactly where V p is zero.
    """

    pooling = "attention"
    kind = "CLIP's ResNet, convolutional"
    patch_size = 32

    def __init__(self, visual: Any, stride: int | None = None):
        self.visual = visual
        self.image_size = image_size_of(visual)
        self.token_dim = visual.attnpool.v_proj.in_features
        self.embed_dim = visual.output_dim
        self.stride = self.step(stride)

    @override
    def features(self, images: Tensor) -> Tensor:
        visual = self.visual
        return visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))

    @override
    def pool(self, features: Tensor) -> Tensor:
        pool = self.visual.attnpool
        side = self.image_size // self.patch_size
        grid = (features.shape[2], features.shape[3])
        positions = resize_positions(
            pool.positional_embedding, (side, side), grid, antialias=self.antialias
        )
        x = features.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + positions.to(x.dtype)
        q, k, v = (
            layer(t).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
            for layer, t in ((pool.q_proj, x[:, :1]), (pool.k_proj, x), (pool.v_proj, x))
        )
        return pool.c_proj(attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]

    @override
    def dense(self, tokens: Tensor) -> Tensor:
        pool = self.visual.attnpool
        return pool.c_proj(pool.v_proj(tokens))
