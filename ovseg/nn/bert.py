"""BERT, by transformers' own modules and under their names, run packed.

The vector of a text is that of its first token, [CLS]. ``weights.bert`` reads pretrained files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from ..errors import first_line
from .backbone import Tokenizer
from .blocks import attention
from .text import PackedText
from .vit_blocks import Packing


@dataclass
class BertOptions:
    """Options of the text tower; the defaults are bert-base-uncased.

    Attributes:
        width, heads, depth, hidden, vocab_size, positions: sizes of the model.
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


class BertBlock(nn.Module):
    """transformers' BertLayer over its own parts, under their names, on packed tokens."""

    def __init__(self, layer: Any):
        super().__init__()
        self.attention = layer.attention
        self.intermediate = layer.intermediate
        self.output = layer.output
        self.heads = int(layer.attention.self.num_attention_heads)
        self.attention_backend = "sdpa"

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """Run over packed tokens [N, D]; attention stays within each text."""
        own = self.attention.self
        q, k, v = (
            packing.pad(part(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (own.query, own.key, own.value)
        )
        o = attention(
            q,
            k,
            v,
            mask=packing.seen[:, None, None, :],
            dropout=own.dropout.p if self.training else 0.0,
            backend=self.attention_backend,
        )
        x = self.attention.output(packing.take(o.transpose(1, 2).flatten(2)), x)
        return self.output(self.intermediate(x), x)


class Bert(PackedText):
    """A BERT of any size, drawn at random."""

    def __init__(self, options: BertOptions, tokenizer: Tokenizer):
        super().__init__()
        o = self.options = options
        transformers = import_transformers()
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
        # With its pooler, which nothing uses: published files hold it.
        self.transformer = transformers.BertModel(config)
        layers = self.transformer.encoder.layer
        for i, layer in enumerate(layers):
            layers[i] = BertBlock(layer)
        self.width = o.width
        self.tokenizer = tokenizer

    @property
    @override
    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.encoder.layer)

    @override
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        parts = self.transformer.embeddings
        x = (
            parts.word_embeddings(ids)
            + parts.token_type_embeddings.weight[0]
            + parts.position_embeddings(positions)
        )
        return parts.dropout(parts.LayerNorm(x))

    @override
    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if ".pooler." not in name]

    @override
    def facts(self) -> Any:
        facts = {"kind": "bert", **asdict(self.options)}
        del facts["weights"]
        return facts


def import_transformers() -> Any:
    """Import transformers, or say what to install."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"text.kind is 'bert', which is transformers' ({first_line(error)}): "
            "pip install transformers; or text.kind=clip"
        ) from error
    return transformers
