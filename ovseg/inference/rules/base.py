"""What a rule of labelling is: a frozen dataclass of its choices with one method, ``label_map``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...systems import OVSegModel, PatchFeatures
from ..queries import EncodedQueries
from ..view import Placement


@dataclass(frozen=True)
class Decision:
    """How it is decided: from the features of a picture's windows to its label map.

    Base of the rules.

    A rule is a file in this folder that defines a subclass, a frozen dataclass, and names it
    ``Rule``. Its fields, made by ``fields.option``, are options of ``Predictor``, ``segment``, of
    protocols and of the command line without further ado; a name that another rule has too shares
    that rule's option.
    """

    @property
    def name(self) -> str:
        """Of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def needs_picture(self) -> bool:
        """Whether ``label_map`` looks at the picture itself."""
        return False

    @property
    def score_range(self) -> tuple[float, float] | None:
        """Least and largest score that a background threshold can be compared with; None where a
        threshold is not on that scale.
        """
        return None

    def label_map(
        self,
        model: OVSegModel,
        features: PatchFeatures,
        queries: EncodedQueries,
        placement: Placement,
        *,
        allowed: torch.Tensor | None = None,
        picture: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(labels [H, W] int16, -1 is background; the winner's score [H, W]), on the device of the
        features, without reading it.

        Args:
            model: what made ``features``; it may hold more of the rule, as ``segment_logits`` does.
            features: of the windows of one picture, n of them.
            queries: what is asked, T texts of C classes and of the background.
            placement: where the windows lie.
            allowed: [T] bool, the texts that may win; all if None.
            picture: [3, H, W] in 0..1, where ``needs_picture``.
        """
        raise NotImplementedError

    def background_rules(self) -> list[str]:
        """In words, when a pixel gets no label, besides texts of the background."""
        return []

    def describe(self) -> dict[str, Any]:
        """Every choice in words, for result files and people."""
        return {}
