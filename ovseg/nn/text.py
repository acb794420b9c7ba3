"""Text towers of the grouping systems: token ids to one vector a text and one a token.

All run packed: padding costs nothing. ``ClipText`` is GroupViT's, a causal transformer over CLIP's
byte pairs, read out at the end of the text; ``Words`` is the tiny models', read out at the start of
the text as BERT is (``bert``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from .backbone import Tokenizer
from .tensors import upload
from .vit_blocks import PackedBlock, Packing


class TextStates(NamedTuple):
    """Vectors of texts, as a text tower gives them.

    Attributes:
        sentence: [T, D], one vector a text.
        tokens: [N, D], packed.
        packing: where they lie.
    """

    sentence: Tensor
    tokens: Tensor
    packing: Packing

    def split(self, sizes: Sequence[int]) -> list[TextStates]:
        """Return those of neighbouring texts, so many each."""
        packings = self.packing.split(sizes)
        tokens = self.tokens.split([len(one.rows) for one in packings])
        sentences = self.sentence.split(list(sizes))
        return [TextStates(*one) for one in zip(sentences, tokens, packings, strict=True)]

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return (tokens [T, L, D], which of them are tokens [T, L] bool)."""
        return self.packing.pad(self.tokens), self.packing.seen


class PackedText(nn.Module):
    """Base of the towers.

    Attributes:
        width: D.
        tokenizer: texts to ids [T, L].
        layers: the transformer blocks.
        options: what it was built with.
    """

    width: int
    tokenizer: Tokenizer
    layers: nn.ModuleList
    options: Any

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, one by one, called as modules."""
        return list(self.layers)

    def kept(self, ids: Tensor) -> Tensor:
        """Return where a text's tokens are, [T, L] bool; id 0 is padding."""
        return ids != 0

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return [N, D] of packed ids and their places in their texts."""
        raise NotImplementedError

    def finish(self, tokens: Tensor) -> Tensor:
        """Apply what comes after the last block."""
        return tokens

    def sentence(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Return a vector a text, [T, D]: that of its first token."""
        return tokens.index_select(0, packing.starts)

    def forward(self, ids: Tensor, pads: bool = False) -> TextStates:
        """Encode texts.

        Args:
            ids: [T, L] int64. From the CPU a GPU is not waited for; on it the lengths of the texts
                have to be.
            pads: compute padding too, as published training does.
        """
        device = next(self.parameters()).device
        packing = Packing(self.kept(ids), pads, device)
        x = self.embed(packing.take(upload(ids[:, : packing.shape[1]], device)), packing.positions)
        for block in self.blocks:
            x = block(x, packing)
        x = self.finish(x)
        return TextStates(self.sentence(x, packing), x, packing)

    def sentences(self, ids: Tensor) -> Tensor:
        """Return one vector a text, [T, D]."""
        return self(ids).sentence

    def lasting_options(self) -> dict[str, Any]:
        """Return the options that change once the weights are in a saved file: they name none."""
        return {"weights": None} if hasattr(self.options, "weights") else {}

    def encode_together(self, texts: Sequence[Tensor], pads: bool = False) -> list[TextStates]:
        """Encode several lists of ids [T_i, L_i] in one pass; return the states of each."""
        longest = max(ids.shape[1] for ids in texts)
        found = self(torch.cat([F.pad(ids, (0, longest - ids.shape[1])) for ids in texts]), pads)
        return found.split([len(ids) for ids in texts])

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return those that ``forward`` depends on."""
        return list(self.parameters())

    def facts(self) -> Any:
        """Return what no tensor shows, for JSON."""
        raise NotImplementedError


@dataclass
class ClipTextOptions:
    """Options of a causal text tower.

    Attributes:
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
    """A causal transformer; a text's vector is that of its last token."""

    def __init__(self, options: ClipTextOptions, tokenizer: Tokenizer):
        super().__init__()
        o = self.options = options
        self.width = o.width
        self.context_length = o.context_length
        self.tokenizer = tokenizer
        self.token_embedding = nn.Embedding(o.vocab_size, o.width)
        self.positional_embedding = nn.Parameter(torch.empty(o.context_length, o.width))
        self.layers = nn.ModuleList(
            PackedBlock(o.width, o.heads, o.hidden, o.act, causal=True) for _ in range(o.depth)
        )
        self.ln_final = nn.LayerNorm(o.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.layers:  # as CLIP draws them
            nn.init.normal_(block.attn.qkv.weight, std=o.width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=o.width**-0.5 * (2 * o.depth) ** -0.5)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * o.width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=o.width**-0.5 * (2 * o.depth) ** -0.5)

    @override
    def kept(self, ids: Tensor) -> Tensor:
        # Up to the end: nothing looks behind it.
        eos_id = self.options.eos_id
        end = ids.argmax(1) if eos_id is None else (ids == eos_id).int().argmax(1)
        return torch.arange(ids.shape[1], device=ids.device) <= end[:, None]

    @override
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.positional_embedding[positions]

    @override
    def finish(self, tokens: Tensor) -> Tensor:
        return self.ln_final(tokens)

    @override
    def sentence(self, tokens: Tensor, packing: Packing) -> Tensor:
        return tokens.index_select(0, packing.starts + packing.seen.sum(1) - 1)

    @override
    def facts(self) -> Any:
        return {"kind": "clip", **asdict(self.options)}


@dataclass
class WordsOptions:
    """Options of the tiny models' text tower.

    Attributes:
        width, heads, depth, hidden: of the blocks; hidden is the width of their MLPs.
        context_length: tokens of the longest text.
    """

    width: int = 64
    heads: int = 4
    depth: int = 2
    hidden: int = 128
    context_length: int = 16


class Words(PackedText):
    """A few blocks over known words; ``tokenizer`` says how many there are (``vocab_size``)."""

    def __init__(self, options: WordsOptions, tokenizer: Any):
        super().__init__()
        o = self.options = options
        self.width = o.width
        self.tokenizer = tokenizer
        self.words = nn.Embedding(tokenizer.vocab_size, o.width)
        self.positions = nn.Parameter(torch.randn(o.context_length, o.width) * 0.02)
        self.layers = nn.ModuleList(PackedBlock(o.width, o.heads, o.hidden) for _ in range(o.depth))
        self.norm = nn.LayerNorm(o.width)
        nn.init.normal_(self.words.weight, std=0.1)

    @override
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.words(ids) + self.positions[positions]

    @override
    def finish(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens)

    @override
    def facts(self) -> Any:
        return {"kind": "words", **asdict(self.options)}
