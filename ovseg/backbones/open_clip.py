"""Any CLIP ViT of open_clip as a backbone, with patch tokens taken by our own code.

open_clip has moved its final norm before and after pooling between releases; code that asks it for tokens silently
changes with the installed version. Here the blocks are walked one by one, so the tap means the same everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..layers.block import AttentionBlock, ClipBlock
from ..layers.positions import resize_positions
from ..layers.readout import READOUTS, Readout, run_blocks
from .base import ClipBackbone, PatchTokens
from .weights import clip_tokenizer, create_clip, import_open_clip


class ClipTokenizer:
    """The architecture's tokenizer, mostly CLIP's byte pairs as open_clip ships them; loaded on first use. ``[T, L]`` int64."""

    def __init__(self, architecture: str | dict[str, Any]):
        self.architecture = architecture
        self._tokenizer: Callable | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}  # open_clip's holds caches that cannot be pickled

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        if self._tokenizer is None:
            self._tokenizer = clip_tokenizer(self.architecture)
        return self._tokenizer([texts] if isinstance(texts, str) else list(texts))


@dataclass
class OpenClipOptions:
    """Of a preset and of ``create_model``.

    Attributes:
        architecture: open_clip's name, such as ``ViT-B-16-quickgelu`` (OpenAI's weights want QuickGELU), or the arguments of
            ``open_clip.CLIP``.
        clip: open_clip tag (downloads), a local file, or None for random weights. Files are read without running code.
        stride: step between patches in pixels; None is the patch size. A smaller step gives overlapping patches and a
            finer grid (PACL's stride trick: 4 for patches of 16).
        attention_backend: ``sdpa`` or ``xformers``.
    """

    architecture: Any = "ViT-B-16-quickgelu"
    clip: str | None = None
    stride: int | None = None
    attention_backend: str = "sdpa"


class OpenClipBackbone(ClipBackbone):
    """Arguments as in ``OpenClipOptions``; ``weights`` is its ``clip``."""

    def __init__(self, architecture: str | dict[str, Any], weights: str | None = None, stride: int | None = None,
                 attention_backend: str = "sdpa"):
        super().__init__()
        open_clip, clip = import_open_clip(), create_clip(architecture, weights)
        visual = clip.visual
        if not isinstance(visual, open_clip.transformer.VisionTransformer) or visual.attn_pool is not None:
            raise ValueError(f"architecture is {architecture!r}; expected a CLIP ViT without attention pooling")
        if visual.pool_type != "tok":
            raise ValueError(f"architecture {architecture!r} pools by {visual.pool_type!r}; expected a class token")
        block = visual.transformer.resblocks[0]
        if not isinstance(getattr(block, "attn", None), nn.MultiheadAttention):
            raise ValueError(f"architecture {architecture!r} has blocks of type {type(block).__name__}; expected CLIP's")
        towers: list[Any] = [visual.transformer, getattr(clip, "transformer", None)]
        plain = open_clip.transformer.ResidualAttentionBlock
        for tower in towers:
            if isinstance(getattr(tower, "resblocks", None), nn.ModuleList):
                tower.resblocks = nn.ModuleList(ClipBlock(b, attention_backend) if type(b) is plain else b for b in tower.resblocks)
        self.clip = clip
        self.architecture = architecture
        self.patch_size = visual.patch_size[0]
        self.stride = self.patch_size if stride is None else stride
        if not 1 <= self.stride <= self.patch_size:
            raise ValueError(f"stride is {stride}; expected 1 to {self.patch_size}, the patch size")
        self.image_size = visual.image_size[0]
        self.token_dim = visual.conv1.out_channels
        self.embed_dim = visual.output_dim
        self.image_mean = tuple(visual.preprocess_cfg["mean"]) if hasattr(visual, "preprocess_cfg") else open_clip.OPENAI_DATASET_MEAN
        self.image_std = tuple(visual.preprocess_cfg["std"]) if hasattr(visual, "preprocess_cfg") else open_clip.OPENAI_DATASET_STD
        self.tokenizer = ClipTokenizer(architecture)

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.clip.logit_scale

    def encode_patches(self, images: torch.Tensor, *, tap: str = "post_norm", readout: Readout = READOUTS["clip"]) -> PatchTokens:
        self._check_tap(tap)
        visual = self.clip.visual
        x, positions, grid = self._patches(images)
        x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + positions.to(x.dtype)
        tokens, cls = run_blocks(self.vision_blocks, visual.ln_pre(x), readout, grid)
        if tap == "post_norm":
            tokens, cls = visual.ln_post(tokens), visual.ln_post(cls)
        return PatchTokens(tokens, grid, cls)

    def _patches(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """(patches [B, N, D], positions [1 + N, D] of this grid, grid)."""
        visual = self.clip.visual
        if images.shape[-1] < self.patch_size or images.shape[-2] < self.patch_size:
            raise ValueError(f"images have size {tuple(images.shape[-2:])}; expected at least one patch of {self.patch_size}")
        x = F.conv2d(images, visual.conv1.weight, visual.conv1.bias, stride=self.stride)
        grid = (x.shape[2], x.shape[3])
        trained = (visual.grid_size[0], visual.grid_size[1])
        positions = resize_positions(visual.positional_embedding, trained, grid, antialias=self.antialias_positions)
        return x.flatten(2).transpose(1, 2), positions, grid

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        x, positions, grid = self._patches(images)
        return self.clip.visual.ln_pre(x + positions[1:].to(x.dtype)), grid

    @property
    def class_token(self) -> nn.Parameter:
        return self.clip.visual.class_embedding

    @property
    def vision_blocks(self) -> Sequence[AttentionBlock]:
        return self.clip.visual.transformer.resblocks

    @property
    def text_blocks(self) -> Sequence[AttentionBlock]:  # type: ignore[override]
        return self.clip.transformer.resblocks if isinstance(getattr(self.clip, "transformer", None), nn.Module) else ()

    def new_blocks(self, count: int) -> nn.ModuleList:
        new = nn.ModuleList(copy.deepcopy(self.vision_blocks[-1]) for _ in range(count))
        for block in new:
            block.reset_parameters()
        return new

    def final_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.clip.visual.ln_post(tokens)

    def embedding_parameters(self) -> list[nn.Parameter]:
        visual = self.clip.visual
        modules = [*visual.conv1.parameters(), *visual.ln_pre.parameters(), *self.clip.token_embedding.parameters()]
        return [visual.positional_embedding, self.clip.positional_embedding, *modules]

    def vision_parameters(self, tap: str = "post_norm") -> list[nn.Parameter]:
        self._check_tap(tap)
        visual = self.clip.visual
        modules = [visual.conv1, visual.ln_pre, visual.transformer] + ([visual.ln_post] if tap == "post_norm" else [])
        return [visual.class_embedding, visual.positional_embedding, *(p for m in modules for p in m.parameters())]

    def text_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.clip.named_parameters() if not name.startswith(("visual.", "logit_"))]

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if self.clip.visual.proj is None else tokens @ self.clip.visual.proj

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.project(self.encode_patches(images).cls)

    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """As open_clip does it, but for texts of any length up to the context's, and only as far as the longest one goes."""
        clip = self.clip
        if not isinstance(getattr(clip, "text_projection", None), nn.Parameter) or clip.text_pool_type != "argmax":
            return clip.encode_text(token_ids)
        end, device = token_ids.argmax(-1), clip.token_embedding.weight.device
        # Nothing looks behind the end: attention is causal. A graph does not have that number, a GPU would have to be waited for.
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            token_ids = token_ids[:, : int(end.max()) + 1]
        token_ids, end = token_ids.to(device), end.to(device)
        x = clip.token_embedding(token_ids) + clip.positional_embedding[: token_ids.shape[1]]
        mask = None if clip.attn_mask is None else clip.attn_mask[: x.shape[1], : x.shape[1]].to(x.dtype)
        for block in self.text_blocks:
            x = block(x, attn_mask=mask)
        return clip.ln_final(x[torch.arange(len(x), device=x.device), end]) @ clip.text_projection
