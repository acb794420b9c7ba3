"""Towers: what a system builds on.

A vision tower gives patch tokens, a text tower embeddings; a CLIP is both with one scale.

Backbones by kind, a file each: ``open_clip``, ``tiny``, and ``grouping``, the towers of GroupViT
and OVSegmentor.

A file holds its options, a dataclass, and its class; ``KINDS`` says their names. It is imported
when it is asked for: open_clip imports torchvision, and the tiny models do without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..options import options_of
from ..registration import Registry, named
from .blocks import AttentionBlock
from .readout import READOUTS, ProxyFeatures, Readout

Tokenizer = Callable[[str | Sequence[str]], torch.Tensor]


class PatchTokens(NamedTuple):
    """``tokens`` [B, N, D_v] in row-major order of ``grid`` (h, w); ``cls`` [B, D_v] or None."""

    tokens: torch.Tensor
    grid: tuple[int, int]
    cls: torch.Tensor | None


class DenseTokens(NamedTuple):
    """In the space of the texts, not normalised: ``embedding`` [B, E], ``tokens`` [B, N, E] in
    row-major order of ``grid`` (h, w).
    """

    embedding: torch.Tensor
    tokens: torch.Tensor
    grid: tuple[int, int]


class VisionTower(Protocol):
    """Pictures to patch tokens.

    Attributes:
        token_dim: D_v.
        patch_size, image_size: in pixels; of a patch, and of the pictures it was trained on.
        image_mean, image_std: of RGB in 0..1.
    """

    token_dim: int
    patch_size: int
    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def encode_patches(self, images: torch.Tensor) -> PatchTokens:
        """Patch tokens of normalised ``images`` [B, 3, H, W], after the final norm."""

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [..., D_v] to the space of the texts [..., E]."""


class TextTower(Protocol):
    """Texts to embeddings.

    Attributes:
        tokenizer: texts to token ids [T, L].
        embed_dim: E.
    """

    tokenizer: Tokenizer
    embed_dim: int

    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Text embeddings [T, E], not normalised."""


class ClipBackbone(nn.Module):
    """Both towers of a CLIP, with patch tokens taken by our own code.

    Base class of ``open_clip`` and ``tiny``.

    Attributes:
        taps: where ``encode_patches`` can take tokens.
        antialias_positions: how position embeddings are resized to another grid, where there are
            any.
        logit_bias: what SigLIP adds to its scaled cosines, or None.
    """

    token_dim: int
    embed_dim: int
    patch_size: int
    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    tokenizer: Tokenizer
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None = None
    text_blocks: Sequence[AttentionBlock]
    taps: tuple[str, ...] = ("pre_norm", "post_norm")
    antialias_positions: bool = True

    def encode_patches(
        self,
        images: torch.Tensor,
        *,
        tap: str = "post_norm",
        readout: Readout = READOUTS["clip"],
        proxy: ProxyFeatures | None = None,
    ) -> PatchTokens:
        """Patch tokens of normalised ``images`` [B, 3, H, W], taken before or after the final norm;
        ``readout`` changes the last attention for the patches alone, with a second encoder's
        patches ``proxy`` where it needs them.
        """
        raise NotImplementedError

    def encode_dense(
        self,
        images: torch.Tensor,
        readout: Readout = READOUTS["clip"],
        proxy: ProxyFeatures | None = None,
    ) -> DenseTokens:
        """The image embedding and the dense map of ``images``, whatever makes the embedding of the
        tokens (docs/towers.md).
        """
        found = self.encode_patches(images, readout=readout, proxy=proxy)
        assert found.cls is not None
        return DenseTokens(self.project(found.cls), self.project(found.tokens), found.grid)

    def text_facts(self) -> Any:
        """What a text's embedding depends on beside ``text_parameters``, for JSON: two
        architectures may hold the same tensors.
        """
        return None

    def lasting_options(self) -> dict[str, Any]:
        """Options beside those that built it which a saved folder needs, because they came with
        weights that it does not name.
        """
        return {}

    def resize_positions(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``state``, under the names of this module, with tables of positions of another size
        resized to the module's."""
        return state

    def check_readout(self, readout: Readout) -> None:
        """Raises ValueError for a readout that the vision tower does not have."""

    def check_class_token(self, system: str) -> None:
        """Raises ValueError unless the vision tower is what ``system`` builds on: blocks over a
        class token and patches.
        """

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Post-norm tokens [..., D_v] to the shared space [..., E], CLIP's own projection."""
        raise NotImplementedError

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """CLIP's image embedding [B, E], not normalised."""
        raise NotImplementedError

    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Text embeddings [T, E], not normalised.

        Ids may be on the CPU wherever the tower is: texts shorter than the context are cheaper from
        there, because their length is known.
        """
        raise NotImplementedError

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """(patch tokens [B, N, D_v] as the first block sees them, without a class token; grid)."""
        raise NotImplementedError

    def sequence(
        self, images: torch.Tensor, class_weight: float = 1.0
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """(tokens [B, 1 + N, D_v] as the first block sees them, the class token first; grid).

        ``class_weight`` times the class token.
        """
        raise NotImplementedError

    def set_image_size(self, size: int, interpolation: str) -> None:
        """Pictures of another size from now on: position embeddings, where there are any, are
        resized once, in place, and again for every other grid, by ``interpolation`` (bicubic,
        bilinear).
        """
        raise NotImplementedError

    def final_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        """The norm after the last block."""
        raise NotImplementedError

    @property
    def vision_blocks(self) -> Sequence[AttentionBlock]:
        raise NotImplementedError

    @property
    def class_token(self) -> nn.Parameter:
        raise NotImplementedError

    def new_blocks(self, count: int) -> nn.ModuleList:
        """Blocks like those of the vision tower, with weights of their own."""
        raise NotImplementedError

    def vision_parameters(self, tap: str = "post_norm") -> list[nn.Parameter]:
        """What ``encode_patches`` with this tap depends on."""
        raise NotImplementedError

    def text_parameters(self) -> list[nn.Parameter]:
        """What ``encode_text`` depends on."""
        raise NotImplementedError

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Of patches, positions and words, and of the norm before the first block: what fine-tuning
        keeps.
        """
        raise NotImplementedError

    def _check_tap(self, tap: str) -> None:
        if tap not in self.taps:
            raise ValueError(f"tap is {tap!r}; expected one of {list(self.taps)}")


# The classes, each with its ``Options``. They are imported when they are asked for: open_clip
# imports torchvision, and the tiny models do without it.
BACKBONES: Registry[Any] = Registry(
    "backbone.kind",
    lambda: named(
        {
            "grouping": "ovseg.nn.grouping_towers:GroupingBackbone",
            "open_clip": "ovseg.nn.open_clip:OpenClipBackbone",
            "tiny": "ovseg.nn.tiny:TinyClip",
        }
    ),
    ValueError,
)


def build_backbone(kind: str, **options: Any) -> ClipBackbone:
    """Build a backbone of random weights, or with those that ``options`` name."""
    backbone = BACKBONES[kind]
    given = dict(vars(options_of(backbone.Options, options, "backbone")))
    if "clip" in given:
        given["weights"] = given.pop("clip")
    return backbone(**given)
