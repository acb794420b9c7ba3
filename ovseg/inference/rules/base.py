"""The contract of a rule of labelling, and what rules share.

A rule is a frozen dataclass of its choices with one method, ``label_map``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...bounds import Bound, check_bounds
from ...errors import InputError
from ...systems import OVSegModel, PatchFeatures
from ..queries import EncodedQueries
from ..view import Placement

# Of cosines. Beyond it float32 holds no difference between two labels.
SCALE = Bound(low=1e-6, high=1e6, form="one", expected="a positive number, 1e-06 .. 1e+06")
SHARE = Bound(low=0, high=1, form="one", expected="a share, 0 .. 1")
# Of what is added to the scores of classes by name, last, as ZegCLIP's -0.1 for classes that it has
# seen in training.
BIAS = Bound(form="mapping", expected="a finite number. allowed= leaves a class out")


@dataclass(frozen=True)
class Decision:
    """The way from the features of a picture's windows to its label map.

    Base of the rules. A rule is a file in this folder that defines a subclass, a frozen dataclass,
    and names it ``Rule``. Its fields that ``bounds.bounded`` declares with a help text are options
    of ``Predictor``, ``segment``, of protocols and of the command line without further ado; a name
    that another rule has too shares that rule's option.
    """

    def __post_init__(self) -> None:
        check_bounds(self, "", InputError)

    @property
    def name(self) -> str:
        """The name of the rule's file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def needs_picture(self) -> bool:
        """Return whether ``label_map`` looks at the picture itself."""
        return False

    @property
    def score_range(self) -> tuple[float, float] | None:
        """The least and the largest score that a background threshold can be compared with.

        None where a threshold is not on that scale.
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
        """Return (labels [H, W] int16, -1 is background; the winner's score [H, W]).

        Both are on the device of the features, which is not read here.

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
        """Say in words when a pixel gets no label, besides texts of the background."""
        return []

    def describe(self) -> dict[str, Any]:
        """Describe every choice in words, for result files and people."""
        return {}


def take_back(
    labels: torch.Tensor,
    value: torch.Tensor,
    *,
    allowed: torch.Tensor | None,
    threshold: float | None = None,
) -> None:
    """Take labels back, in place, where nothing may win and where the winner scores too little."""
    if allowed is not None:
        labels.masked_fill_(value == -torch.inf, -1)
    if threshold is not None:
        labels.masked_fill_(value < threshold, -1)
