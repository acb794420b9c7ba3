"""The rule of class masks: every pixel takes the class whose mask is the most probable there.

    p = sigmoid(mask logits of each window, upsampled), their mean on the canvas, resized to the
        picture                                                                                  (1)
    label = class of argmax (p + bias), -1 where the background is the largest or
        max (p + bias) < threshold                                                               (2)

Masks do not exclude each other: where no class is there, all are improbable. ZegCLIP
(arXiv:2212.03588) lowers classes that it was trained on by 0.1 where others were never seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ovseg_kernels as ok

from ...bounds import Bound, bounded
from ...nn.tensors import at_least_float32
from .base import BIAS, Decision, take_back


@dataclass(frozen=True)
class ClassMasks(Decision):
    """The most probable mask; each field says what it does."""

    background_threshold: float | None = bounded(
        None,
        Bound(low=0, high=1, form="one", expected="a probability, 0 .. 1"),
        "pixels whose best mask is less probable get no label (masks: 0 to 1)",
    )
    bias: dict[str, float] | None = bounded(None, BIAS)

    @property
    def score_range(self) -> tuple[float, float]:
        """The range of probabilities."""
        return 0.0, 1.0

    def label_map(self, model, features, queries, placement, *, allowed=None, picture=None):
        """Label by (1) and (2); see ``Decision``."""
        masks = at_least_float32(model.segment_logits(features, queries.texts))
        origins, *sizes = placement.windows
        labels, value = ok.window_argmax(
            masks,
            origins,
            *sizes,
            activation="sigmoid",
            stage="window",
            bias=queries.offsets(self.bias, allowed, masks.dtype),
            class_labels=queries.owners,
            label_type=queries.label_type,
            return_value=True,
        )
        take_back(labels, value, allowed=allowed, threshold=self.background_threshold)
        return labels, value

    def background_rules(self) -> list[str]:
        """Name the threshold of (2)."""
        limit = self.background_threshold
        return [] if limit is None else [f"the best mask is less probable than {limit}"]

    def describe(self) -> dict[str, Any]:
        """Describe every choice."""
        return {
            "scores": "probabilities of class masks, sigmoid at the window stage",
            "bias": self.bias or {},
        }


Rule = ClassMasks
