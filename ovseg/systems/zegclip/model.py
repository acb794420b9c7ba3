"""ZegCLIP: one-stage zero-shot segmentation with a frozen CLIP (Zhou et al., CVPR 2023).

Deep prompts tune the image tower; a decoder makes a mask of every class from its text and the
picture. Classes are texts: any vocabulary, at any time. Prompts and head are trained, the CLIP is
not; where the CLIP was named, files hold prompts and head alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ...bounds import bounded
from ...nn.features import PatchFeatures
from ...weights.published import Published
from ..base import ModelSpec
from ..checks import check_compared, check_images
from ..frozen_clip import FrozenClipModel, FrozenClipOptions
from .layers import ClassDecoder, DeepPrompts, Descriptor
from .published import MARK, Layout

_PARTS = ["prompts", "head"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class ZegCLIPOptions(FrozenClipOptions):
    """Options of ZegCLIP.

    Attributes:
        image_size: side of the pictures; position embeddings are resized to it once.
        prompts: T, prompt tokens of each block; 10 for VOC as published, 100 for COCO-Stuff.
        heads, decoder_layers, hidden: of the decoder; hidden is of its MLPs, four times the width
            if None.
        dropout: of prompts and decoder.
        class_weight: times the class token; 2 as published, where it is added twice.
        imagenet: pictures are normalised by ImageNet's mean and std, as published, in place of the
            CLIP's.
        seen_classes: length of an unused buffer of published files less one; what was read comes
            back when they are written.
    """

    templates: str = "zegclip15"
    trained: list[str] = field(default_factory=lambda: list(_PARTS))
    image_size: int = bounded(512, low=1)
    prompts: int = bounded(10, low=1, expected="at least 1 token for each block")
    heads: int = bounded(8, low=1)
    decoder_layers: int = bounded(3, low=1)
    hidden: int | None = bounded(None, low=1)
    dropout: float = bounded(0.1, low=0, high=1, below=True, expected="a share below 1")
    class_weight: float = bounded(2.0, low=0)
    imagenet: bool = True
    seen_classes: int = bounded(15, low=0)


class ZegCLIP(FrozenClipModel):
    """A frozen CLIP, prompts in its image tower, and a head that makes masks."""

    Options = ZegCLIPOptions
    decision = "masks"
    objective = "zegclip"
    published_marks = (MARK,)
    options: ZegCLIPOptions

    def __init__(self, options: ZegCLIPOptions):
        super().__init__(options)
        backbone = self.backbone
        backbone.check_class_token("zegclip")
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
        E = backbone.embed_dim
        self.descriptor = Descriptor(E)
        self.decoder = ClassDecoder(
            E, options.heads, options.decoder_layers, options.hidden, options.dropout
        )
        self.train_parts(options.trained)

    @property
    def published(self) -> Published | None:  # type: ignore[override]
        """The layout of models on open_clip's CLIP."""
        return Layout() if self.options.backbone["kind"] == "open_clip" else None

    @property
    @override
    def spec(self) -> ModelSpec:
        if not self.options.imagenet:
            return super().spec
        return replace(super().spec, mean=IMAGENET_MEAN, std=IMAGENET_STD)

    @override
    def parts(self) -> dict[str, list[nn.Parameter]]:
        # The CLIP is in none: it stays as it is.
        return {
            "prompts": list(self.prompts.parameters()),
            "head": [*self.descriptor.parameters(), *self.decoder.parameters()],
        }

    @property
    @override
    def blocks(self) -> list[nn.Module]:
        return [*super().blocks, *self.decoder.layers]

    # ``frozen_tower`` stays False: prompts that are trained, with dropout, go into every block, and
    # pictures with masks are cropped at random. Where the head alone is trained that holds still.

    @override
    def encode_image(self, images: Tensor) -> PatchFeatures:
        # ``embedding`` and ``tokens``, which the prompts have tuned, are unit vectors.
        check_images(images, self)
        x, grid = self.backbone.sequence(images, self.options.class_weight)
        x = self.prompts.run(self.backbone.vision_blocks, x)
        x = self.backbone.project(self.backbone.final_norm(self.prompts.norm(x)))
        x = F.normalize(x, dim=-1)
        return PatchFeatures(x[:, 0], x[:, 1:], grid)

    @override
    def segment_logits(self, features: PatchFeatures, texts: Tensor) -> Tensor:
        # Logits of each text's mask, [B, C, h, w]; masks do not exclude each other.
        check_compared(features, texts, PatchFeatures, encoded=True)
        queries = self.descriptor(features.embedding, texts.to(features.embedding.dtype))
        return self.decoder(queries, features.tokens).unflatten(2, features.grid)

    @override
    def parameter_groups(
        self, lr: float, weight_decay: float, lower_lr: float | None = None
    ) -> list[dict[str, Any]]:
        # As published training comes out: one rate and weight decay for all, norms and biases too.
        trained = [p for _, p in self.trainable]
        return [{"params": trained, "lr_scale": 1.0, "weight_decay": weight_decay}]
