"""MGCA-style: multi-grained cross-modal alignment, a reconstruction.

Of Liu et al., arXiv:2403.03707, no code and no full text is public to us: this is a system of ours
built on what the abstract says, and every choice beyond it is an option (docs/mgca.md). A CLIP
stays frozen, its last block in MaskCLIP's form; a light decoder makes pixels of its patches, on a
finer grid, by gated convolutions beside what is there. Texts are aligned with objects, regions and
pixels; labels are given by units that adapt to the picture (``inference/rules/units.py``).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

import ovseg_kernels as ok

from ...bounds import bounded
from ...errors import ConfigError
from ...nn.embedder import VisionEmbedder
from ...nn.features import Grid, PatchFeatures
from ...nn.readout import READOUTS
from ..base import MAX_SCALE
from ..checks import check_compared, check_images
from ..frozen_clip import FrozenClipModel, FrozenClipOptions


class GatedLayer(nn.Module):
    """``x + leave(a sigmoid(b))``, (a, b) = 3 x 3 convolution of ``enter(norm(x))``.

    ``leave`` begins at zero: the layer is then nothing. There are ``hidden`` channels inside.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, hidden)
        self.mix = nn.Conv2d(hidden, 2 * hidden, 3, padding=1)
        self.leave = nn.Linear(hidden, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Map [B, N, E] over ``grid`` to the same."""
        maps = self.enter(self.norm(x)).transpose(1, 2).unflatten(2, grid)
        return x + self.leave(F.glu(self.mix(maps), 1).flatten(2).transpose(1, 2))


class LightDecoder(nn.Module):
    """Patches to pixels: a grid f = 2 ** doublings times finer, then ``layers`` gated layers."""

    def __init__(self, width: int, hidden: int, layers: int, doublings: int):
        super().__init__()
        self.factor = 2**doublings
        self.layers = nn.ModuleList(GatedLayer(width, hidden) for _ in range(layers))

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Bring [B, h w, E] to [B, f h f w, E], bilinear; return them and their grid."""
        if self.factor > 1:
            size = (grid[0] * self.factor, grid[1] * self.factor)
            maps = tokens.transpose(1, 2).unflatten(2, grid)
            maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
            tokens = maps.flatten(2).transpose(1, 2).contiguous()
            grid = size
        for layer in self.layers:
            tokens = layer(tokens, grid)
        return tokens, grid


@dataclass
class MGCAOptions(FrozenClipOptions):
    """Options of the model; what is not known of MGCA is here, and in the objective.

    Attributes:
        trained: ``decoder`` and ``scale``; the CLIP is in no part. On a backbone whose patches are
            not in the space of the texts, ``decoder`` has an embedder before it, and there is
            ``text``, the text tower.
        readout: what the last block becomes for the patches, a name of ``nn.readout.READOUTS``; of
            no effect on such a backbone, which has no such block.
        hidden, layers: of the decoder.
        doublings: of the grid's sides.
        weight: of the pixels in a text's object, ``softmax`` or ``sigmoid`` (of 10 s - 2.5, as TCL
            begins).
        temperature: of the softmax.
        logit_scale: start of the losses' scale, 1 / temperature of InfoNCE.
    """

    templates: str = "clip80"
    trained: list[str] = field(default_factory=lambda: ["decoder", "scale"])
    readout: str = "maskclip"
    hidden: int = bounded(256, low=1)
    layers: int = bounded(2, low=0)
    doublings: int = bounded(1, low=0, high=3)
    weight: str = bounded("softmax", one_of=("softmax", "sigmoid"))
    temperature: float = bounded(0.1, low=0, above=True, expected="a positive finite number")
    logit_scale: float = bounded(14.3, low=0, above=True, expected="a positive finite number")


class MGCA(FrozenClipModel):
    """A frozen CLIP, the decoder, and a scale of its own."""

    Options = MGCAOptions
    decision = "units"
    objective = "mgca"
    options: MGCAOptions

    def __init__(self, options: MGCAOptions):
        super().__init__(options)
        known = [name for name, readout in READOUTS.items() if not readout.proxy]
        if options.readout not in known:
            raise ConfigError(f"readout is {options.readout!r}; expected one of {known}")
        self.readout = READOUTS[options.readout]
        self.embedder: VisionEmbedder | None = None
        if self.backbone.aligned:
            self._check_blocks()
        else:
            self.embedder = VisionEmbedder(self.backbone.token_dim, self.backbone.embed_dim)
        self.decoder = LightDecoder(
            self.backbone.embed_dim, options.hidden, options.layers, options.doublings
        )
        self.log_scale = nn.Parameter(torch.tensor(float(options.logit_scale)).log())
        self.train_parts(options.trained)

    def _check_blocks(self) -> None:
        """Raise ValueError unless the CLIP has a last block that a readout can change."""
        self.backbone.check_class_token("mgca")
        if len(self.backbone.vision_blocks) == 0:
            raise ValueError(
                "the image tower has no blocks; expected at least one, whose form the readout "
                "changes"
            )

    @override
    def train(self, mode: bool = True) -> MGCA:
        super().train(mode)
        self.backbone.eval()
        return self

    @override
    def parts(self) -> dict[str, list[nn.Parameter]]:
        # The CLIP is in none: it stays as it is.
        found = {"decoder": list(self.decoder.parameters()), "scale": [self.log_scale]}
        if self.embedder is not None:
            found["decoder"] += self.embedder.parameters()
            found["text"] = self.backbone.text_parameters()
        return found

    @property
    @override
    def blocks(self) -> list[nn.Module]:
        # Without the last of the image tower: its parts are called one by one, which a shard of its
        # own would not notice.
        return [*self.backbone.vision_blocks[:-1], *self.backbone.text_blocks]

    @property
    @override
    def logit_scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    @override
    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        self.log_scale.clamp_(max=math.log(MAX_SCALE))

    @property
    @override
    def frozen_tower(self) -> bool:
        return True

    @override
    @torch.no_grad()
    def encode_tower(self, images: Tensor) -> PatchFeatures:
        check_images(images, self)
        if self.embedder is None:
            return self.backbone.encode_dense(images, self.readout)
        return self.backbone.encode_patches(images, tap=self.backbone.taps[0])

    @override
    def encode_features(self, features: PatchFeatures) -> PatchFeatures:
        # ``embedding`` is the CLIP's own, else the mean embedded patch; the vector that a text is
        # compared with depends on the text, see ``compatibility``.
        if self.embedder is not None:
            patches = self.embedder(features.tokens)
            features = PatchFeatures(patches.mean(1), patches, features.grid)
        tokens, grid = self.decoder(features.tokens, features.grid)
        return PatchFeatures(features.embedding, tokens, grid)

    @override
    def tower_options(self) -> dict[str, Any]:
        own = {"readout": asdict(self.readout)} if self.backbone.aligned else {}
        return {**super().tower_options(), **own}

    @override
    def encode_text(self, token_ids: Tensor) -> Tensor:
        with torch.set_grad_enabled("text" in self.options.trained and torch.is_grad_enabled()):
            return super().encode_text(token_ids)

    def compatibility(self, tokens: Tensor, texts: Tensor) -> Tensor:
        """Compare each text with its own weighted mean of each picture's pixels, as PACL does it.

        Args:
            tokens: [B, N, E].
            texts: [T, E].

        Returns:
            [B, T].
        """
        options: dict[str, Any] = {"temperature": self.options.temperature}
        if self.options.weight == "sigmoid":
            options = {"weight": "sigmoid"}
        return ok.patch_text_similarity(tokens, texts.to(tokens.dtype), **options)

    @override
    def similarity(self, images: Tensor | PatchFeatures, texts: Tensor) -> Tensor:
        check_compared(images, texts, PatchFeatures)
        features = self(images) if isinstance(images, Tensor) else images
        return self.compatibility(features.tokens, texts)
