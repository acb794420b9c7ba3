"""GroupViT's text tower: a causal transformer over CLIP's byte pairs, read out at the end of the text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ...layers.packing import Packing
from ...layers.vit_block import PackedBlock
from ..open_clip import ClipTokenizer
from .base import PackedText


@dataclass
class ClipTextOptions:
    """Attributes:
        width, heads, depth, hidden: of the transformer; hidden is the width of its MLPs.
        context_length, vocab_size: of the ids.
        act: ``quick_gelu`` or ``gelu``.
        eos_id: the id of the end; None: the largest id of a text.
        tokenizer: None: CLIP's byte pairs; a folder with a tokenizer of transformers.
    """

    width: int = 256
    heads: int = 4
    depth: int = 12
    hidden: int = 1024
    context_length: int = 77
    vocab_size: int = 49408
    act: str = "quick_gelu"
    eos_id: int | None = None
    tokenizer: str | None = None


class ClipText(PackedText):
    def __init__(self, options: ClipTextOptions):
        super().__init__()
        o = self.options = options
        self.width, self.context_length = o.width, o.context_length
        self.token_embedding = nn.Embedding(o.vocab_size, o.width)
        self.positional_embedding = nn.Parameter(torch.empty(o.context_length, o.width))
        self.layers = nn.ModuleList(PackedBlock(o.width, o.heads, o.hidden, o.act, causal=True) for _ in range(o.depth))
        self.ln_final = nn.LayerNorm(o.width)
        words = {"context_length": o.context_length, "vocab_size": o.vocab_size}
        self.tokenizer = ClipTokenizer({"text_cfg": words | ({"hf_tokenizer_name": o.tokenizer} if o.tokenizer else {})})
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.layers:  # as CLIP draws them
            nn.init.normal_(block.attn.qkv.weight, std=o.width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=o.width**-0.5 * (2 * o.depth) ** -0.5)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * o.width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=o.width**-0.5 * (2 * o.depth) ** -0.5)

    @property
    def blocks(self) -> list[nn.Module]:  # type: ignore[override]
        return list(self.layers)

    def kept(self, ids: torch.Tensor) -> torch.Tensor:
        """Up to the end: nothing looks behind it."""
        end = ids.argmax(1) if self.options.eos_id is None else (ids == self.options.eos_id).int().argmax(1)
        return torch.arange(ids.shape[1], device=ids.device) <= end[:, None]

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.token_embedding(ids) + self.positional_embedding[positions]

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.ln_final(tokens)

    def sentence(self, tokens: torch.Tensor, packing: Packing) -> torch.Tensor:
        """That of the last token."""
        return tokens.index_select(0, packing.starts + packing.seen.sum(1) - 1)

    def facts(self) -> Any:
        return {"kind": "clip", **asdict(self.options)}
