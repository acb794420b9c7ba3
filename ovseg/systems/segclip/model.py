"""SegCLIP: patch aggregation with learnable centers (Luo et al., ICML 2023).

A CLIP trunk is split: its first blocks see the patches, without the class token; a group module
gathers them into centers; the last blocks see the centers, and the image is the elementwise maximum
over them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...bounds import bounded
from ...nn.blocks import quick_gelu
from ...nn.features import Grid, GroupFeatures
from ...weights.published import Published
from ..base import OVSegModel, SystemOptions
from ..checks import check_images
from .layers import Groups, MaeDecoder, SemanticGroups, sincos_positions
from .published import MARK, layout

_PARTS = ["embeddings", "vision", "text", "scale", "groups", "reconstruction"]
_DECODER = {"width": 384, "depth": 3, "heads": 8}
_OF_TRAINING = ("tau", "weights", "kept")  # options of the model once


@dataclass
class SegCLIPOptions(SystemOptions):
    """Options of SegCLIP.

    Attributes:
        trained: all but ``embeddings`` as published: patch and position embeddings, the norm after
            them and token embeddings stay CLIP's.
        second_stage: how many of the CLIP's last blocks see the centers; with 0 the group module's
            output is the groups.
        centers, cross_layers, heads: of the group module; heads is the width / 64 if None.
        decoder: width, depth and heads of the decoder of pixels.
        mix_batch: the published training's mixing of images in the cross-attention, see
            ``layers.CrossBlock``.
    """

    moved: ClassVar[dict[str, str]] = {
        "frozen": "it is trained now, a list of parts",
        **{name: f"it is objective.options.{name} now" for name in _OF_TRAINING},
    }

    trained: list[str] = field(default_factory=lambda: _PARTS[1:])
    second_stage: int = 2
    centers: int = bounded(8, low=1)
    cross_layers: int = bounded(2, low=0)
    heads: int | None = bounded(None, low=1)
    decoder: dict[str, int] = bounded(default_factory=dict, low=1)
    mix_batch: bool = False

    @classmethod
    @override
    def upgrade(cls, options: dict[str, Any]) -> dict[str, Any]:
        # ``frozen`` became ``trained``; what only training needs went to the objective.
        options = {key: value for key, value in options.items() if key not in _OF_TRAINING}
        return {"trained": _PARTS, **options} if options.pop("frozen", True) is False else options

    def complete(self) -> None:
        """Give the decoder the sizes that it lacks."""
        super().complete()
        self.decoder = {**_DECODER, **self.decoder}


class SegCLIP(OVSegModel):
    """A CLIP in two stages, the group module between them, and what reconstructs pixels."""

    Options = SegCLIPOptions
    decision = "groups"
    objective = "segclip"
    published_marks = (MARK,)
    options: SegCLIPOptions

    def __init__(self, options: SegCLIPOptions):
        super().__init__(options)
        self.backbone.check_class_token("segclip")
        blocks = len(self.backbone.vision_blocks)
        if not 0 <= options.second_stage <= blocks:
            raise ValueError(
                f"second_stage is {options.second_stage}; expected 0 to {blocks}, the blocks of "
                "the backbone"
            )
        self.backbone.antialias_positions = False  # as published
        self.first_stage = blocks - options.second_stage
        width = self.backbone.token_dim
        self.groups = SemanticGroups(
            width, options.centers, options.heads, options.cross_layers, options.mix_batch
        )
        self.mae_blocks = self.backbone.new_blocks(options.second_stage)
        self.reconstruct = nn.Linear(options.centers, options.centers)
        self.decoder = MaeDecoder(
            width, self.backbone.patch_size, **{**_DECODER, **options.decoder}
        )
        for module in (self.groups, self.mae_blocks, self.reconstruct, self.decoder):
            module.apply(_initialize)
        self.train_parts(options.trained)

    @property
    def published(self) -> Published | None:  # type: ignore[override]
        """The layout of models on open_clip's CLIP."""
        if self.options.backbone["kind"] != "open_clip":
            return None
        side = self.spec.image_size // self.spec.patch_size
        width = self.decoder.mask_token.shape[-1]
        return layout(self.first_stage, sincos_positions((side, side), width)[None])

    @override
    def parts(self) -> dict[str, list[nn.Parameter]]:
        # The class token is in none: nothing looks at it.
        backbone = self.backbone
        found = {"embeddings": backbone.embedding_parameters(), "scale": [backbone.logit_scale]}
        taken = {id(p) for part in found.values() for p in part}
        found["text"] = [p for p in backbone.text_parameters() if id(p) not in taken]
        taken |= {id(p) for p in (*found["text"], backbone.class_token)}
        found["vision"] = [p for p in backbone.parameters() if id(p) not in taken]
        found["groups"] = list(self.groups.parameters())
        modules = (self.mae_blocks, self.reconstruct, self.decoder)
        found["reconstruction"] = [p for module in modules for p in module.parameters()]
        return {name: found[name] for name in _PARTS}

    @property
    @override
    def blocks(self) -> list[nn.Module]:
        return [*super().blocks, *self.mae_blocks]

    @override
    def encode_image(self, images: Tensor) -> GroupFeatures:
        x, grid = self.embed(images)
        groups, image, of_group = self.gather(x)
        tokens = of_group.gather(1, groups.index[..., None].expand(-1, -1, of_group.shape[2]))
        return GroupFeatures(image, tokens, grid, of_group, groups.index, groups.soft)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Return (patch tokens [B, N, D] before the first block, grid)."""
        check_images(images, self)
        return self.backbone.embed(images)

    def first_blocks(self, x: Tensor) -> Tensor:
        """Bring patch tokens to where the group module takes them."""
        for block in self.backbone.vision_blocks[: self.first_stage]:
            x = block(x)
        return x

    def gather(
        self, x: Tensor, noise: Tensor | None = None, tau: float = 1.0
    ) -> tuple[Groups, Tensor, Tensor]:
        """Return (groups, image [B, E], embeddings of the groups [B, G, E]).

        Args:
            x: embedded patches [B, N, D].
            noise: Gumbel noise [B, G, N], in training.
            tau: of the assignment.
        """
        groups = self.groups(self.first_blocks(x), noise, tau)
        tokens = groups.tokens
        for block in self.backbone.vision_blocks[self.first_stage :]:
            tokens = block(tokens)
        both = torch.cat([tokens.amax(1, keepdim=True), tokens], 1)
        both = self.backbone.project(self.backbone.final_norm(both))
        return groups, both[:, 0], both[:, 1:]

    def scatter(self, kept: Tensor, noise: Tensor, tau: float) -> Tensor:
        """Gather kept patches into groups, and bring them back through the assignment.

        Args:
            kept: embedded patches [B, K, D].
            noise: Gumbel noise [B, G, K].
            tau: of the assignment.

        Returns:
            [B, K, D].
        """
        groups = self.groups(self.first_blocks(kept), noise, tau)
        assignment = groups.assignment(noise, tau).transpose(1, 2).to(kept.dtype)
        x = quick_gelu(self.reconstruct(assignment) @ groups.tokens)
        for block in self.mae_blocks:
            x = block(x)
        return x

    @override
    def parameter_groups(
        self, lr: float, weight_decay: float, lower_lr: float | None = None
    ) -> list[dict[str, Any]]:
        # The published recipe: the first blocks, the text tower and the scale at ``lower_lr``;
        # decay on all but biases.
        first = self.backbone.vision_blocks[: self.first_stage]
        slow = {id(p) for block in first for p in block.parameters()}
        slow |= {id(p) for p in (*self.backbone.text_parameters(), self.backbone.logit_scale)}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.trainable:
            groups.setdefault((id(parameter) in slow, "bias" not in name), []).append(parameter)
        low = 1.0 if lower_lr is None else lower_lr / lr
        return [
            {
                "params": found,
                "lr_scale": low if is_slow else 1.0,
                "weight_decay": weight_decay if decayed else 0.0,
            }
            for (is_slow, decayed), found in groups.items()
        ]


def _initialize(module: nn.Module) -> None:
    """Draw every linear layer from N(0, 0.02) without bias, as published.

    The packed projections of attention and the convolutions are drawn as torch does.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
