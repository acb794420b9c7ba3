"""What a CLIP backbone offers to the systems: dense patch tokens, an image embedding, text embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..layers.readout import READOUTS, Block, Readout

Tokenizer = Callable[[str | Sequence[str]], torch.Tensor]
TAPS = ("local", "pre_norm", "post_norm")


class PatchTokens(NamedTuple):
    """``tokens`` [B, N, D_v] in row-major order of ``grid`` (h, w); ``cls`` [B, D_v] or None."""

    tokens: torch.Tensor
    grid: tuple[int, int]
    cls: torch.Tensor | None


class ClipBackbone(nn.Module):
    """Base class. ``token_dim`` is D_v, ``embed_dim`` the width D shared by images and texts."""

    token_dim: int
    embed_dim: int
    patch_size: int
    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    tokenizer: Tokenizer
    logit_scale: nn.Parameter
    taps: tuple[str, ...] = ("pre_norm", "post_norm")
    antialias_positions: bool = True  # how position embeddings are resized to another grid, where there are any

    def encode_patches(self, images: torch.Tensor, *, tap: str = "post_norm", readout: Readout = READOUTS["clip"]) -> PatchTokens:
        """Patch tokens of normalised ``images`` [B, 3, H, W], taken before or after the final norm; ``readout`` changes the last
        attention for the patches alone."""
        raise NotImplementedError

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Post-norm tokens [..., D_v] to the shared space [..., D], CLIP's own projection."""
        raise NotImplementedError

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """CLIP's image embedding [B, D], not normalised."""
        raise NotImplementedError

    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Text embeddings [T, D], not normalised."""
        raise NotImplementedError

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """(patch tokens [B, N, D_v] as the first block sees them, without a class token; grid)."""
        raise NotImplementedError

    @property
    def class_token(self) -> nn.Parameter:
        raise NotImplementedError

    @property
    def trunk(self) -> list[Block]:
        """The blocks of the vision tower."""
        raise NotImplementedError

    def new_blocks(self, count: int) -> nn.ModuleList:
        """Blocks like those of the trunk, with weights of their own."""
        raise NotImplementedError

    def as_blocks(self, modules: nn.ModuleList) -> list[Block]:
        """What ``new_blocks`` made, as ``layers.readout`` walks over it."""
        raise NotImplementedError

    def final_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        """The norm after the last block."""
        raise NotImplementedError

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Of patches, positions and words, and of the norm before the first block: what fine-tuning keeps."""
        raise NotImplementedError

    def pretrained_parameters(self, blocks: int) -> list[nn.Parameter]:
        """The first ``blocks`` blocks of the trunk, the text tower and the logit scale."""
        return [*self.text_parameters(), self.logit_scale]

    def vision_parameters(self, tap: str) -> list[nn.Parameter]:
        """What ``encode_patches`` with this tap depends on."""
        raise NotImplementedError

    def text_parameters(self) -> list[nn.Parameter]:
        """What ``encode_text`` depends on."""
        raise NotImplementedError

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """RGB in 0..1, [B, 3, H, W], to what this backbone was trained on."""
        mean = pixels.new_tensor(self.image_mean)[:, None, None]
        return (pixels - mean) / pixels.new_tensor(self.image_std)[:, None, None]

    def _check_tap(self, tap: str) -> None:
        if tap not in self.taps:
            raise ValueError(f"tap is {tap!r}; expected one of {list(self.taps)}")
