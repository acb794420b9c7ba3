"""ZegCLIP: one-stage zero-shot segmentation with a frozen CLIP (Zhou et al., CVPR 2023).

Deep prompts tune the image tower (``layers/prompts.py``); a decoder makes a mask of every class
from its text and the picture (``layers/class_decoder.py``). Classes are texts: any vocabulary, at
any time. Prompts and head are trained, the CLIP is not; where the CLIP was named, files hold
prompts and head alone. ``objectives/zegclip.py`` trains it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ...weights.published import Published
from ..base import ModelSpec, PatchFeatures
from ..checks import check_compared, check_images
from ..frozen_clip import FrozenClipModel, FrozenClipOptions
from .layers import ClassDecoder, DeepPrompts, Descriptor
from .published import MARK, Layout

_PARTS = ["prompts", "head"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class ZegCLIPOptions(FrozenClipOptions):
    """Attributes:
    image_size: side of the pictures; position embeddings are resized to it once.
    prompts: T, prompt tokens of each block; 10 for VOC as published, 100 for COCO-Stuff.
    heads, decoder_layers, hidden: of the decoder; hidden is of its MLPs, four times the width if
        None.
    dropout: of prompts and decoder.
    class_weight: times the class token; 2 as published, where it is added twice.
    imagenet: pictures are normalised by ImageNet's mean and std, as published, in place of the
        CLIP's.
    seen_classes: length of an unused buffer of published files less one; what was read comes back
        when they are written.
    """

    ends: ClassVar[dict[str, tuple[float, float]]] = {
        "image_size": (1, math.inf),
        "heads": (1, math.inf),
        "hidden": (1, math.inf),
        "class_weight": (0, math.inf),
        "seen_classes": (0, math.inf),
    }

    templates: str = "zegclip15"
    trained: list[str] = field(default_factory=lambda: list(_PARTS))
    image_size: int = 512
    prompts: int = 10
    heads: int = 8
    decoder_layers: int = 3
    hidden: int | None = None
    dropout: float = 0.1
    class_weight: float = 2.0
    imagenet: bool = True
    seen_classes: int = 15


class ZegCLIP(FrozenClipModel):
    Options = ZegCLIPOptions
    decision = "masks"
    objective = "zegclip"
    published_marks = (MARK,)
    options: ZegCLIPOptions

    def __init__(self, options: ZegCLIPOptions):
        super().__init__(options)
        backbone = self.backbone
        backbone.check_class_token("zegclip")
        if options.prompts < 1:
            raise ValueError(
                f"prompts is {options.prompts}; expected at least 1 token for each block"
            )
        if not 0 <= options.dropout < 1:
            raise ValueError(f"dropout is {options.dropout}; expected a share below 1")
        backbone.antialias_positions = False
        backbone.set_image_size(options.image_size, "bilinear")
        blocks = len(backbone.vision_blocks)
        if blocks == 0:
            raise ValueError(
                "the image tower has no blocks; expected at least one, for prompts to go before"
            )
        self.prompts = DeepPrompts(
            blocks, options.prompts, backbone.token_dim, backbone.patch_size, options.dropout
        )
        self.descriptor = Descriptor(backbone.embed_dim)
        self.decoder = ClassDecoder(
            backbone.embed_dim,
            options.heads,
            options.decoder_layers,
            options.hidden,
            options.dropout,
        )
        self.train_parts(options.trained)

    @property
    def published(self) -> Published | None:  # type: ignore[override]
        """Of models on open_clip's CLIP."""
        return Layout() if self.options.backbone["kind"] == "open_clip" else None

    @property
    def spec(self) -> ModelSpec:
        found = super().spec
        if not self.options.imagenet:
            return found
        return ModelSpec(
            found.image_size,
            found.patch_size,
            found.embed_dim,
            IMAGENET_MEAN,
            IMAGENET_STD,
            found.stride,
        )

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The CLIP is in none: it stays as it is."""
        return {
            "prompts": list(self.prompts.parameters()),
            "head": [*self.descriptor.parameters(), *self.decoder.parameters()],
        }

    @property
    def blocks(self) -> list[nn.Module]:
        return [*super().blocks, *self.decoder.layers]

    def encode_image(self, images: torch.Tensor) -> PatchFeatures:
        """``embedding`` and ``tokens``, which the prompts have tuned, are unit vectors."""
        check_images(images, self)
        x, grid = self.backbone.sequence(images, self.options.class_weight)
        x = self.prompts.run(self.backbone.vision_blocks, x)
        x = F.normalize(
            self.backbone.project(self.backbone.final_norm(self.prompts.norm(x))), dim=-1
        )
        return PatchFeatures(x[:, 0], x[:, 1:], grid)

    def segment_logits(self, features: PatchFeatures, texts: torch.Tensor) -> torch.Tensor:
        """Logits of each text's mask, [B, C, h, w]; masks do not exclude each other."""
        check_compared(features, texts, PatchFeatures, encoded=True)
        queries = self.descriptor(features.embedding, texts.to(features.embedding.dtype))
        return self.decoder(queries, features.tokens).unflatten(2, features.grid)

    def parameter_groups(
        self, lr: float, weight_decay: float, lower_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """As published training comes out: one rate and weight decay for all, norms and biases
        included.
        """
        return [
            {
                "params": [p for _, p in self.trainable],
                "lr_scale": 1.0,
                "weight_decay": weight_decay,
            }
        ]
