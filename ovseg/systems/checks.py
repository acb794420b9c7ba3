"""Checks of inputs before a model computes, and of its scores after.

Before: the arguments of its methods, and whether it reads labels as they were meant, for a
tokenizer drops signs that it does not know and what is beyond its context. After: which tensor of
the model is no number, once its results are none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..dense import FLOATS, check_dense
from ..errors import InputError, NotFinite
from ..nn.backbone import Tokenizer

if TYPE_CHECKING:
    from .base import OVSegModel

_SHOWN = 3  # labels in a message


def check_name(argument: str, value: Any) -> None:
    """Check that ``value`` may be a name or a path of a model or of weights."""
    if not isinstance(value, str | Path):
        raise InputError(f"{argument} is a {type(value).__name__}; expected a name or a path")


def check_device(device: Any) -> torch.device:
    """Return the device, if it is one that ``torch.device`` takes.

    Raises:
        InputError: for anything else, a tensor among it, which ``Module.to`` would take for its
            dtype.
    """
    if isinstance(device, str | int | torch.device) and not isinstance(device, bool):
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise InputError(f"device is {device!r}; expected cpu, cuda, cuda:1, ...") from error
    raise InputError(f"device is a {type(device).__name__}; expected a device such as 'cpu'")


def check_images(images: Any, model: OVSegModel) -> None:
    """Check that ``images`` are what ``model.normalize`` gives."""
    check_dense("images", images, "[B, 3, H, W]", meta=True)
    if images.dim() != 4 or images.shape[1] != 3:
        raise InputError(f"images has shape {list(images.shape)}; expected [B, 3, H, W]")
    if images.dtype not in FLOATS:
        raise InputError(f"images has dtype {images.dtype}; expected floats from model.normalize")
    _one_device("images", images, next(model.parameters()))


def check_pixels(pixels: Any) -> None:
    """Check that ``pixels`` are RGB [B, 3, H, W], or without B; uint8 or floats."""
    check_dense("pixels", pixels, "[B, 3, H, W]", meta=True)
    if pixels.dim() < 3 or pixels.shape[-3] != 3:
        raise InputError(f"pixels has shape {list(pixels.shape)}; expected [B, 3, H, W]")
    if pixels.dtype not in (*FLOATS, torch.uint8):
        raise InputError(f"pixels has dtype {pixels.dtype}; expected uint8 or floats in 0..1")


def check_ids(token_ids: Any, model: OVSegModel) -> None:
    """Check that ``token_ids`` are of a tokenizer, [T, L]."""
    meta = next(model.parameters()).device.type == "meta"
    check_dense("token_ids", token_ids, "[T, L], from model.tokenizer", meta=meta)
    if token_ids.dim() != 2 or token_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"token_ids is {token_ids.dtype} of shape {list(token_ids.shape)}; expected int64 "
            "[T, L], from model.tokenizer"
        )


def check_compared(images: Any, texts: Any, features: Any, *, encoded: bool = False) -> None:
    """Check images and the texts [T, E] that they are compared with.

    Args:
        images: a tensor, or what a model has made of it.
        texts: of ``encode_labels``.
        features: the type of what a model makes of images.
        encoded: whether only that is taken, no tensor.
    """
    if encoded and not isinstance(images, features):
        raise InputError(
            f"features is a {type(images).__name__}; expected what model.encode_image gives"
        )
    if not isinstance(images, torch.Tensor | features):
        raise InputError(
            f"images is a {type(images).__name__}; expected a tensor [B, 3, H, W] or what "
            "model.encode_image gives"
        )
    check_dense("texts", texts, "[T, E], from model.encode_labels", meta=True)
    if texts.dim() != 2 or texts.dtype not in FLOATS:
        raise InputError(
            f"texts is {texts.dtype} of shape {list(texts.shape)}; expected floats [T, E], from "
            "model.encode_labels"
        )
    if not isinstance(images, torch.Tensor):
        _one_device("texts", texts, images.tokens)


def _one_device(name: str, x: torch.Tensor, other: torch.Tensor) -> None:
    if x.device.type != other.device.type:
        raise InputError(
            f"{name} is on {x.device} and what it meets on {other.device}; expected one device"
        )


def check_reading(
    tokenizer: Tokenizer, labels: Sequence[str], owners: Sequence[int], templates: Sequence[str]
) -> None:
    """Look for labels that a model reads otherwise than they were meant.

    It warns of those that are cut in some template, and of those that are all alike to a model
    because it knows few words.

    Args:
        tokenizer: with ``cut(texts)`` it says which texts are longer than its context, with
            ``unknown(text)`` which words it does not know; one without is not asked.
        labels: texts.
        owners: the class of each; those of one class may read the same.
        templates: format strings.

    Raises:
        InputError: for a label that reads as nothing, and for two of different classes that read
            the same in every template, unless for words that the model does not know:
            ``check_words`` refuses those.
    """
    ids = tokenizer([*labels, ""])
    for label, row in zip(labels, ids[:-1], strict=True):
        if torch.equal(row, ids[-1]):
            raise InputError(
                f"label {_short(label)} reads as nothing: the model's tokenizer knows none of its "
                "signs; expected others, or another model"
            )
    context = ids.shape[1]
    cut = _cut(tokenizer, labels, templates, context)
    unknown: Callable[[str], list[str]] = getattr(tokenizer, "unknown", lambda label: [])
    read: dict[bytes, int] = {}
    alike: list[str] = []
    for i, label in enumerate(labels):
        everywhere = cut[i] == len(templates)
        rows = ids[i]
        # Only a label that is cut everywhere can end up as another one that differs alone.
        if everywhere:
            rows = tokenizer([template.replace("{}", label) for template in templates])
        first = read.setdefault(rows.numpy().tobytes(), i)
        if owners[first] == owners[i]:
            continue
        if everywhere or not unknown(label) or not unknown(labels[first]):
            raise InputError(
                f"labels {_short(labels[first])} and {_short(label)} read the same: its tokenizer "
                f"makes the same tokens of both and reads {context} of them; expected labels that "
                "differ to it, or another model"
            )
        alike += [label] if alike else [labels[first], label]
    _warn(labels, cut, alike, len(templates), context)


def _warn(
    labels: Sequence[str], cut: Sequence[int], alike: Sequence[str], templates: int, context: int
) -> None:
    """Warn of labels that are cut, in so many templates each, and of those that are alike."""
    named = [
        f"{_short(label)} (in {n} of {templates} templates)"
        for label, n in zip(labels, cut, strict=True)
        if n
    ]
    if named:
        warnings.warn(
            f"labels are cut, as the model reads {context} tokens: {_listed(named)}", stacklevel=3
        )
    if alike:
        warnings.warn(
            "labels read the same, as the model knows none of their words: "
            f"{_listed([_short(label) for label in alike])}",
            stacklevel=3,
        )


def _cut(
    tokenizer: Tokenizer, labels: Sequence[str], templates: Sequence[str], context: int
) -> list[int]:
    """Count in how many templates each label is cut.

    A token is a byte at least: short texts need not be looked at.
    """
    found = [0] * len(labels)
    ask = getattr(tokenizer, "cut", None)
    texts = [(i, one.replace("{}", label)) for i, label in enumerate(labels) for one in templates]
    long = [(i, text) for i, text in texts if len(text.encode()) > context - 2]
    if ask is None or not long:
        return found
    for (i, _), is_cut in zip(long, ask([text for _, text in long]), strict=True):
        found[i] += is_cut
    return found


def _short(label: str) -> str:
    return repr(label if len(label) < 80 else f"{label[:40]} ... {label[-30:]}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def not_finite(model: nn.Module) -> NotFinite | FloatingPointError:
    """Return the error for scores that hold NaN.

    It names the first tensor of the model that holds NaN or an infinity; where none does, the
    numbers grew too large for its dtype.
    """
    about = getattr(model, "name", "") or type(model).__name__
    for name, x in _weights(model):
        bad = int((~x.isfinite()).sum())
        if bad:
            return NotFinite(
                f"the scores of {about} hold NaN: its tensor {name} holds NaN or an infinity in "
                f"{bad} of {x.numel()} places; expected finite weights, as of a whole checkpoint"
            )
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "its dtype")
    return FloatingPointError(
        f"the scores of {about} hold NaN, and its weights are finite: numbers on the way exceed "
        f"{dtype}; expected a model in float32, or in bfloat16 in place of float16"
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and lasting buffers by name.

    Masks, which hold infinities, are made again and not saved.
    """
    for part in (model, getattr(model, "proxy", None)):
        for name, x in part.state_dict().items() if part is not None else ():
            if x.is_floating_point():
                yield f"{'' if part is model else 'proxy.'}{name.removeprefix('_orig_mod.')}", x
