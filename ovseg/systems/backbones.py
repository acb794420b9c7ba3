"""Backbones and text towers by kind: modules of ``nn`` with the tokenizers and weights they need.

``backbone: {kind: tiny, ...}`` and ``text: {kind: bert, ...}`` name an entry and its options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..bounds import bounded
from ..data.words import WordTokenizer
from ..nn.backbone import ClipBackbone
from ..nn.bert import Bert, BertOptions
from ..nn.clip_architectures import import_open_clip, sized
from ..nn.grouping_towers import GroupingBackbone, GroupingOptions, GroupingViT
from ..nn.open_clip import OpenClipBackbone
from ..nn.text import ClipText, ClipTextOptions, PackedText, Words, WordsOptions
from ..nn.tiny import TinyClip, TinyOptions
from ..options import options_of
from ..registration import Registry, table
from ..weights.bert import load_bert
from ..weights.clip import create_clip
from ..weights.tokenizers import BertTokenizer, ClipTokenizer, not_loaded


class Kind(NamedTuple):
    """An entry: the dataclass of its options, and what builds it from them."""

    Options: type
    build: Callable[[Any], Any]


@dataclass
class OpenClipOptions:
    """Options of the kind ``open_clip``.

    Attributes:
        architecture: open_clip's name, such as ``ViT-B-16-quickgelu`` (OpenAI's weights want
            QuickGELU), or the arguments of ``open_clip.CLIP``.
        clip: open_clip tag (downloads), a local file, or None for random weights. Files are read
            without running code.
        stride: step between patches in pixels; None is the patch size. A smaller step gives
            overlapping patches and a finer grid (PACL's stride trick: 4 for patches of 16).
        attention_backend: ``sdpa`` or ``xformers``.
        image_size, context_length: side of pictures in pixels and tokens of a text, if not those of
            the architecture; positions of weights of another size are resized, as open_clip does
            it. Pictures of any size are read without: this is the size that the model is built for.
    """

    architecture: Any = "ViT-B-16-quickgelu"
    clip: str | None = None
    stride: int | None = bounded(None, low=1, high=16384)
    attention_backend: str = "sdpa"
    image_size: int | None = bounded(None, low=1, high=16384)
    context_length: int | None = bounded(None, low=3, high=65536)


def _open_clip(o: OpenClipOptions) -> OpenClipBackbone:
    name = o.architecture
    try:
        clip = create_clip(name, o.clip, o.image_size, o.context_length)
    except OSError as error:
        known = import_open_clip().get_model_config(name) if isinstance(name, str) else None
        if known is None or "hf_model_name" not in known["text_cfg"]:
            raise
        raise not_loaded("text tower's configuration", name, error) from error
    architecture = sized(name, o.image_size, o.context_length)
    tokenizer = ClipTokenizer(architecture)
    try:
        return OpenClipBackbone(clip, architecture, tokenizer, o.stride, o.attention_backend)
    except ValueError as error:
        raise ValueError(f"architecture {name!r}: {error}") from error


def _tiny(o: TinyOptions) -> TinyClip:
    return TinyClip(o, WordTokenizer(context_length=o.context_length))


def _grouping(o: GroupingOptions) -> GroupingBackbone:
    image = GroupingViT(o)  # drawn before the text tower
    return GroupingBackbone(o, image, build_text(**o.text))


BACKBONES: Registry[Kind] = Registry(
    "backbone.kind",
    lambda: table(
        {
            "grouping": Kind(GroupingOptions, _grouping),
            "open_clip": Kind(OpenClipOptions, _open_clip),
            "tiny": Kind(TinyOptions, _tiny),
        }
    ),
    ValueError,
)


def build_backbone(kind: str, **options: Any) -> ClipBackbone:
    """Build a backbone of random weights, or with those that ``options`` name."""
    found = BACKBONES[kind]
    return found.build(options_of(found.Options, options, "backbone"))


def complete_backbone(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return kind and options of a backbone and its text tower, those that are not given too."""
    options = dict(given)
    kind = options.pop("kind", None)
    found = asdict(options_of(BACKBONES[kind].Options, options, "backbone"))
    if "text" in found:
        found["text"] = complete_text(**found["text"])
    return {"kind": kind, **found}


def _bert(o: BertOptions) -> Bert:
    tower = Bert(o, BertTokenizer(o.tokenizer, o.context_length))
    if o.weights is not None:
        load_bert(tower, o.weights)
    return tower


def _clip_text(o: ClipTextOptions) -> ClipText:
    words: dict[str, Any] = {"context_length": o.context_length, "vocab_size": o.vocab_size}
    if o.tokenizer:
        words["hf_tokenizer_name"] = o.tokenizer
    return ClipText(o, ClipTokenizer({"text_cfg": words}))


def _words(o: WordsOptions) -> Words:
    return Words(o, WordTokenizer(context_length=o.context_length))


TEXTS: Registry[Kind] = Registry(
    "text.kind",
    lambda: table(
        {
            "bert": Kind(BertOptions, _bert),
            "clip": Kind(ClipTextOptions, _clip_text),
            "words": Kind(WordsOptions, _words),
        }
    ),
    ValueError,
)


def build_text(kind: str = "clip", **options: Any) -> PackedText:
    """Build a text tower of random weights, or with those that its options name."""
    found = TEXTS[kind]
    return found.build(options_of(found.Options, options, "text"))


def complete_text(kind: str = "clip", **options: Any) -> dict[str, Any]:
    """Return kind and options of a text tower, those that are not given too."""
    return {"kind": kind, **asdict(options_of(TEXTS[kind].Options, options, "text"))}
