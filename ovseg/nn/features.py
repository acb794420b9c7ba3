"""Features of pictures: what every image tower, backbone and system hands on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

Grid = tuple[int, int]  # (h, w): rows and columns of patches
_F = TypeVar("_F", bound="PatchFeatures")


@dataclass
class PatchFeatures:
    """One vector a picture and one a patch, not normalised.

    From a system, ``encode_image``, both lie in the space of the texts. Below it they are what the
    method says: a tower's tokens stand before its head, and ``encode_patches`` has the class token
    as ``embedding``, of the width of the tokens.

    Attributes:
        embedding: [B, E] floats, one vector a picture.
        tokens: [B, L, E] floats of the same dtype, one vector a patch, row-major over ``grid``.
        grid: (h, w), with h w = L.
    """

    embedding: Tensor
    tokens: Tensor
    grid: Grid

    @classmethod
    def concatenate(cls: type[_F], parts: Sequence[_F]) -> _F:
        """Put the pictures of all parts, which have one grid, behind each other."""
        tensors = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in parts[0]._names_of_tensors()
        }
        return type(parts[0])(**tensors, grid=parts[0].grid)

    def select(self: _F, rows: slice) -> _F:
        """Return some of the pictures."""
        tensors = {name: getattr(self, name)[rows] for name in self._names_of_tensors()}
        return type(self)(**tensors, grid=self.grid)

    def _names_of_tensors(self) -> list[str]:
        return [one.name for one in fields(self) if one.name != "grid"]


@dataclass
class GroupFeatures(PatchFeatures):
    """Features of systems that gather patches in groups; a patch's token is that of its group.

    Attributes:
        groups: [B, G, E] floats, one vector a group.
        index: [B, L] int64, the group of each patch.
        soft: [B, G, L] floats, the share of each group in each patch.
    """

    groups: Tensor
    index: Tensor
    soft: Tensor
