"""PACL: patch-aligned contrastive learning (Mukhoti et al., CVPR 2023).

A residual embedder maps the patch tokens of a CLIP, frozen in the paper, to the space of its texts. Image and text are compared by the
text's own weighted mean over the patches, for every pair of the batch (``ovseg_kernels.patch_text_similarity``).
"""

from __future__ import annotations

import torch
from torch import nn

import ovseg_kernels as ok

from ..backbones.base import ClipBackbone
from ..layers.embedder import VisionEmbedder
from .base import ImageFeatures, OVSegModel, check_images

_MAX_SCALE = 100.0
TRAIN_CLIP = ("none", "vision", "all")


class PACL(OVSegModel):
    """Args:
        backbone: the CLIP.
        hidden_dim: of the embedder; the text width if None.
        tap: patch tokens ``pre_norm`` or ``post_norm`` of the ViT's final norm. The paper does not say which. TinyClip also
            has ``local``, before its global part.
        train_clip: ``none`` is the paper's frozen CLIP. ``vision`` trains the vision tower up to the tap as well, ``all`` the
            text tower too.
        temperature: of the softmax over patches. The paper shows none, which is 1; then pooling is close to a mean.
        logit_scale: start of the loss's scale, 1 / temperature of InfoNCE.
        learn_logit_scale: the paper's is fixed; learning it is what later work reports as better.
    """

    def __init__(self, backbone: ClipBackbone, hidden_dim: int | None = None, tap: str = "pre_norm",
                 temperature: float = 1.0, logit_scale: float = 14.3, learn_logit_scale: bool = True,
                 train_clip: str = "none", templates: str = "pacl7"):
        super().__init__()
        if tap not in backbone.taps:
            raise ValueError(f"tap is {tap!r}; expected one of {list(backbone.taps)}")
        self.backbone = backbone.requires_grad_(False)
        if train_clip not in TRAIN_CLIP:
            raise ValueError(f"train_clip is {train_clip!r}; expected one of {list(TRAIN_CLIP)}")
        self.train_clip = train_clip
        trained = backbone.vision_parameters(tap) if train_clip != "none" else []
        trained += backbone.text_parameters() if train_clip == "all" else []
        for parameter in trained:
            parameter.requires_grad_(True)
        self.embedder = VisionEmbedder(backbone.token_dim, backbone.embed_dim, hidden_dim)
        self.tap, self.temperature, self.templates = tap, temperature, templates
        self.log_scale = nn.Parameter(torch.tensor(float(logit_scale)).log(), requires_grad=learn_logit_scale)

    def train(self, mode: bool = True) -> PACL:
        super().train(mode)
        self.backbone.eval()  # no dropout in it
        return self

    def encode_image(self, images: torch.Tensor) -> ImageFeatures:
        """``embedding`` is the mean patch: PACL's image vector depends on the text, see ``similarity``."""
        check_images(images)
        with torch.set_grad_enabled(self.train_clip != "none" and torch.is_grad_enabled()):
            patches = self.backbone.encode_patches(images, tap=self.tap)
        tokens = self.embedder(patches.tokens)
        return ImageFeatures(tokens.mean(1), tokens, patches.grid)

    def similarity(self, images: torch.Tensor | ImageFeatures, texts: torch.Tensor) -> torch.Tensor:
        features = images if isinstance(images, ImageFeatures) else self.encode_image(images)
        return ok.patch_text_similarity(features.tokens, texts.to(features.tokens.dtype), temperature=self.temperature)

    def training_loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.set_grad_enabled(self.train_clip == "all"):
            texts = self.encode_text(batch["token_ids"])
        loss = ok.similarity_contrastive_loss(
            self.similarity(batch["images"], texts),
            self.log_scale.exp().clamp(max=_MAX_SCALE),
            image_ids=batch.get("image_ids"),
            text_ids=batch.get("text_ids"),
            pair_mask=batch.get("pair_mask"),
        )
        return {"total": loss}
