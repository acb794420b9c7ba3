"""ZegCLIP: one-stage zero-shot segmentation with a frozen CLIP (Zhou et al., CVPR 2023).

Deep prompts tune the image tower; a decoder makes a mask of every class from its text and the
picture. Classes are texts: any vocabulary, at any time. Prompts and head are trained, the CLIP is
not; where the CLIP was named, files hold prompts and head alone.

A trunk of timm has neither blocks for prompts to go before nor a class token. There the head begins
with a linear map of the trunk's tokens x_n and a norm, as SegViT's does, and the picture is their
mean:

    F_n = LN(W x_n + b)     g = LN(W mean_n x_n + b)     t_c = sqrt(E) normalize(text_c)         (1)

Numbers of all three are about 1. Patches that are longer than texts drown these in what all classes
see alike, and unit vectors give masks of about 0.1, which take thousands of steps to grow.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ...bounds import bounded
from ...errors import ConfigError
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
        trained: ``prompts`` and ``head``; the CLIP or trunk is in no part. On a trunk, ``head``
            alone.
        prompts: T, prompt tokens of each block; 10 for VOC as published, 100 for COCO-Stuff. None
            on a trunk of timm, and nowhere else.
        heads, decoder_layers, hidden: of the decoder; hidden is of its MLPs, four times the width
            if None.
        dropout: of prompts and decoder.
        class_weight: times the class token; 2 as published, where it is added twice. Of no effect
            on a trunk, which has none.
        imagenet: pictures are normalised by ImageNet's mean and std, as published, in place of the
            CLIP's or trunk's.
        seen_classes: length of an unused buffer of published files less one; what was read comes
            back when they are written.
    """

    templates: str = "zegclip15"
    trained: list[str] = field(default_factory=lambda: list(_PARTS))
    image_size: int = bounded(512, low=1)
    prompts: int | None = bounded(10, low=1, expected="at least 1 token for each block")
    heads: int = bounded(8, low=1)
    decoder_layers: int = bounded(3, low=1)
    hidden: int | None = bounded(None, low=1)
    dropout: float = bounded(0.1, low=0, high=1, below=True, expected="a share below 1")
    class_weight: float = bounded(2.0, low=0)
    imagenet: bool = True
    seen_classes: int = bounded(15, low=0)


class ZegCLIP(FrozenClipModel):
    """A frozen CLIP, prompts in its image tower, and a head that makes masks.

    Attributes:
        prompts: of (1) and (2) of ``layers.py``; None on a trunk, which has no blocks.
        embedder: of (1) above, the linear map of a trunk's tokens and the norm; None on a CLIP.
    """

    Options = ZegCLIPOptions
    decision = "masks"
    objective = "zegclip"
    published_marks = (MARK,)
    options: ZegCLIPOptions

    def __init__(self, options: ZegCLIPOptions):
        super().__init__(options)
        backbone = self.backbone
        E = backbone.embed_dim
        self.prompts: DeepPrompts | None = None
        self.embedder: nn.Sequential | None = None
        if backbone.aligned:
            self.prompts = self._new_prompts()
            backbone.antialias_positions = False
        else:
            self._check_no_prompts()
            self.embedder = nn.Sequential(nn.Linear(backbone.token_dim, E), nn.LayerNorm(E))
        backbone.set_image_size(options.image_size, "bilinear")
        self.descriptor = Descriptor(E)
        self.decoder = ClassDecoder(
            E, options.heads, options.decoder_layers, options.hidden, options.dropout
        )
        self.train_parts(options.trained)

    def _new_prompts(self) -> DeepPrompts:
        """Return fresh prompts for the blocks of the CLIP."""
        backbone = self.backbone
        backbone.check_class_token("zegclip")
        blocks = len(backbone.vision_blocks)
        if blocks == 0:
            raise ValueError(
                "the image tower has no blocks; expected at least one, for prompts to go before"
            )
        count = self.options.prompts
        if count is None:
            raise ConfigError(
                "prompts is None, which is for a trunk of timm; expected at least 1 token for each "
                "block of the CLIP"
            )
        width = backbone.token_dim
        return DeepPrompts(blocks, count, width, backbone.patch_size, self.options.dropout)

    def _check_no_prompts(self) -> None:
        """Refuse what asks for prompts where there are no blocks for them to go before."""
        kind = self.options.backbone["kind"]
        where = f"backbone.kind is {kind!r}, whose trunk has no blocks for prompts to go before"
        if self.options.prompts is not None:
            raise ConfigError(
                f"prompts is {self.options.prompts} and {where}; expected prompts null"
            )
        if "prompts" in self.options.trained:
            raise ConfigError(f"trained names 'prompts' and {where}; expected ['head']")

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
        head = [*self.descriptor.parameters(), *self.decoder.parameters()]
        if self.embedder is not None:
            return {"head": [*self.embedder.parameters(), *head]}
        assert self.prompts is not None
        return {"prompts": list(self.prompts.parameters()), "head": head}

    @property
    @override
    def blocks(self) -> list[nn.Module]:
        return [*super().blocks, *self.decoder.layers]

    @property
    @override
    def frozen_tower(self) -> bool:
        # Prompts, which are trained and have dropout, go into every block of a CLIP.
        return self.prompts is None

    @override
    def encode_tower(self, images: Tensor) -> PatchFeatures:
        check_images(images, self)
        if self.prompts is None:
            with torch.no_grad():
                return self.backbone.encode_patches(images, tap=self.backbone.taps[0])
        x, grid = self.backbone.sequence(images, self.options.class_weight)
        x = self.prompts.run(self.backbone.vision_blocks, x)
        x = self.backbone.project(self.backbone.final_norm(self.prompts.norm(x)))
        return PatchFeatures(x[:, 0], x[:, 1:], grid)

    @override
    def encode_features(self, features: PatchFeatures) -> PatchFeatures:
        # ``embedding`` and ``tokens``, which the prompts have tuned, are unit vectors; on a trunk
        # they are those of (1).
        last = _unit if self.embedder is None else self.embedder
        return PatchFeatures(last(features.embedding), last(features.tokens), features.grid)

    @override
    def segment_logits(self, features: PatchFeatures, texts: Tensor) -> Tensor:
        # Logits of each text's mask, [B, C, h, w]; masks do not exclude each other.
        check_compared(features, texts, PatchFeatures, encoded=True)
        texts = texts.to(features.embedding.dtype)
        if self.embedder is not None:
            texts = _unit(texts) * texts.shape[1] ** 0.5
        queries = self.descriptor(features.embedding, texts)
        return self.decoder(queries, features.tokens).unflatten(2, features.grid)

    @override
    def parameter_groups(
        self, lr: float, weight_decay: float, lower_lr: float | None = None
    ) -> list[dict[str, Any]]:
        # As published training comes out: one rate and weight decay for all, norms and biases too.
        trained = [p for _, p in self.trainable]
        return [{"params": trained, "lr_scale": 1.0, "weight_decay": weight_decay}]


def _unit(x: Tensor) -> Tensor:
    """Return unit vectors [..., E]."""
    return F.normalize(x, dim=-1)
