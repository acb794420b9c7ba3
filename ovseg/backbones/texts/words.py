"""The text tower of the tiny grouping models: words of the scenes, a few blocks, read out at the start of the text, as BERT is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ...data.tokenizers import WordTokenizer
from ...layers.vit_block import PackedBlock
from .base import PackedText


@dataclass
class WordsOptions:
    """Width, heads and depth of the blocks, width of their MLPs; ``context_length``: tokens of the longest text."""

    width: int = 64
    heads: int = 4
    depth: int = 2
    hidden: int = 128
    context_length: int = 16


class Words(PackedText):
    def __init__(self, options: WordsOptions):
        super().__init__()
        o = self.options = options
        self.width, self.tokenizer = o.width, WordTokenizer(context_length=o.context_length)
        self.words = nn.Embedding(self.tokenizer.vocab_size, o.width)
        self.positions = nn.Parameter(torch.randn(o.context_length, o.width) * 0.02)
        self.layers = nn.ModuleList(PackedBlock(o.width, o.heads, o.hidden) for _ in range(o.depth))
        self.norm = nn.LayerNorm(o.width)
        nn.init.normal_(self.words.weight, std=0.1)

    @property
    def blocks(self) -> list[nn.Module]:  # type: ignore[override]
        return list(self.layers)

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.words(ids) + self.positions[positions]

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(tokens)

    def facts(self) -> Any:
        return {"kind": "words", **asdict(self.options)}
