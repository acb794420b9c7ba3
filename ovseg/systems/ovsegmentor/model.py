"""OVSegmentor: open-vocabulary segmentation from image-caption pairs (Xu et al., CVPR 2023).

GroupViT's tower with one grouping block, 64 group tokens to 8 groups, on DINO's ViT; BERT for
texts. Its training has two stages: with a decoder that completes masked entities, then also with a
teacher, an average of the image tower.

The decoder: a caption with its entities masked looks at the groups of its picture.

    t = LN_tok(tokens);  c = cross block of t on LN_x(groups), (2) of ``nn/grouping.py``         (1)
    y = LN_new(block(c) + c)                                                                     (2)

The answer is read at the first token, [CLS], so (2) is computed there alone. Where padding is
masked, nothing looks at it in (2); published training had no mask there.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...bounds import bounded
from ...nn.grouping import CrossBlock, Projections
from ...nn.grouping_towers import GroupingViT, Projector
from ...nn.vit_blocks import VitBlock
from ...weights.hub import PREFIX, fetch
from ...weights.pickles import read_published
from ...weights.published import Published
from ..grouping import PARTS, GroupingSystem, GroupingSystemOptions
from .published import LAYOUT, load_dino

_DINO_FILES = ("model.safetensors", "pytorch_model.bin")


class _Layer(nn.Module):
    """The layer of (1) and (2); ``assign`` is computed by nobody: published files hold it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_tokens = nn.LayerNorm(width)
        self.norm_x = nn.LayerNorm(width)
        self.norm_new_x = nn.LayerNorm(width)
        self.pre_assign_attn = CrossBlock(width, heads, 4 * width)
        self.post_attn = VitBlock(width, heads, 4 * width)
        self.assign = Projections(width)


class EntityDecoder(nn.Module):
    """The decoder; tokens of another width than ``width`` are projected first."""

    def __init__(self, width: int, text_width: int, heads: int = 8):
        super().__init__()
        self.blocks = nn.ModuleList([_Layer(width, heads)])
        self.align_proj_text: nn.Linear | None = None
        if text_width != width:
            self.align_proj_text = nn.Linear(text_width, width, bias=False)

    def forward(self, tokens: Tensor, groups: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return y of (2) at the first token, [B, D].

        Args:
            tokens: [B, L, text width].
            groups: [B, G, D].
            seen: [B, L] bool, the tokens that are no padding; None for all.
        """
        layer = self.blocks[0]
        if self.align_proj_text is not None:
            tokens = self.align_proj_text(tokens)
        mixed = layer.pre_assign_attn(layer.norm_tokens(tokens), layer.norm_x(groups))
        mask = None if seen is None else seen[:, None, None, :]
        first = layer.post_attn(mixed, attn_mask=mask, first=1)
        return layer.norm_new_x(first + mixed[:, :1])[:, 0]

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return those that ``forward`` depends on."""
        return [p for name, p in self.named_parameters() if ".assign." not in name]


@dataclass
class OVSegmentorOptions(GroupingSystemOptions):
    """Options of OVSegmentor.

    Attributes:
        stage: what is there beside the towers: 0, nothing more, for inference; 1: what completes
            entities; 2: also the teacher.
        trained: empty: all parts, in stage 2 all but ``text``.
        dino: DINO's ViT to begin with: a file, or the Hub's repository (hf-hub:owner/name). None:
            random weights.
        entity_heads: of the decoder; 8 in the published models.
    """

    stage: int = bounded(0, one_of=(0, 1, 2), expected="0 (inference), 1 or 2")
    trained: list[str] = field(default_factory=list)
    dino: str | None = None
    entity_heads: int = bounded(8, low=1)


class OVSegmentor(GroupingSystem):
    """The towers of ``GroupingBackbone``, and what only their training needs."""

    Options = OVSegmentorOptions
    objective = "ovsegmentor"
    published_marks = (LAYOUT.mark,)
    starting_options = ("clip", "dino")
    training_only = ("entities.", "bridge_projector.", "teacher.", "logit_scale_mask")
    options: OVSegmentorOptions

    def __init__(self, options: OVSegmentorOptions):
        super().__init__(options)
        o = self.backbone.options
        if len(self.image.groupings) != 1:
            raise ValueError(
                f"group_tokens is {o.group_tokens}; expected one stage with group tokens"
            )
        if options.dino is not None:
            self._begin_with_dino(options.dino)
        self.entities: EntityDecoder | None = None
        self.bridge_projector: Projector | None = None
        self.teacher: GroupingViT | None = None
        if options.stage:
            self.entities = EntityDecoder(o.width, self.text.width, options.entity_heads)
            self.bridge_projector = Projector(o.width, o.projector, o.embed_dim)
        if options.stage == 2:
            self.teacher = copy.deepcopy(self.image)
            # Nothing uses it: published files hold it.
            self.logit_scale_mask = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        usual = [part for part in self.parts() if options.stage < 2 or part != "text"]
        self.train_parts(options.trained or usual)

    def _begin_with_dino(self, source: str) -> None:
        repo = source.removeprefix(PREFIX)
        path = source
        if repo != source:
            path = str(fetch(repo, _DINO_FILES, ways=", named by dino"))
        load_dino(self.image, read_published(path), f"dino {source!r}")

    @property
    def published(self) -> Published | None:  # type: ignore[override]
        """The layout of models with the published towers."""
        o = self.backbone.options
        words = o.text.get("kind", "clip") == "bert"
        return LAYOUT if words and o.local_depth is None and o.pool == "mean" else None

    @override
    def parts(self) -> dict[str, list[nn.Parameter]]:
        # The teacher is in none: it follows the image tower.
        found = super().parts()
        if self.entities is not None and self.bridge_projector is not None:
            bridge = self.bridge_projector.parameters()
            found["entities"] = [*self.entities.trained_parameters(), *bridge]
        return {name: found[name] for name in (*PARTS, "entities") if name in found}

    @property
    @override
    def blocks(self) -> list[nn.Module]:
        return [*super().blocks, *(self.teacher.blocks if self.teacher is not None else ())]

    @torch.no_grad()
    def start_teacher(self) -> None:
        """Make the teacher a copy of the image tower."""
        if self.teacher is not None:
            self.teacher.load_state_dict(self.image.state_dict())

    @torch.no_grad()
    def move_teacher(self, momentum: float) -> None:
        """Move the teacher to momentum teacher + (1 - momentum) image tower, in one pass."""
        if self.teacher is not None:
            own = list(self.teacher.parameters())
            torch._foreach_lerp_(own, list(self.image.parameters()), 1 - momentum)
