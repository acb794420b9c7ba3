"""clip_dense: CLIP with its patch tokens read out through its own projection. The training-free baselines.

``readout`` changes the last attention for the patches: CLIP as it is, MaskCLIP, SCLIP, ClearCLIP, NACLIP, GEM (``layers/readout.py``).
Training it is training CLIP: the image-level contrastive loss, which says nothing about where things are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...layers.readout import Readout, resolve_readout
from ..base import OVSegModel, PatchFeatures, SystemOptions, check_images


@dataclass
class ClipDenseOptions(SystemOptions):
    """``readout``: a name of ``layers.readout.READOUTS``, or the fields of a ``Readout``."""

    templates: str = "clip80"
    trained: list[str] = field(default_factory=lambda: ["vision", "text", "scale"])
    readout: Any = "clip"


class ClipDense(OVSegModel):
    Options = ClipDenseOptions
    objective = "clip_dense"
    options: ClipDenseOptions

    def __init__(self, options: ClipDenseOptions):
        super().__init__(options)
        self.readout = resolve_readout(options.readout)
        self.train_parts(options.trained)

    def set_readout(self, readout: str | dict[str, Any] | Readout) -> None:
        """Another readout from now on; nothing is trained in it."""
        self.readout = resolve_readout(readout)
        self.config["readout"] = readout

    def parts(self) -> dict[str, list[nn.Parameter]]:
        text, scale = self.backbone.text_parameters(), self.backbone.logit_scale
        others = {id(p) for p in (*text, scale)}
        return {"vision": [p for p in self.backbone.parameters() if id(p) not in others], "text": text, "scale": [scale]}

    def encode_image(self, images: torch.Tensor) -> PatchFeatures:
        check_images(images)
        patches = self.backbone.encode_patches(images, tap="post_norm", readout=self.readout)
        assert patches.cls is not None
        return PatchFeatures(self.backbone.project(patches.cls), self.backbone.project(patches.tokens), patches.grid)

    def similarity(self, images: torch.Tensor | PatchFeatures, texts: torch.Tensor) -> torch.Tensor:
        # A picture's own vector does not need the last block's patches.
        embedding = self.backbone.encode_image(images) if isinstance(images, torch.Tensor) else images.embedding
        return F.normalize(embedding, dim=-1) @ F.normalize(texts.to(embedding.dtype), dim=-1).T
