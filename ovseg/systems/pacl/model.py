"""PACL: patch-aligned contrastive learning (Mukhoti et al., CVPR 2023).

A residual embedder maps the patch tokens of a CLIP, frozen in the paper, to the space of its texts.
On a trunk of timm (``backbone.kind`` ``timm``) it does the same to features that never saw a text.
Image and text are compared by the text's own weighted mean over the patches, for every pair of the
batch (``ovseg_kernels.patch_text_similarity``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

import ovseg_kernels as ok

from ...bounds import bounded
from ...nn.embedder import VisionEmbedder
from ...nn.features import PatchFeatures
from ..base import MAX_SCALE, SystemOptions
from ..checks import check_compared, check_images
from ..named_weights import NamedWeightsModel


@dataclass
class PACLOptions(SystemOptions):
    """Options of PACL; what the paper leaves open is here.

    Attributes:
        trained: ``embedder`` and ``scale`` are the paper's, the CLIP frozen. ``vision`` trains the
            vision tower up to the tap as well, ``text`` the text tower. The paper's scale is fixed;
            learning it is what later work reports as better.
        hidden_dim: of the embedder; the text width if None.
        dropout: share of the embedder's hidden layer that is dropped in training; the paper has
            none.
        tap: patch tokens ``pre_norm`` or ``post_norm`` of the ViT's final norm. The paper does not
            say which. TinyClip also has ``local``, before its global part; a trunk of timm has
            ``features`` alone.
        temperature: of the softmax over patches. 1 is the paper's, which shows none; pooling is
            then close to a mean. The toy models state their own: of the 144 patches of a scene an
            object covers a few, which a mean does not show.
        logit_scale: start of the loss's scale, 1 / temperature of InfoNCE.
        units: groups of a picture's patches that answer together, found by k-means (the rule of
            labelling ``units``); None: each patch by itself, as in the paper.
    """

    moved: ClassVar[dict[str, str]] = dict.fromkeys(
        ("train_clip", "learn_logit_scale"),
        "it is trained now, a list of parts: embedder, scale, vision, text",
    )

    templates: str = "pacl7"
    trained: list[str] = field(default_factory=lambda: ["embedder", "scale"])
    hidden_dim: int | None = bounded(None, low=1)
    dropout: float = bounded(0.0, low=0, high=1, below=True)
    tap: str = "pre_norm"
    temperature: float = bounded(1.0, low=0, above=True, expected="a positive finite number")
    logit_scale: float = bounded(14.3, low=0, above=True, expected="a positive finite number")
    units: int | None = bounded(None, low=1)

    @classmethod
    @override
    def upgrade(cls, options: dict[str, Any]) -> dict[str, Any]:
        # ``train_clip`` and ``learn_logit_scale`` became ``trained``.
        if not {"train_clip", "learn_logit_scale"} & set(options):
            return options
        options = dict(options)
        clip = options.pop("train_clip", "none")
        scale = options.pop("learn_logit_scale", True)
        parts = {"none": [], "vision": ["vision"], "all": ["vision", "text"]}[clip]
        return {"trained": ["embedder", *(["scale"] if scale else []), *parts], **options}


class PACL(NamedWeightsModel):
    """A CLIP, an embedder of its patches, and a scale of its own."""

    Options = PACLOptions
    objective = "pacl"
    options: PACLOptions

    def __init__(self, options: PACLOptions):
        super().__init__(options)
        if self.backbone.aligned:
            self.backbone.check_class_token("pacl")
        if options.tap not in self.backbone.taps:
            raise ValueError(f"tap is {options.tap!r}; expected one of {list(self.backbone.taps)}")
        self.embedder = VisionEmbedder(
            self.backbone.token_dim, self.backbone.embed_dim, options.hidden_dim, options.dropout
        )
        self.tap = options.tap
        self.temperature = options.temperature
        self.log_scale = nn.Parameter(torch.tensor(float(options.logit_scale)).log())
        self.train_parts(options.trained)
        if options.units is not None:
            self.decision = "units"
            self.decision_options = {"unit": "fixed", "units": options.units}

    @override
    def train(self, mode: bool = True) -> PACL:
        super().train(mode)
        self.backbone.eval()  # no dropout in it
        return self

    @override
    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {
            "embedder": list(self.embedder.parameters()),
            "scale": [self.log_scale],
            "vision": self.backbone.vision_parameters(self.tap),
            "text": self.backbone.text_parameters(),
        }

    @property
    @override
    def logit_scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    @property
    @override
    def frozen_tower(self) -> bool:
        return "vision" not in self.options.trained

    @override
    def encode_tower(self, images: Tensor) -> PatchFeatures:
        check_images(images, self)
        with torch.set_grad_enabled(not self.frozen_tower and torch.is_grad_enabled()):
            return self.backbone.encode_patches(images, tap=self.tap)

    @override
    def encode_features(self, features: PatchFeatures) -> PatchFeatures:
        # ``embedding`` is the mean patch: the vector that a text is compared with depends on the
        # text, see ``compatibility``.
        tokens = self.embedder(features.tokens)
        return PatchFeatures(tokens.mean(1), tokens, features.grid)

    @override
    def tower_options(self) -> dict[str, Any]:
        own = {"tap": self.tap} if self.backbone.aligned else {}
        return {**super().tower_options(), **own}

    @override
    def encode_text(self, token_ids: Tensor) -> Tensor:
        with torch.set_grad_enabled("text" in self.options.trained and torch.is_grad_enabled()):
            return super().encode_text(token_ids)

    def compatibility(self, tokens: Tensor, texts: Tensor) -> Tensor:
        """Compare each text with its own weighted mean of each picture's patches.

        Args:
            tokens: [B, N, E].
            texts: [T, E].

        Returns:
            [B, T].
        """
        return ok.patch_text_similarity(
            tokens, texts.to(tokens.dtype), temperature=self.temperature
        )

    @override
    def similarity(self, images: Tensor | PatchFeatures, texts: Tensor) -> Tensor:
        check_compared(images, texts, PatchFeatures)
        features = self(images) if isinstance(images, Tensor) else images
        return self.compatibility(features.tokens, texts)
