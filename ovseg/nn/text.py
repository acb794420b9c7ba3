"""What a text tower of the grouping systems is: token ids to one vector a text and, packed, one a
token.

GroupViT's text tower: a causal transformer over CLIP's byte pairs, read out at the end of the text.

The text tower of the tiny grouping models: words of the scenes, a few blocks, read out at the start
of the text, as BERT is.

Text towers of the grouping systems by kind: ``bert`` (transformers), ``clip`` (a causal transformer
over byte pairs), ``words`` (of the tiny models). All run packed: padding costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..options import options_of
from ..registration import Registry, named
from .backbone import Tokenizer
from .open_clip import ClipTokenizer
from .tensors import upload
from .tiny import WordTokenizer
from .vit_blocks import PackedBlock, Packing


class TextStates(NamedTuple):
    """``sentence`` [T, D]; ``tokens`` [N, D], packed; ``packing`` says where they lie."""

    sentence: torch.Tensor
    tokens: torch.Tensor
    packing: Packing

    def split(self, sizes: Sequence[int]) -> list[TextStates]:
        """Those of neighbouring texts, so many each."""
        packings = self.packing.split(sizes)
        tokens = self.tokens.split([len(one.rows) for one in packings])
        return [
            TextStates(*one)
            for one in zip(self.sentence.split(list(sizes)), tokens, packings, strict=True)
        ]

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

    def encode_together(
        self, texts: Sequence[torch.Tensor], pads: bool = False
    ) -> list[TextStates]:
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
    Options: ClassVar = ClipTextOptions

    def __init__(self, options: ClipTextOptions):
        super().__init__()
        o = self.options = options
        self.width, self.context_length = o.width, o.context_length
        self.token_embedding = nn.Embedding(o.vocab_size, o.width)
        self.positional_embedding = nn.Parameter(torch.empty(o.context_length, o.width))
        self.layers = nn.ModuleList(
            PackedBlock(o.width, o.heads, o.hidden, o.act, causal=True) for _ in range(o.depth)
        )
        self.ln_final = nn.LayerNorm(o.width)
        words = {"context_length": o.context_length, "vocab_size": o.vocab_size}
        self.tokenizer = ClipTokenizer(
            {"text_cfg": words | ({"hf_tokenizer_name": o.tokenizer} if o.tokenizer else {})}
        )
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
        end = (
            ids.argmax(1)
            if self.options.eos_id is None
            else (ids == self.options.eos_id).int().argmax(1)
        )
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


@dataclass
class WordsOptions:
    """Width, heads and depth of the blocks, width of their MLPs; ``context_length``: tokens of the
    longest text.
    """

    width: int = 64
    heads: int = 4
    depth: int = 2
    hidden: int = 128
    context_length: int = 16


class Words(PackedText):
    Options: ClassVar = WordsOptions

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


TEXTS: Registry[Any] = Registry(
    "text.kind",
    lambda: named(
        {
            "bert": "ovseg.nn.bert:Bert",  # transformers
            "clip": "ovseg.nn.text:ClipText",
            "words": "ovseg.nn.text:Words",
        }
    ),
    ValueError,
)


def complete_text(kind: str = "clip", **options: Any) -> dict[str, Any]:
    """Return kind and options of a text tower, those that are not given too."""
    return {"kind": kind, **asdict(options_of(TEXTS[kind].Options, options, "text"))}


def build_text(kind: str = "clip", **options: Any) -> PackedText:
    """Build a text tower of random weights, or with those that its options name."""
    text = TEXTS[kind]
    return text(options_of(text.Options, options, "text"))
