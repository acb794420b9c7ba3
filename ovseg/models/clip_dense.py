"""clip_dense: CLIP with its patch tokens read out through its own projection. The training-free baselines.

``readout`` changes the last attention for the patches: CLIP as it is, MaskCLIP, SCLIP, ClearCLIP, NACLIP, GEM (``layers/readout.py``).
Training it is training CLIP: the image-level contrastive loss, which says nothing about where things are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

import ovseg_kernels as ok

from ..backbones.base import ClipBackbone
from ..layers.readout import resolve_readout
from .base import ImageFeatures, OVSegModel, check_images

_MAX_SCALE = 100.0  # CLIP clips its logit scale there


class ClipDense(OVSegModel):
    """Args:
        backbone: the CLIP; everything in it is trained by ``training_loss``.
        templates: of ``encode_labels``.
        readout: a name of ``layers.readout.READOUTS``, or the fields of a ``Readout``.
    """

    def __init__(self, backbone: ClipBackbone, templates: str = "clip80", readout: str | dict[str, Any] = "clip"):
        super().__init__()
        self.backbone = backbone
        self.readout = resolve_readout(readout)
        self.templates = templates

    def encode_image(self, images: torch.Tensor) -> ImageFeatures:
        check_images(images)
        patches = self.backbone.encode_patches(images, tap="post_norm", readout=self.readout)
        return ImageFeatures(self.backbone.project(patches.cls), self.backbone.project(patches.tokens), patches.grid)

    def similarity(self, images: torch.Tensor | ImageFeatures, texts: torch.Tensor) -> torch.Tensor:
        embedding = images.embedding if isinstance(images, ImageFeatures) else self.backbone.encode_image(images)
        return F.normalize(embedding, dim=-1) @ F.normalize(texts, dim=-1).T

    def training_loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        similarity = self.similarity(batch["images"], self.encode_text(batch["token_ids"])).float()
        loss = ok.similarity_contrastive_loss(
            similarity,
            self.backbone.logit_scale.exp().clamp(max=_MAX_SCALE),
            image_ids=batch.get("image_ids"),
            text_ids=batch.get("text_ids"),
            pair_mask=batch.get("pair_mask"),
        )
        return {"total": loss}
