"""The rule of patches: every pixel takes the class whose upsampled score is the largest.

    s = scale * cosine of every patch with every text, by ``model.segment_logits``               (1)
    z = s upsampled to the windows, their mean on the canvas, resized to the picture;
        ``activation`` at its ``stage``                                                          (2)
    label = class of argmax (z + bias), -1 where a rule of background says so                    (3)

With ``refine="pamr"`` the maps z are adapted to the edges of their picture before (3), by PAMR
(Araslanov and Roth, arXiv:2005.08104, section 3.2). Nothing is trained; maps need not be
probabilities.

    k(i, j) = -mean over channels of |I_i - I_j| / (1e-8 + 0.1 sigma_i), j around i at each
        dilation                                                                                 (4)
    alpha_i = softmax over j of k(i, j)                                                          (5)
    m_i <- sum_j alpha_ij m_j, ten times                                                         (6)

sigma_i is the standard deviation of the picture, channel by channel, over the 3 x 3 pixels around i
at every dilation. Borders are replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels.reference.upsample_argmax import LABEL_TYPES, winners
from ovseg_kernels.reference.window_argmax import window_maps

from ...bounds import Bound, bounded, choice
from ...errors import InputError
from ...nn.tensors import at_least_float32, upload
from ...systems import OVSegModel, PatchFeatures
from ..queries import EncodedQueries
from ..view import Placement
from .base import BIAS, SCALE, Decision, take_back

DILATIONS = (1, 2, 4, 8, 12, 24)
_SQUARE = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
_RING = [offset for offset in _SQUARE if offset != (0, 0)]
_AT_ONCE = 1 << 23  # pixels

Winner = tuple[torch.Tensor, torch.Tensor]  # labels and the winner's score, [H, W] both


@dataclass(frozen=True)
class PatchArgmax(Decision):
    """The largest of the patches' scores; each field says what it does."""

    scale: float | None = bounded(
        None,
        SCALE,
        "multiplies the cosines; softmax and entropy need it, as it decides what is probable",
    )
    activation: str | None = bounded(
        None,
        choice(None, "sigmoid", "softmax"),
        "sigmoid, or softmax over all texts (which needs --scale); then scores are probabilities",
    )
    stage: str = bounded(
        "output",
        choice("window", "merged", "output"),
        "where the activation acts: in each window, on the merged windows, or on the output after "
        "the last resize",
    )
    background_threshold: float | None = bounded(
        None,
        Bound(form="one", expected="a finite number"),
        "pixels whose winner scores less get no label: a cosine times the scale, or a probability "
        "with --activation",
    )
    background_entropy: float | None = bounded(
        None,
        Bound(low=0, high=100, form="one", expected="nats, 0 .. 100"),
        "pixels get no label where the entropy, in nats, of softmax(scale * cosines) over all "
        "texts exceeds this",
    )
    area_threshold: float = bounded(
        0.0,
        Bound(low=0, high=1, below=True, form="one", expected="a share of 0 to below 1"),
        "labels with less than this share of the foreground are taken back and their pixels "
        "decided again",
    )
    bias: dict[str, float] | None = bounded(None, BIAS)
    refine: str | None = bounded(
        None, choice(None, "pamr"), "pamr: adapt the label maps to the picture's edges (slow)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, needs in (
            ("activation", self.activation == "softmax"),
            ("background_entropy", self.background_entropy is not None),
        ):
            if needs and self.scale is None:
                raise InputError(
                    f"{name} is {getattr(self, name)!r} and scale is missing: softmax over plain "
                    "cosines is nearly uniform; expected a scale such as 40"
                )
        low, top = self.score_range
        if self.background_threshold is not None and not low <= self.background_threshold <= top:
            kind = "a cosine" if top == 1 else f"a cosine times {top:g}"
            kind = f"what {self.activation} gives" if self.activation else kind
            raise InputError(
                f"background_threshold is {self.background_threshold}; expected {kind}, {low:g} "
                f".. {top:g}"
            )

    @property
    def needs_picture(self) -> bool:
        """Return whether the picture's edges are asked for."""
        return self.refine is not None

    @property
    def score_range(self) -> tuple[float, float]:
        """The range of cosines times the scale, or of what the activation makes of them."""
        if self.activation:
            return 0.0, 1.0
        top = self.scale or 1.0
        return -top, top

    def label_map(self, model, features, queries, placement, *, allowed=None, picture=None):
        """Label by (1) to (3); see ``Decision``."""
        scores = self.cosines(model, features, queries.texts)
        scores = scores if self.scale is None else scores * self.scale
        offsets = queries.offsets(self.bias, allowed, scores.dtype)
        if self.refine is None:
            decide = self._from_patches(scores, queries, placement)
        elif picture is None:
            raise InputError("refine needs the picture and none is given")
        else:
            decide = self._from_maps(scores, queries, placement, picture)
        labels, value = decide(offsets)
        if self.area_threshold:
            offsets = self._without_small(labels, queries, offsets, scores.dtype)
            del labels, value  # of a large picture: not beside the next ones
            labels, value = decide(offsets)
        take_back(labels, value, allowed=allowed, threshold=self.background_threshold)
        if self.background_entropy is not None:
            entropy = torch.special.entr(scores.float().softmax(1)).sum(1, keepdim=True)
            origins, *sizes = placement.windows
            high = ok.window_argmax(
                -entropy,
                origins,
                *sizes,
                threshold=-self.background_entropy,
                background=1,
                label_type=torch.uint8,
            )
            labels.masked_fill_(high.bool(), -1)
        return labels, value

    def cosines(
        self, model: OVSegModel, features: PatchFeatures, texts: torch.Tensor
    ) -> torch.Tensor:
        """Return what (1) scales, [n, T, h, w]."""
        return at_least_float32(model.segment_logits(features, texts))

    def _from_patches(
        self, scores: torch.Tensor, queries: EncodedQueries, placement: Placement
    ) -> Callable[[torch.Tensor | None], Winner]:
        """Return what labels by offsets of the texts, without a map of a class at full size."""
        options: dict[str, Any] = {
            "class_labels": queries.owners,
            "label_type": queries.label_type,
            "return_value": True,
        }

        def decide(offsets: torch.Tensor | None) -> Winner:
            if placement.origins is None and self.activation is None:
                labels, value = ok.upsample_argmax(scores, placement.size, bias=offsets, **options)
                return labels[0], value[0]
            origins, *sizes = placement.windows
            options.update(activation=self.activation, stage=self.stage, bias=offsets)
            return ok.window_argmax(scores, origins, *sizes, **options)

        return decide

    def _from_maps(
        self,
        scores: torch.Tensor,
        queries: EncodedQueries,
        placement: Placement,
        picture: torch.Tensor,
    ) -> Callable[[torch.Tensor | None], Winner]:
        """Return what labels by offsets of the texts, from maps (2) refined at full size."""
        origins, crop, canvas, size = placement.windows
        origins = upload(origins, scores.device)
        maps = window_maps(scores, None, origins, crop, canvas, size, self.activation, self.stage)
        maps = pamr(picture.to(scores), maps)
        kind = LABEL_TYPES.index(queries.label_type)
        return lambda offsets: winners(maps, offsets, queries.owners, None, -1, kind, True)

    def _without_small(
        self,
        labels: torch.Tensor,
        queries: EncodedQueries,
        offsets: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the offsets, -inf for the classes below ``area_threshold`` unless those are all.

        Computed without reading the device.
        """
        # Background goes into a last bin of its own: a mask would make a shape that depends on
        # values.
        bins = torch.zeros(len(queries.names) + 1, dtype=torch.int64, device=labels.device)
        for some in labels.flatten().split(_AT_ONCE):  # indices are eight bytes each
            index = some.long() % len(bins)
            bins.scatter_add_(0, index, torch.ones_like(index))
        area = bins[:-1]
        small = area <= self.area_threshold * area.sum()
        dropped = (queries.owners >= 0) & small[queries.owners] & ~small.all()
        if offsets is None:
            offsets = torch.zeros(len(dropped), device=labels.device, dtype=dtype)
        return offsets.masked_fill(dropped, -torch.inf)

    def background_rules(self) -> list[str]:
        """Name the threshold and the entropy."""
        rules = []
        if self.background_threshold is not None:
            rules.append(f"the winner scores below {self.background_threshold}")
        if self.background_entropy is not None:
            rules.append(f"entropy above {self.background_entropy} nats")
        return rules

    def describe(self) -> dict[str, Any]:
        """Describe every choice."""
        scores = "cosines" + (f" times {self.scale:g}" if self.scale else "")
        scores += f", {self.activation} at the {self.stage} stage" if self.activation else ""
        return {
            "scores": scores,
            "area_threshold": self.area_threshold,
            "bias": self.bias or {},
            "refine": self.refine,
        }


def pamr(
    image: torch.Tensor,
    maps: torch.Tensor,
    *,
    iterations: int = 10,
    dilations: Sequence[int] = DILATIONS,
) -> torch.Tensor:
    """Refine maps [C, H, W] by (4) to (6).

    Memory: 8 affinities for each dilation and pixel, and a few maps; classes go one by one.

    Args:
        image: [3, H, W].
        maps: [C, H, W] of the same size.
        iterations: of (6).
        dilations: distances of the eight neighbours.
    """
    if image.dim() != 3 or maps.dim() != 3 or image.shape[1:] != maps.shape[1:]:
        raise ValueError(
            f"image has shape {list(image.shape)} and maps {list(maps.shape)}; expected [3, H, W] "
            "and [C, H, W]"
        )
    reach = max(dilations)

    def around(
        x: torch.Tensor, offsets: Sequence[tuple[int, int]] = _RING
    ) -> Iterator[torch.Tensor]:
        """Yield the neighbours of every pixel of ``x`` [..., H, W], one after the other."""
        height, width = x.shape[-2:]
        padded = F.pad(x[None], (reach,) * 4, mode="replicate")[0]
        for dilation in dilations:
            for y, x_ in offsets:
                top = reach + y * dilation
                left = reach + x_ * dilation
                yield padded[..., top : top + height, left : left + width]

    count = len(dilations) * len(_SQUARE)
    mean = sum(around(image, _SQUARE)) / count
    sigma = (sum((near - mean) ** 2 for near in around(image, _SQUARE)) / (count - 1)).sqrt()
    scores = torch.stack(
        [-((image - near).abs() / (1e-8 + 0.1 * sigma)).mean(0) for near in around(image)]
    )
    weights = scores.softmax(0)
    refined = torch.empty_like(maps)
    for c in range(len(maps)):
        one = maps[c : c + 1]
        for _ in range(iterations):
            total = torch.zeros_like(one)
            for weight, near in zip(weights, around(one), strict=True):
                total.addcmul_(weight[None], near)
            one = total
        refined[c] = one[0]
    return refined


Rule = PatchArgmax
