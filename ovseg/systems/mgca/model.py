"""A light decoder over a frozen CLIP's patches: a finer grid, and gated convolutions beside what is
there.

MGCA-style: multi-grained cross-modal alignment, a reconstruction.

Of Liu et al., arXiv:2403.03707, no code and no full text is public to us: this is a system of ours
built on what the abstract says, and every choice beyond it is an option (docs/mgca.md). A CLIP
stays frozen, its last block in MaskCLIP's form; a light decoder (``layers/light_decoder.py``) makes
pixels of its patches. ``objectives/mgca.py`` aligns texts with them at the levels of objects,
regions and pixels; ``inference/decisions/units.py`` labels by units that adapt to the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

import ovseg_kernels as ok

from ...errors import ConfigError
from ...nn.readout import READOUTS
from ..base import MAX_SCALE, PatchFeatures
from ..checks import check_compared, check_images
from ..frozen_clip import FrozenClipModel, FrozenClipOptions


class GatedLayer(nn.Module):
    """``x + leave(a sigmoid(b))``, (a, b) = 3 x 3 convolution of ``enter(norm(x))``.

    ``leave`` begins at zero: the layer is then nothing.

    Shapes: [B, N, E] to the same; ``hidden`` channels inside.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm, self.enter = nn.LayerNorm(width), nn.Linear(width, hidden)
        self.mix = nn.Conv2d(hidden, 2 * hidden, 3, padding=1)
        self.leave = nn.Linear(hidden, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        maps = self.enter(self.norm(x)).transpose(1, 2).unflatten(2, grid)
        return x + self.leave(F.glu(self.mix(maps), 1).flatten(2).transpose(1, 2))


class LightDecoder(nn.Module):
    """Tokens [B, h w, E] to [B, f h f w, E], f = 2 ** doublings, bilinear, then ``layers`` gated
    ones.
    """

    def __init__(self, width: int, hidden: int, layers: int, doublings: int):
        super().__init__()
        self.factor = 2**doublings
        self.layers = nn.ModuleList(GatedLayer(width, hidden) for _ in range(layers))

    def forward(
        self, tokens: torch.Tensor, grid: tuple[int, int]
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        if self.factor > 1:
            size = grid[0] * self.factor, grid[1] * self.factor
            maps = F.interpolate(
                tokens.transpose(1, 2).unflatten(2, grid),
                size,
                mode="bilinear",
                align_corners=False,
            )
            tokens, grid = maps.flatten(2).transpose(1, 2).contiguous(), size
        for layer in self.layers:
            tokens = layer(tokens, grid)
        return tokens, grid


WEIGHTS = ("softmax", "sigmoid")


@dataclass
class MGCAOptions(FrozenClipOptions):
    """What is not known of MGCA is here, and in the objective.

    Attributes:
        trained: ``decoder`` and ``scale``; the CLIP is in no part.
        readout: what the last block becomes for the patches, a name of ``layers.readout.READOUTS``.
        hidden, layers: of the decoder.
        doublings: of the grid's sides.
        weight: of the pixels in a text's object, ``softmax`` or ``sigmoid`` (of 10 s - 2.5, as TCL
            begins).
        temperature: of the softmax.
        logit_scale: start of the losses' scale, 1 / temperature of InfoNCE.
    """

    ends: ClassVar[dict[str, tuple[float, float]]] = {
        "hidden": (1, math.inf),
        "layers": (0, math.inf),
        "doublings": (0, 3),
    }

    templates: str = "clip80"
    trained: list[str] = field(default_factory=lambda: ["decoder", "scale"])
    readout: str = "maskclip"
    hidden: int = 256
    layers: int = 2
    doublings: int = 1
    weight: str = "softmax"
    temperature: float = 0.1
    logit_scale: float = 14.3


class MGCA(FrozenClipModel):
    Options = MGCAOptions
    decision = "units"
    objective = "mgca"
    options: MGCAOptions

    def __init__(self, options: MGCAOptions):
        super().__init__(options)
        self.backbone.check_class_token("mgca")
        for name, known in (
            ("readout", [name for name, known in READOUTS.items() if not known.proxy]),
            ("weight", list(WEIGHTS)),
        ):
            if getattr(options, name) not in known:
                raise ConfigError(f"{name} is {getattr(options, name)!r}; expected one of {known}")
        for name in ("temperature", "logit_scale"):
            if not 0 < getattr(options, name) < float("inf"):
                raise ConfigError(
                    f"{name} is {getattr(options, name)}; expected a positive finite number"
                )
        if len(self.backbone.vision_blocks) == 0:
            raise ValueError(
                "the image tower has no blocks; expected at least one, whose form the readout "
                "changes"
            )
        self.readout = READOUTS[options.readout]
        self.decoder = LightDecoder(
            self.backbone.embed_dim, options.hidden, options.layers, options.doublings
        )
        self.log_scale = nn.Parameter(torch.tensor(float(options.logit_scale)).log())
        self.train_parts(options.trained)

    def train(self, mode: bool = True) -> MGCA:
        super().train(mode)
        self.backbone.eval()
        return self

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The CLIP is in none: it stays as it is."""
        return {"decoder": list(self.decoder.parameters()), "scale": [self.log_scale]}

    @property
    def blocks(self) -> list[nn.Module]:
        """Without the last of the image tower: its parts are called one by one, which a shard of
        its own would not notice.
        """
        return [*self.backbone.vision_blocks[:-1], *self.backbone.text_blocks]

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        self.log_scale.clamp_(max=math.log(MAX_SCALE))

    def encode_image(self, images: torch.Tensor) -> PatchFeatures:
        """``embedding`` is the CLIP's own; the vector that a text is compared with depends on the
        text, see ``similarity``.
        """
        check_images(images, self)
        with torch.no_grad():
            found = self.backbone.encode_dense(images, self.readout)
        tokens, grid = self.decoder(found.tokens, found.grid)
        return PatchFeatures(found.embedding, tokens, grid)

    @torch.no_grad()
    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        return super().encode_text(token_ids)

    def compatibility(self, tokens: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """[B, T] of pixels [B, N, E] and texts [T, E]: each text with its own weighted mean of each
        picture's pixels, as PACL does it.
        """
        options: dict[str, Any] = (
            {"weight": "sigmoid"}
            if self.options.weight == "sigmoid"
            else {"temperature": self.options.temperature}
        )
        return ok.patch_text_similarity(tokens, texts.to(tokens.dtype), **options)

    def similarity(self, images: torch.Tensor | PatchFeatures, texts: torch.Tensor) -> torch.Tensor:
        check_compared(images, texts, PatchFeatures)
        features = self(images) if isinstance(images, torch.Tensor) else images
        return self.compatibility(features.tokens, texts)
