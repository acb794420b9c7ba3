"""Tokenizers: words for the tiny models, CLIP's byte pairs (through open_clip) for the CLIP
backbones.

TinyClip: a trainable two-tower CLIP of 0.3 M parameters, the embedded default.

The vision tower mixes locally first (a convolution stem to a grid of patch tokens, then depth-wise
blocks) and globally last (transformer blocks with a class token). Without the local part a model of
this size learns to retrieve captions and not where things are. There is no position embedding: any
picture size works.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ..data.scenes import ONE_ENTITY, SEVERAL, VOCABULARIES
from ..data.templates import TEMPLATES
from .backbone import ClipBackbone, PatchTokens
from .blocks import LOCAL_PATCH, AttentionBlock, LocalBlock, local_stem
from .readout import READOUTS, ProxyFeatures, Readout, run_blocks

PAD, START, END, UNKNOWN = 0, 1, 2, 3
_WORD = re.compile(r"[a-z0-9]+")


def scene_words() -> list[str]:
    """All words that captions of the scenes and the tiny prompt templates can hold, sorted."""
    text = (
        " ".join((*ONE_ENTITY, *SEVERAL, *TEMPLATES["scenes"]))
        .replace("{list}", "")
        .replace("{a}", "")
        .replace("{}", "")
    )
    words = set(_WORD.findall(text.lower())) | {"a", "an", "and", "on"}
    for vocabulary in VOCABULARIES.values():
        words.update(vocabulary.colours, vocabulary.kinds, vocabulary.stuff)
    return sorted(words)


class WordTokenizer:
    """One id per known word; ``[T, context_length]`` int64, padded with 0.

    Unknown words share one id.

    Args:
        words: the known words; by default those of the scenes.
        context_length: longest text in tokens, start and end included; longer texts are cut.
    """

    def __init__(self, words: Sequence[str] | None = None, context_length: int = 16):
        self.words = list(words) if words is not None else scene_words()
        self.context_length = context_length
        self._id = {word: i + UNKNOWN + 1 for i, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        return UNKNOWN + 1 + len(self.words)

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens = [self._id.get(word, UNKNOWN) for word in _WORD.findall(text.lower())]
            tokens = [START, *tokens[: self.context_length - 2], END]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Which of ``texts`` are longer than the context."""
        return [len(_WORD.findall(text.lower())) > self.context_length - 2 for text in texts]

    def unknown(self, text: str) -> list[str]:
        """The words of ``text`` that this tokenizer does not know."""
        return [word for word in _WORD.findall(text.lower()) if word not in self._id]


class _Block(AttentionBlock):
    """Block of both towers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def project(
        self, normed: torch.Tensor, rope: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        B, L, D = normed.shape
        q, k, v = self.qkv(normed).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def keys_values(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        B, T, D = normed.shape
        kv = F.linear(normed, self.qkv.weight[D:], self.qkv.bias[D:])
        k, v = kv.view(B, T, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return k, v

    def merge(self, o: torch.Tensor) -> torch.Tensor:
        return self.out(o.transpose(1, 2).flatten(2))

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm_2(x))


@dataclass
class TinyOptions:
    """``width`` of both towers, ``embed_dim`` E, depth of the local, global and text parts."""

    ends: ClassVar[dict[str, tuple[float, float]]] = {
        **dict.fromkeys(("width", "embed_dim", "heads", "image_size"), (1, math.inf)),
        "context_length": (3, math.inf),
        **dict.fromkeys(("local_depth", "depth", "text_depth"), (0, math.inf)),
    }

    width: int = 64
    embed_dim: int = 64
    local_depth: int = 3
    depth: int = 1
    text_depth: int = 2
    heads: int = 4
    image_size: int = 48
    context_length: int = 16


class TinyClip(ClipBackbone):
    """Keyword arguments are the fields of ``TinyOptions``.

    Without a global part (``depth=0``) there is no image embedding; systems that pool patches
    themselves, as SegCLIP does, need none.
    """

    Options: ClassVar = TinyOptions

    patch_size = LOCAL_PATCH
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.25, 0.25, 0.25)
    taps = ("local", "pre_norm", "post_norm")

    def __init__(self, **options: int):
        super().__init__()
        o = TinyOptions(**options)
        width, heads = o.width, o.heads
        if width % heads:
            raise ValueError(f"heads is {heads}; expected a divisor of the width, {width}")
        self.token_dim, self.embed_dim, self.image_size, self.heads = (
            width,
            o.embed_dim,
            o.image_size,
            heads,
        )
        self.tokenizer = WordTokenizer(context_length=o.context_length)
        self.stem = local_stem(width)
        self.local = nn.Sequential(*(LocalBlock(width) for _ in range(o.local_depth)))
        self.cls = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(o.depth))
        self.norm = nn.LayerNorm(width)
        self.image_projection = nn.Linear(width, o.embed_dim, bias=False)
        self.words = nn.Embedding(self.tokenizer.vocab_size, width)
        self.word_positions = nn.Parameter(torch.randn(o.context_length, width) * 0.02)
        self.text_blocks = nn.ModuleList(_Block(width, heads) for _ in range(o.text_depth))
        self.text_norm = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, o.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.words.weight, std=0.1)

    def _local_tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        # Channels last: the norm and the MLP of a local block then read the convolution in place.
        grid = self.local(self.stem(images.contiguous(memory_format=torch.channels_last)))
        return grid.flatten(2).transpose(1, 2), (grid.shape[2], grid.shape[3])

    def _with_cls(self, x: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        return torch.cat([(weight * self.cls).to(x.dtype).expand(len(x), 1, -1), x], dim=1)

    def encode_patches(
        self,
        images: torch.Tensor,
        *,
        tap: str = "post_norm",
        readout: Readout = READOUTS["clip"],
        proxy: ProxyFeatures | None = None,
    ) -> PatchTokens:
        self._check_tap(tap)
        x, size = self._local_tokens(images)
        if tap == "local":
            return PatchTokens(x, size, None)
        tokens, own, size = run_blocks(
            self.vision_blocks, self._with_cls(x), readout, size, proxy=proxy
        )
        cls = own[:, 0]
        if tap == "post_norm":
            tokens, cls = self.norm(tokens), self.norm(cls)
        return PatchTokens(tokens, size, cls)

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        return self._local_tokens(images)

    def sequence(
        self, images: torch.Tensor, class_weight: float = 1.0
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        x, grid = self._local_tokens(images)
        return self._with_cls(x, class_weight), grid

    def set_image_size(self, size: int, interpolation: str) -> None:
        self.image_size = size

    @property
    def class_token(self) -> nn.Parameter:
        return self.cls

    @property
    def vision_blocks(self) -> Sequence[AttentionBlock]:
        return self.blocks

    def new_blocks(self, count: int) -> nn.ModuleList:
        return nn.ModuleList(_Block(self.token_dim, self.heads) for _ in range(count))

    def final_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(tokens)

    def embedding_parameters(self) -> list[nn.Parameter]:
        return [self.words.weight, self.word_positions, *self.stem.parameters()]

    def vision_parameters(self, tap: str = "post_norm") -> list[nn.Parameter]:
        self._check_tap(tap)
        parts: list[nn.Module] = [self.stem, self.local]
        if tap != "local":
            parts.append(self.blocks)
        if tap == "post_norm":
            parts.append(self.norm)
        found = [p for part in parts for p in part.parameters()]
        return found if tap == "local" else [*found, self.cls]

    def text_parameters(self) -> list[nn.Parameter]:
        parts: tuple[Any, ...] = (
            self.words,
            self.text_blocks,
            self.text_norm,
            self.text_projection,
        )
        return [self.word_positions, *(p for part in parts for p in part.parameters())]

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.image_projection(tokens)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        if len(self.blocks) == 0:
            raise ValueError(
                "depth is 0; expected at least one block in which the class token sees the patches"
            )
        x = self._with_cls(self._local_tokens(images)[0])
        for block in self.vision_blocks[:-1]:
            x = block(x)
        return self.project(self.norm(self.vision_blocks[-1](x, first=1)[:, 0]))

    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        token_ids = token_ids.to(self.words.weight.device)
        keep = token_ids != PAD
        x = F.embedding(token_ids, self.words.weight) + self.word_positions[: token_ids.shape[1]]
        for block in self.text_blocks:
            x = block(x, attn_mask=keep[:, None, None, :])
        end = (token_ids == END).int().argmax(dim=1)
        x = self.text_norm(x[torch.arange(len(x), device=x.device), end])
        return self.text_projection(x)
