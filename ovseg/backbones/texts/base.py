"""What a text tower of the grouping systems is: token ids to one vector a text and, packed, one a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ...layers.packing import Packing
from ...layers.upload import upload
from ..base import Tokenizer


class TextStates(NamedTuple):
    """``sentence`` [T, D]; ``tokens`` [N, D], packed; ``packing`` says where they lie."""

    sentence: torch.Tensor
    tokens: torch.Tensor
    packing: Packing

    def split(self, sizes: Sequence[int]) -> list[TextStates]:
        """Those of neighbouring texts, so many each."""
        packings = self.packing.split(sizes)
        tokens = self.tokens.split([len(one.rows) for one in packings])
        return [TextStates(*one) for one in zip(self.sentence.split(list(sizes)), tokens, packings, strict=True)]

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens [T, L, D], what of them is a token [T, L] bool)."""
        return self.packing.pad(self.tokens), self.packing.seen


class PackedText(nn.Module):
    """Base of the towers.

    Attributes:
        width: D.
        tokenizer: texts to ids [T, L].
        blocks: one by one, called as modules.
    """

    width: int
    tokenizer: Tokenizer
    blocks: Sequence[nn.Module]

    def kept(self, ids: torch.Tensor) -> torch.Tensor:
        """[T, L] bool: where a text's tokens are. 0 is padding."""
        return ids != 0

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[N, D] of packed ids and their places in their texts."""
        raise NotImplementedError

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """What comes after the last block."""
        return tokens

    def sentence(self, tokens: torch.Tensor, packing: Packing) -> torch.Tensor:
        """[T, D], a vector a text: that of its first token."""
        return tokens.index_select(0, packing.starts)

    def forward(self, ids: torch.Tensor, pads: bool = False) -> TextStates:
        """Encode texts.

        Args:
            ids: [T, L] int64. From the CPU a GPU is not waited for; on it the lengths of the texts have to be.
            pads: compute padding too, as published training does.
        """
        device = next(self.parameters()).device
        packing = Packing(self.kept(ids), pads, device)
        x = self.embed(packing.take(upload(ids[:, : packing.shape[1]], device)), packing.positions)
        for block in self.blocks:
            x = block(x, packing)
        x = self.finish(x)
        return TextStates(self.sentence(x, packing), x, packing)

    def encode_together(self, texts: Sequence[torch.Tensor], pads: bool = False) -> list[TextStates]:
        """Several lists of ids [T_i, L_i] in one pass; ``TextStates`` of each."""
        longest = max(ids.shape[1] for ids in texts)
        found = self(torch.cat([F.pad(ids, (0, longest - ids.shape[1])) for ids in texts]), pads)
        return found.split([len(ids) for ids in texts])

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those that ``forward`` depends on."""
        return list(self.parameters())

    def facts(self) -> Any:
        """What no tensor shows, for JSON."""
        raise NotImplementedError
