"""Backbones and text towers by kind: modules of ``nn`` with the tokenizers and weights they need.

``backbone: {kind: tiny, ...}`` and ``text: {kind: bert, ...}`` name an entry and its options.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from ..bounds import bounded
from ..data.entities import Entities, entities_of, list_entities, load_entities
from ..data.entity_words import EntityTokenizer
from ..data.words import WordTokenizer
from ..errors import ConfigError
from ..nn.backbone import ClipBackbone
from ..nn.bert import Bert, BertOptions
from ..nn.clip_architectures import import_open_clip, sized
from ..nn.feature_trunk import FeatureTrunk, TimmOptions
from ..nn.grouping_towers import GroupingBackbone, GroupingOptions, GroupingViT
from ..nn.open_clip import OpenClipBackbone
from ..nn.text import ClipText, ClipTextOptions, PackedText, Words, WordsOptions
from ..nn.text_vectors import TextVectors, VectorsOptions
from ..nn.timm_architectures import import_timm, levels_of, normalisation
from ..nn.tiny import TinyClip, TinyOptions
from ..options import options_of
from ..registration import Registry, table
from ..weights.bert import load_bert
from ..weights.clip import create_clip
from ..weights.teachers import read_teacher
from ..weights.timm_models import create_timm
from ..weights.tokenizers import BertTokenizer, ClipTokenizer, not_loaded


class Kind(NamedTuple):
    """An entry: the dataclass of its options, and what builds it from them."""

    Options: type
    build: Callable[[Any], Any]
    complete: Callable[[Any], Any] = lambda options: (
        options
    )  # names replaced by what they stand for


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
    text = build_text(**o.text)
    if not isinstance(text, PackedText):
        raise ValueError(
            f"text.kind is {o.text['kind']!r}, which gives no tokens; expected bert, clip or words"
        )
    return GroupingBackbone(o, image, text)


def _timm(o: TimmOptions) -> FeatureTrunk:
    levels = levels_of(o.architecture, o.stages, o.last, o.output_stride)
    ways = ", and backbone.weights=FILE"
    option = "backbone.weights"
    trunk = create_timm(o.architecture, o.weights, option=option, ways=ways, **levels.arguments)
    seen = normalisation(import_timm("backbone.kind 'timm'"), o.architecture)
    return FeatureTrunk(trunk, levels, o, build_text(**o.text), seen)


BACKBONES: Registry[Kind] = Registry(
    "backbone.kind",
    lambda: table(
        {
            "grouping": Kind(GroupingOptions, _grouping),
            "open_clip": Kind(OpenClipOptions, _open_clip),
            "timm": Kind(TimmOptions, _timm),
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


def _vectors(o: VectorsOptions) -> TextVectors:
    entities = _entities(o)
    teacher = None if o.teacher is None else read_teacher(o.teacher, o.width)
    taught = {} if teacher is None else teacher.rows_for(entities)
    if teacher is not None and not taught:
        raise ConfigError(
            f"text.teacher is {o.teacher!r}, which has no vector of {entities.names[0]!r} or any "
            "other of text.words; expected one that names some of them"
        )
    rows = torch.randn(len(entities), o.width)
    for index, row in taught.items():
        rows[index] = row
    tokenizer = EntityTokenizer(entities, o.context_length)
    center = None if teacher is None else teacher.center
    return TextVectors(o, tokenizer, rows, center, _fixed(o, entities, taught))


def _fixed(o: VectorsOptions, entities: Entities, taught: Container[int]) -> list[int]:
    """Return the indices of the names whose vectors are not trained."""
    if isinstance(o.fixed, bool):
        if o.fixed and o.teacher is None:
            raise ConfigError(
                "text.fixed is True and text.teacher is missing; expected the file that has the "
                "vectors, or the names of those that stay as they are"
            )
        return [index for index in range(len(entities)) if o.fixed and index in taught]
    if not isinstance(o.fixed, list) or not all(isinstance(name, str) for name in o.fixed):
        raise ConfigError(f"text.fixed is {o.fixed!r}; expected True, False or a list of names")
    found = []
    for name in dict.fromkeys(o.fixed):
        if name not in entities.names:
            raise ConfigError(f"text.fixed has {name!r}; expected names of text.words")
        index = entities.names.index(name)
        if o.teacher is not None and index not in taught:
            raise ConfigError(
                f"text.fixed has {name!r}, of which {o.teacher} has no vector; expected names that "
                "it has"
            )
        found.append(index)
    return found


def _entities(o: VectorsOptions) -> Entities:
    """Return the words of a table of vectors, whichever way they are given."""
    if isinstance(o.words, str):
        return load_entities(o.words)
    if not isinstance(o.words, Mapping):
        raise ConfigError(
            f"text.words is a {type(o.words).__name__}; expected names, each with a list of what "
            f"else it is called, or one of {list_entities()}, or a YAML file"
        )
    return entities_of(o.words, "text.words")


def _with_words(o: VectorsOptions) -> VectorsOptions:
    """Replace the name of a list of entities by its words, so that a saved folder holds them."""
    return replace(o, words=_entities(o).words)


TEXTS: Registry[Kind] = Registry(
    "text.kind",
    lambda: table(
        {
            "bert": Kind(BertOptions, _bert),
            "clip": Kind(ClipTextOptions, _clip_text),
            "vectors": Kind(VectorsOptions, _vectors, _with_words),
            "words": Kind(WordsOptions, _words),
        }
    ),
    ValueError,
)


def build_text(kind: str = "clip", **options: Any) -> PackedText | TextVectors:
    """Build a text tower of random weights, or with those that its options name."""
    found = TEXTS[kind]
    return found.build(options_of(found.Options, options, "text"))


def complete_text(kind: str = "clip", **options: Any) -> dict[str, Any]:
    """Return kind and options of a text tower, those that are not given too."""
    found = TEXTS[kind]
    return {"kind": kind, **asdict(found.complete(options_of(found.Options, options, "text")))}
