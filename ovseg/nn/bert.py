"""BERT, by transformers' own modules and under their names, run packed.

The vector of a text is that of its first token, [CLS].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import CheckpointError, InputError, first_line
from ..paths import no_file, no_folder
from ..weights.files import check_numbers
from ..weights.hub import PREFIX, fetch
from ..weights.pickles import read_published
from .blocks import attention
from .text import PackedText
from .vit_blocks import Packing

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_UNUSED = (
    "cls.",
    "embeddings.position_ids",
)  # of pretraining's heads; a table in files of older versions


@dataclass
class BertOptions:
    """Attributes:
    width, heads, depth, hidden, vocab_size, positions: of the model; the defaults are
        bert-base-uncased.
    context_length: tokens of the longest text.
    dropout: of hidden states and attention weights, in training.
    tokenizer: the Hub's repository or the folder that its words come from.
    weights: the same for pretrained weights, or a file; None for random ones.
    """

    width: int = 768
    heads: int = 12
    depth: int = 12
    hidden: int = 3072
    vocab_size: int = 30522
    positions: int = 512
    context_length: int = 77
    dropout: float = 0.1
    tokenizer: str = "google-bert/bert-base-uncased"
    weights: str | None = None


class BertTokenizer:
    """Texts to ids [T, context_length], 0 is padding; transformers' own, loaded on first use."""

    def __init__(self, source: str, context_length: int):
        self.source, self.context_length = source, context_length
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        if self._tokenizer is None:
            folder = Path(self.source)
            if no_folder(folder) is not None:
                folder = fetch(
                    self.source,
                    ("tokenizer.json",),
                    ways=", with tokenizer_config.json, in a folder that text.tokenizer names",
                ).parent
                fetch(self.source, ("tokenizer_config.json",))
            transformers = _transformers()
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False
                )
            except (OSError, ValueError, TypeError, KeyError) as error:
                why = first_line(error)
                raise InputError(
                    f"text.tokenizer is {self.source!r}, of which transformers makes no "
                    f"tokenizer ({why}); expected a folder or repository with tokenizer.json"
                ) from error
        found = self._tokenizer(
            [texts] if isinstance(texts, str) else list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        return (
            found["input_ids"] * found["attention_mask"]
        )  # padding is 0, whatever the tokenizer pads with


class BertBlock(nn.Module):
    """transformers' BertLayer over its own parts, under their names, on packed tokens."""

    def __init__(self, layer: Any):
        super().__init__()
        self.attention, self.intermediate, self.output = (
            layer.attention,
            layer.intermediate,
            layer.output,
        )
        self.heads, self.attention_backend = int(layer.attention.self.num_attention_heads), "sdpa"

    def forward(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        own = self.attention.self
        q, k, v = (
            packing.pad(part(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (own.query, own.key, own.value)
        )
        dropout = own.dropout.p if self.training else 0.0
        o = attention(
            q,
            k,
            v,
            mask=packing.seen[:, None, None, :],
            dropout=dropout,
            backend=self.attention_backend,
        )
        x = self.attention.output(packing.take(o.transpose(1, 2).flatten(2)), x)
        return self.output(self.intermediate(x), x)


class Bert(PackedText):
    Options: ClassVar = BertOptions

    def __init__(self, options: BertOptions):
        super().__init__()
        o = self.options = options
        transformers = _transformers()
        config = transformers.BertConfig(
            vocab_size=o.vocab_size,
            hidden_size=o.width,
            num_hidden_layers=o.depth,
            num_attention_heads=o.heads,
            intermediate_size=o.hidden,
            max_position_embeddings=o.positions,
            hidden_dropout_prob=o.dropout,
            attention_probs_dropout_prob=o.dropout,
        )
        self.transformer = transformers.BertModel(
            config
        )  # with its pooler, which nothing uses: published files hold it
        layers = self.transformer.encoder.layer
        for i, layer in enumerate(layers):
            layers[i] = BertBlock(layer)
        self.width, self.tokenizer = o.width, BertTokenizer(o.tokenizer, o.context_length)
        if o.weights is not None:
            self.load_pretrained(o.weights)

    @property
    def blocks(self) -> list[nn.Module]:  # type: ignore[override]
        return list(self.transformer.encoder.layer)

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        parts = self.transformer.embeddings
        x = (
            parts.word_embeddings(ids)
            + parts.token_type_embeddings.weight[0]
            + parts.position_embeddings(positions)
        )
        return parts.dropout(parts.LayerNorm(x))

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if ".pooler." not in name]

    def load_pretrained(self, source: str) -> None:
        """Weights of BERT itself: a folder or file of transformers', or a repository of the Hub.

        Raises:
            CheckpointError: for a file that lacks a tensor of this tower.
        """
        path = Path(source)
        if no_folder(path) is None:
            path = next(
                (path / name for name in _WEIGHTS if (path / name).is_file()), path / _WEIGHTS[0]
            )
        elif no_file(path) is not None:
            path = fetch(source.removeprefix(PREFIX), _WEIGHTS, ways=", named by text.weights")
        state = {_plain(name): x for name, x in read_published(path).items()}
        state = {name: x for name, x in state.items() if not name.startswith(_UNUSED)}
        own = self.transformer.state_dict()
        state = {name: own[name] for name in own if name.startswith("pooler.")} | state
        wrong = sorted(
            name
            for name in own.keys() | state.keys()
            if name not in own or name not in state or own[name].shape != state[name].shape
        )
        if wrong:
            raise CheckpointError(
                f"{path} does not fit the text tower ({len(wrong)} tensors: "
                f"{', '.join(wrong[:5])}); expected those of "
                f"transformers' BertModel of width {self.options.width} and depth "
                f"{self.options.depth}"
            )
        check_numbers(path, state, own)
        self.transformer.load_state_dict(state)

    def facts(self) -> Any:
        return {
            "kind": "bert",
            **{key: value for key, value in asdict(self.options).items() if key != "weights"},
        }


def _plain(name: str) -> str:
    """Names as ``BertModel`` has them now: without a prefix, norms by weight and bias."""
    name = name.removeprefix("bert.")
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"text.kind is 'bert', which is transformers' ({first_line(error)}): "
            "pip install transformers; or text.kind=clip"
        ) from error
    return transformers
