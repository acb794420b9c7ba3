"""The projectors of GroupViT and OVSegmentor into the space where pictures and texts are compared:
two layers with a BatchNorm between.

    y = W_2 relu(BN(W_1 x + b_1)) + b_2

Statistics in training are those of all rows of all ranks, with their gradient, so that many
processes give what one gives.

Both towers of a grouping system: a GroupingViT, a text tower, a projector for each. That is
GroupViT as a whole, and OVSegmentor but for what only its training needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ovseg_kernels.distributed import sum_over_ranks

from .backbone import ClipBackbone
from .blocks import AttentionBlock
from .grouping import GroupingViT, VisionGroups
from .tensors import at_least_float32
from .text import build_text, complete_text
from .vit_blocks import resize_positions


class Projector(nn.Module):
    """[..., D] to [..., E] through ``hidden``.

    Parameter names are OVSegmentor's, whose layers are 1x1 convolutions.
    """

    def __init__(self, width: int, hidden: int, embed_dim: int):
        super().__init__()
        self.linear_hidden = nn.Sequential(
            nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()
        )
        self.linear_out = nn.Linear(hidden, embed_dim)

    def forward(self, x: torch.Tensor, group: Any = None) -> torch.Tensor:
        """``group``: the ranks whose rows share statistics in training; None for this process
        alone.
        """
        linear, norm, relu = self.linear_hidden
        hidden = linear(x.flatten(0, -2)).to(
            norm.weight.dtype
        )  # statistics are not autocast's to round
        hidden = (
            norm(hidden)
            if group is None or not self.training
            else synchronized(norm, hidden, group)
        )
        return self.linear_out(relu(hidden)).unflatten(0, x.shape[:-1])


def synchronized(norm: nn.BatchNorm1d, x: torch.Tensor, group: Any) -> torch.Tensor:
    """``norm`` in training over the rows [n, C] of all ranks; updates its running statistics, which
    stay equal everywhere.
    """
    rows = at_least_float32(x)
    count = sum_over_ranks(rows.new_full((1,), len(rows)), group)
    mean = sum_over_ranks(rows.sum(0), group) / count
    variance = sum_over_ranks((rows - mean).square().sum(0), group) / count
    assert (
        norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_batches_tracked is not None
    )
    with torch.no_grad():
        norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum or 0.1)
        norm.running_var.lerp_(
            (variance * count / (count - 1)).to(norm.running_var), norm.momentum or 0.1
        )
        norm.num_batches_tracked += 1
    y = (rows - mean) * (variance + norm.eps).rsqrt() * norm.weight + norm.bias
    return y.to(x.dtype)


_POSITIONS = "image.pos_embed"


@dataclass
class GroupingOptions:
    """The defaults are GroupViT's ViT-S.

    Attributes:
        width, heads, hidden: of the image tower; hidden is the width of its MLPs.
        depths, group_tokens, groups, patch_norm, drop_path, local_depth, init_std, pool: see
            ``GroupingViT``.
        image_size, patch_size: in pixels.
        embed_dim, projector: E and the width of the projectors' hidden layers.
        mean, std: of RGB in 0..1; ImageNet's.
        text: kind and options of the text tower, see ``backbones/texts``.
    """

    ends: ClassVar[dict[str, tuple[float, float]]] = {
        **dict.fromkeys(
            (
                "width",
                "heads",
                "hidden",
                "groups",
                "image_size",
                "patch_size",
                "embed_dim",
                "projector",
            ),
            (1, math.inf),
        ),
        **dict.fromkeys(("depths", "group_tokens", "local_depth"), (0, math.inf)),
        "drop_path": (0, 1),
        "std": (1e-6, math.inf),
        "init_std": (1e-6, math.inf),
    }

    width: int = 384
    heads: int = 6
    hidden: int = 1536
    depths: list[int] = field(default_factory=lambda: [6, 3, 3])
    group_tokens: list[int] = field(default_factory=lambda: [64, 8, 0])
    groups: list[int] = field(default_factory=lambda: [64, 8])
    patch_norm: bool = True
    drop_path: float = 0.1
    local_depth: int | None = None
    init_std: float | None = 0.02
    pool: str = "mean"
    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 256
    projector: int = 4096
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    text: dict[str, Any] = field(default_factory=lambda: {"kind": "clip"})

    def complete(self) -> None:
        """Give the text tower the options that it lacks."""
        self.text = complete_text(**self.text)


class GroupingBackbone(ClipBackbone):
    """Keyword arguments are the fields of ``GroupingOptions``."""

    Options: ClassVar = GroupingOptions

    def __init__(self, **options: Any):
        super().__init__()
        o = self.options = GroupingOptions(**options)
        self.token_dim, self.embed_dim, self.image_size, self.patch_size = (
            o.width,
            o.embed_dim,
            o.image_size,
            o.patch_size,
        )
        self.image_mean, self.image_std = tuple(o.mean), tuple(o.std)  # type: ignore[assignment]
        self.image = GroupingViT(
            o.width,
            o.heads,
            o.hidden,
            o.depths,
            o.group_tokens,
            o.groups,
            o.image_size,
            o.patch_size,
            o.patch_norm,
            o.drop_path,
            o.local_depth,
            o.init_std,
            o.pool,
        )
        self.text = build_text(**o.text)
        self.tokenizer = self.text.tokenizer
        self.image_projector = Projector(o.width, o.projector, o.embed_dim)
        self.text_projector = Projector(self.text.width, o.projector, o.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def groups(self, images: torch.Tensor) -> tuple[VisionGroups, torch.Tensor, torch.Tensor]:
        """(what the image tower gives, image embeddings [B, E], embeddings of the groups [B, G,
        E]).
        """
        found = self.image(images)
        both = self.image_projector(torch.cat([found.pooled[:, None], found.groups], 1))
        return found, both[:, 0], both[:, 1:]

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.image_projector(self.image(images).pooled)

    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.text_projector(self.text(token_ids).sentence)

    def text_facts(self) -> Any:
        return self.text.facts()

    def lasting_options(self) -> dict[str, Any]:
        """Weights that the text tower began with are in the saved file."""
        return (
            {"text": {key: x for key, x in self.options.text.items() if key != "weights"}}
            if self.options.text.get("weights")
            else {}
        )

    def resize_positions(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        table, own = state.get(_POSITIONS), self.state_dict().get(_POSITIONS)
        rows = 0 if table is None or table.dim() != 3 else table.shape[1]
        side = math.isqrt(rows)
        if (
            table is None
            or own is None
            or not rows
            or side * side != rows
            or table.shape[2] != own.shape[2]
        ):
            return state  # for the comparison of shapes to name
        resized = resize_positions(
            table[0], (side, side), (self.image.side, self.image.side), antialias=False, prefix=0
        )
        return {**state, _POSITIONS: resized[None]}

    @property
    def vision_blocks(self) -> Sequence[AttentionBlock]:
        return self.image.blocks

    @property
    def text_blocks(self) -> Sequence[Any]:  # type: ignore[override]
        return self.text.blocks

    def text_parameters(self) -> list[nn.Parameter]:
        """Those of the tower first; running statistics are no parameters and come along as values."""
        norm: Any = self.text_projector.linear_hidden[1]
        return [
            *self.text.trained_parameters(),
            *self.text_projector.parameters(),
            norm.running_mean,
            norm.running_var,
        ]
