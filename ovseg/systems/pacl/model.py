"""PACL's vision embedder: the only trained module of the system.

PACL: patch-aligned contrastive learning (Mukhoti et al., CVPR 2023).

A residual embedder maps the patch tokens of a CLIP, frozen in the paper, to the space of its texts.
Image and text are compared by the text's own weighted mean over the patches, for every pair of the
batch (``ovseg_kernels.patch_text_similarity``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

import ovseg_kernels as ok

from ...errors import ConfigError
from ..base import MAX_SCALE, OVSegModel, PatchFeatures, SystemOptions
from ..checks import check_compared, check_images


class VisionEmbedder(nn.Module):
    """Residual block from token width to text width: ``skip(x) + out(relu(hidden(x)))``, the
    paper's appendix A.1.

    Shapes: [..., D_v] to [..., D]. For ViT-B/16 (768, 512) it has 1 050 112 parameters.
    """

    def __init__(self, token_dim: int, embed_dim: int, hidden_dim: int | None = None):
        super().__init__()
        hidden_dim = hidden_dim or embed_dim
        self.hidden = nn.Linear(token_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, embed_dim)
        self.skip = nn.Linear(token_dim, embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.skip(x) + self.out(torch.relu(self.hidden(x)))


@dataclass
class PACLOptions(SystemOptions):
    """What the paper leaves open is here.

    Attributes:
        trained: ``embedder`` and ``scale`` are the paper's, the CLIP frozen. ``vision`` trains the
            vision tower up to the tap as well, ``text`` the text tower. The paper's scale is fixed;
            learning it is what later work reports as better.
        hidden_dim: of the embedder; the text width if None.
        tap: patch tokens ``pre_norm`` or ``post_norm`` of the ViT's final norm. The paper does not
            say which. TinyClip also has ``local``, before its global part.
        temperature: of the softmax over patches. The paper shows none, which is 1; then pooling is
            close to a mean.
        logit_scale: start of the loss's scale, 1 / temperature of InfoNCE.
    """

    moved: ClassVar[dict[str, str]] = dict.fromkeys(
        ("train_clip", "learn_logit_scale"),
        "it is trained now, a list of parts: embedder, scale, vision, text",
    )

    ends: ClassVar[dict[str, tuple[float, float]]] = {"hidden_dim": (1, math.inf)}

    templates: str = "pacl7"
    trained: list[str] = field(default_factory=lambda: ["embedder", "scale"])
    hidden_dim: int | None = None
    tap: str = "pre_norm"
    temperature: float = 1.0
    logit_scale: float = 14.3

    @classmethod
    def upgrade(cls, options: dict[str, Any]) -> dict[str, Any]:
        """``train_clip`` and ``learn_logit_scale`` became ``trained``."""
        if not {"train_clip", "learn_logit_scale"} & set(options):
            return options
        options = dict(options)
        clip, scale = options.pop("train_clip", "none"), options.pop("learn_logit_scale", True)
        parts = {"none": [], "vision": ["vision"], "all": ["vision", "text"]}[clip]
        return {"trained": ["embedder", *(["scale"] if scale else []), *parts], **options}


class PACL(OVSegModel):
    Options = PACLOptions
    objective = "pacl"
    options: PACLOptions

    def __init__(self, options: PACLOptions):
        super().__init__(options)
        self.backbone.check_class_token("pacl")
        if options.tap not in self.backbone.taps:
            raise ValueError(f"tap is {options.tap!r}; expected one of {list(self.backbone.taps)}")
        for name in ("temperature", "logit_scale"):
            if not 0 < getattr(options, name) < float("inf"):
                raise ConfigError(
                    f"{name} is {getattr(options, name)}; expected a positive finite number"
                )
        self.embedder = VisionEmbedder(
            self.backbone.token_dim, self.backbone.embed_dim, options.hidden_dim
        )
        self.tap, self.temperature = options.tap, options.temperature
        self.log_scale = nn.Parameter(torch.tensor(float(options.logit_scale)).log())
        self.train_parts(options.trained)

    def train(self, mode: bool = True) -> PACL:
        super().train(mode)
        self.backbone.eval()  # no dropout in it
        return self

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {
            "embedder": list(self.embedder.parameters()),
            "scale": [self.log_scale],
            "vision": self.backbone.vision_parameters(self.tap),
            "text": self.backbone.text_parameters(),
        }

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def encode_image(self, images: torch.Tensor) -> PatchFeatures:
        """``embedding`` is the mean patch: PACL's image vector depends on the text, see
        ``similarity``.
        """
        check_images(images, self)
        with torch.set_grad_enabled("vision" in self.options.trained and torch.is_grad_enabled()):
            patches = self.backbone.encode_patches(images, tap=self.tap)
        tokens = self.embedder(patches.tokens)
        return PatchFeatures(tokens.mean(1), tokens, patches.grid)

    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled("text" in self.options.trained and torch.is_grad_enabled()):
            return super().encode_text(token_ids)

    def similarity(self, images: torch.Tensor | PatchFeatures, texts: torch.Tensor) -> torch.Tensor:
        check_compared(images, texts, PatchFeatures)
        features = self(images) if isinstance(images, torch.Tensor) else images
        return ok.patch_text_similarity(
            features.tokens, texts.to(features.tokens.dtype), temperature=self.temperature
        )
