"""Results of several parts: tuples, to be unpacked as ever, whose parts have names."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils import _pytree


class CenterAssignment(NamedTuple):
    """The result of ``center_assignment`` and of the operators built on it."""

    pooled: torch.Tensor  #: [B, G, E]
    index: torch.Tensor  #: [B, L] int64, -1 where masked
    soft: torch.Tensor | None  #: [B, G, L], or None where it was not asked for


class MaskLosses(NamedTuple):
    """The result of ``upsample_mask_loss``."""

    focal: torch.Tensor  #: [B, C]
    dice: torch.Tensor  #: [B, C]
    present: torch.Tensor  #: [B, C] bool


class LabelMaps(NamedTuple):
    """The result of ``upsample_argmax`` and ``window_argmax`` with ``return_value=True``."""

    labels: torch.Tensor  #: [B, H, W] or [H, W]
    value: torch.Tensor  #: of the winning class, the same shape


class SelectedPixels(NamedTuple):
    """The result of ``select_pixels``.

    Flat indices image N + pixel, best first, -1 where there are fewer.
    """

    positive: torch.Tensor  #: [T, k_pos] int64
    negative: torch.Tensor  #: [T, k_neg] int64


# So that torch.export can save a program that returns one.
for _result in (CenterAssignment, MaskLosses, LabelMaps, SelectedPixels):
    _pytree._register_namedtuple(_result, serialized_type_name=f"{__name__}.{_result.__name__}")
