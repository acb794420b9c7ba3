"""What every system is to its users: encode images, encode texts, compare them densely, a training loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..backbones.base import ClipBackbone, Tokenizer
from ..data.labels import check_labels
from ..data.templates import templates as resolve_templates
from ..errors import InputError
from ..progress import bar

_TEXTS_AT_ONCE = 256
_MAX_SCALE = 100.0  # CLIP clips its logit scale there


@dataclass(frozen=True)
class ModelSpec:
    """What a picture must look like for a model.

    Attributes:
        image_size: side in pixels that it was trained at.
        patch_size: side in pixels of a patch.
        embed_dim: width E shared by images and texts.
        mean, std: of RGB in 0..1, what ``normalize`` takes off and divides by.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass
class ImageFeatures:
    """What ``encode_image`` returns.

    Attributes:
        embedding: [B, E], one vector an image.
        tokens: [B, L, E], one vector a patch, row-major over ``grid``, in the space of the texts, not normalised.
        grid: (h, w).
        groups, index, soft: of grouping systems; None for the others.
    """

    embedding: torch.Tensor
    tokens: torch.Tensor
    grid: tuple[int, int]
    groups: torch.Tensor | None = None
    index: torch.Tensor | None = None
    soft: torch.Tensor | None = None

    @classmethod
    def concatenate(cls, parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """The images of all parts, which have one grid."""
        joined: dict[str, Any] = {"grid": parts[0].grid}
        for field in fields(cls):
            if field.name != "grid":
                values = [getattr(part, field.name) for part in parts]
                joined[field.name] = None if values[0] is None else torch.cat(values)
        return cls(**joined)


class OVSegModel(nn.Module):
    """Base of the systems. A system defines ``encode_image``, ``training_loss`` and, if it differs, ``segment_logits``.

    Attributes:
        name: registry name, set by ``create_model``.
        config: the arguments that built it, saved beside the weights.
        templates: the prompt templates that ``encode_labels`` uses by default.
        decision: name of its rule of labelling, a file of ``inference/decisions``: ``patches`` or ``groups``.
    """

    backbone: ClipBackbone
    name: str = ""
    config: dict[str, Any]
    templates: str = "simple"
    decision: str = "patches"

    def forward(self, images: torch.Tensor) -> ImageFeatures:
        """``encode_image``: what hooks, ``torch.compile`` and wrappers of modules see."""
        return self.encode_image(images)

    @property
    def spec(self) -> ModelSpec:
        b = self.backbone
        return ModelSpec(b.image_size, b.patch_size, b.embed_dim, b.image_mean, b.image_std)

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts to token ids [T, L]; ``unknown(text)``, where there is one, lists the words it does not know."""
        return self.backbone.tokenizer

    @property
    def logit_scale(self) -> torch.Tensor:
        """What cosines are multiplied by before a softmax, at most 100; a 0-dim tensor with its gradient."""
        return self.backbone.logit_scale.exp().clamp(max=_MAX_SCALE)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """RGB [B, 3, H, W], uint8 or floats in 0..1, to what ``encode_image`` takes, in the model's dtype."""
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        spec, dtype = self.spec, next(self.parameters()).dtype
        mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (spec.mean, spec.std))
        return ((pixels.float() - mean) / std).to(dtype)

    def encode_image(self, images: torch.Tensor) -> ImageFeatures:
        """Features of ``images`` [B, 3, H, W], normalised by ``normalize``."""
        raise NotImplementedError

    def training_loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Named scalars with ``total``. Batch: ``images``, ``token_ids`` [T, L], optional ``pair_mask`` [B, T] and
        ``image_ids`` [B] with ``text_ids`` [T]."""
        raise NotImplementedError

    def similarity(self, images: torch.Tensor | ImageFeatures, texts: torch.Tensor) -> torch.Tensor:
        """Image-level similarity [B, T] with text embeddings [T, E]; classifies without training."""
        raise NotImplementedError

    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Text embeddings [T, E], not normalised."""
        return self.backbone.encode_text(token_ids)

    def segment_logits(self, features: ImageFeatures, texts: torch.Tensor) -> torch.Tensor:
        """Cosine of every patch with every text: [B, C, h, w] at the resolution of the tokens."""
        s = F.normalize(features.tokens, dim=-1) @ F.normalize(texts, dim=-1).T
        return s.transpose(1, 2).unflatten(2, features.grid)

    @torch.no_grad()
    def encode_labels(self, labels: Sequence[str], templates: str | Sequence[str] | None = None, *, unit: bool = True) -> torch.Tensor:
        """One unit vector a label [C, E]: the mean over templates of the text embeddings, normalised.

        Args:
            labels: texts.
            templates: a named set or format strings; the model's own if None.
            unit: whether the embeddings are normalised before the mean as well.

        Raises:
            InputError: for an empty list, a label that is not a string or blank, or the same label twice.
        """
        labels = check_labels(labels)
        chosen = resolve_templates(templates or self.templates)
        device = next(self.parameters()).device
        texts = [template.replace("{}", label) for label in labels for template in chosen]
        starts = range(0, len(texts), _TEXTS_AT_ONCE)
        rows = []
        for start in bar(starts, show=len(starts) > 4, desc="encoding labels", leave=False):
            rows.append(self.encode_text(self.tokenizer(texts[start : start + _TEXTS_AT_ONCE]).to(device)))
        embeddings = torch.cat(rows).unflatten(0, (len(labels), len(chosen)))
        return F.normalize((F.normalize(embeddings, dim=-1) if unit else embeddings).mean(1), dim=-1)

    def optimizer_groups(self, lr: float, weight_decay: float, lower_lr: float | None = None) -> list[dict[str, Any]]:
        """Groups for the optimizer, their ``lr_scale`` times the recipe's learning rate. Here: one rate; gains, biases and the logit
        scale without weight decay, as CLIP does it."""
        named = self.trainable
        return [{"params": [p for _, p in named if p.ndim >= 2], "lr_scale": 1.0, "weight_decay": weight_decay},
                {"params": [p for _, p in named if p.ndim < 2], "lr_scale": 1.0, "weight_decay": 0.0}]

    def after_step(self) -> None:
        """Called after every step of the optimizer."""

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]


def check_images(images: torch.Tensor) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        raise InputError(f"images has shape {list(images.shape)}; expected [B, 3, H, W]")
    if not images.is_floating_point():
        raise InputError(f"images has dtype {images.dtype}; expected floats from model.normalize")
