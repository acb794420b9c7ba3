"""The contract of a backbone: a CLIP, with patch tokens taken by our own code.

``open_clip`` and ``tiny`` keep all of it, ``grouping_towers`` and ``feature_trunk`` what their
systems need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .blocks import AttentionBlock
from .features import Grid, PatchFeatures
from .readout import CLIP, ProxyFeatures, Readout

Tokenizer = Callable[[str | Sequence[str]], Tensor]


class ClipBackbone(nn.Module):
    """Both towers of a CLIP, and one scale.

    Attributes:
        token_dim: width D_v of the patch tokens.
        embed_dim: width E of the space that pictures and texts share.
        patch_size, image_size: side in pixels of a patch, and of the pictures it was trained on.
        image_mean, image_std: of RGB in 0..1.
        tokenizer: texts to token ids [T, L].
        logit_scale: logarithm of what cosines are multiplied by.
        logit_bias: what SigLIP adds to its scaled cosines, or None.
        text_blocks: transformer blocks of the text tower.
        taps: where ``encode_patches`` can take tokens.
        antialias_positions: how position embeddings are resized to another grid, where there are
            any.
        aligned: whether patches can be read in the space of the texts without training: a CLIP's
            can, those of a trunk that never saw texts cannot.
        trunk_weights: what names the weights of ``trunk``, where the vision tower has one that is
            loaded apart from the rest.
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
    aligned: bool = True
    trunk_weights: str | None = None

    # Pictures and texts.

    def encode_patches(
        self,
        images: Tensor,
        *,
        tap: str = "post_norm",
        readout: Readout = CLIP,
        proxy: ProxyFeatures | None = None,
    ) -> PatchFeatures:
        """Return class token and patch tokens, both of width D_v.

        Args:
            images: [B, 3, H, W], normalised.
            tap: one of ``taps``: before the final norm or after it.
            readout: what the last attention becomes for the patches; the class token stays CLIP's.
            proxy: a second encoder's patches, for a readout that needs them.
        """
        raise NotImplementedError

    def encode_dense(
        self, images: Tensor, readout: Readout = CLIP, proxy: ProxyFeatures | None = None
    ) -> PatchFeatures:
        """Return embedding and patches in the space of the texts, see docs/towers.md."""
        found = self.encode_patches(images, readout=readout, proxy=proxy)
        return PatchFeatures(self.project(found.embedding), self.project(found.tokens), found.grid)

    def encode_image(self, images: Tensor) -> Tensor:
        """Return CLIP's image embedding [B, E], not normalised."""
        raise NotImplementedError

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Return text embeddings [T, E], not normalised.

        Ids may be on the CPU wherever the tower is: texts shorter than the context are cheaper from
        there, because their length is known.
        """
        raise NotImplementedError

    def project(self, tokens: Tensor) -> Tensor:
        """Bring post-norm tokens [..., D_v] to the shared space [..., E] by CLIP's projection."""
        raise NotImplementedError

    # The steps of the vision tower, for systems that build on its parts.

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Return (patch tokens [B, N, D_v] as the first block sees them, grid)."""
        raise NotImplementedError

    def sequence(self, images: Tensor, class_weight: float = 1.0) -> tuple[Tensor, Grid]:
        """Return (``class_weight`` times the class token, then the patches [B, 1 + N, D_v]; grid).

        They are as the first block sees them.
        """
        raise NotImplementedError

    def final_norm(self, tokens: Tensor) -> Tensor:
        """Apply the norm after the last block."""
        raise NotImplementedError

    @property
    def vision_blocks(self) -> Sequence[AttentionBlock]:
        """Transformer blocks of the vision tower."""
        raise NotImplementedError

    @property
    def class_token(self) -> nn.Parameter:
        """The class token [D_v] before positions."""
        raise NotImplementedError

    def new_blocks(self, count: int) -> nn.ModuleList:
        """Return blocks like those of the vision tower, with weights of their own."""
        raise NotImplementedError

    # What it can be asked for, and what it is made of.

    def check_readout(self, readout: Readout) -> None:
        """Raise ValueError for a readout that the vision tower does not have."""

    def check_class_token(self, system: str) -> None:
        """Raise ValueError unless the tower has what ``system`` builds on.

        That is blocks over a class token and patches.
        """

    def set_image_size(self, size: int, interpolation: str) -> None:
        """Take pictures of another size from now on.

        Position embeddings, where there are any, are resized once, in place, and again for every
        other grid, by ``interpolation`` (bicubic, bilinear).
        """
        raise NotImplementedError

    def resize_positions(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``state``, under this module's names, with positions resized to its sizes."""
        return state

    def vision_parameters(self, tap: str = "post_norm") -> list[nn.Parameter]:
        """Return what ``encode_patches`` with this tap depends on."""
        raise NotImplementedError

    def text_parameters(self) -> list[nn.Parameter]:
        """Return what ``encode_text`` depends on."""
        raise NotImplementedError

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Return what fine-tuning keeps.

        That is the embeddings of patches, positions and words and the norm before the first block.
        """
        raise NotImplementedError

    def text_facts(self) -> Any:
        """Return, for JSON, what a text's embedding depends on beside ``text_parameters``.

        Two architectures may hold the same tensors.
        """
        return None

    def lasting_options(self) -> dict[str, Any]:
        """Return what a saved folder needs beside the options that built this.

        These came with weights that it does not name.
        """
        return {}

    def _check_tap(self, tap: str) -> None:
        if tap not in self.taps:
            raise ValueError(f"tap is {tap!r}; expected one of {list(self.taps)}")
