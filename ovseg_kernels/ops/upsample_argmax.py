"""upsample_argmax: labels of bilinearly upsampled class maps, without upsampling a map.

    s = max((X + 1/2) w / W - 1/2, 0), x = floor(s), f = s - x
        for every output column; rows likewise                                                  (1)
    z_c(Y, X) = sum of the four samples around, plus bias_c
        weights (1-g)(1-f), (1-g) f, g (1-f), g f                                               (2)
    label = class_label(argmax_c z_c)
        the smaller class of equals; ``background`` if max_c z_c < threshold                    (3)

Between four samples z_c is a mean of class c's four corners, so it lies between their least and
their largest. A class can win in a cell only if

    largest corner of c  >=  max over all classes k of the least corner of k                    (4)

because the class that attains the right side is nowhere in the cell below it, and c nowhere above
the left side. Only the classes that satisfy (4), mostly one to three, are interpolated: the result
is that of ``F.interpolate(mode="bilinear", align_corners=False).argmax(1)``, except where the two
best values tie within rounding.

Shapes   logits [B, C, h, w]; size (H, W), larger or smaller; bias [C]; class_labels [C] int64;
  labels [B, H, W].
Dtypes   float16 and bfloat16 are computed in float32; labels int64, int16 or uint8; values in
  float32 or float64. No gradient.
Cost     8 B C h w comparisons and 3 flops for each candidate and pixel; extra memory: candidate
  lists [w, C] and a few rows for each thread. Nothing of size C H W.
Errors   ValueError for ranks, sizes, devices, NaN logits, labels or a background that the label
  type cannot hold; TypeError for dtypes. Infinite logits are fine, a sample of weight zero does not
  count; both signs in one class of an image, its bias included, are refused as NaN is. On a GPU
  they are found there and raised by a later call or by ``check_errors``; their pixels get the label
  of some class (docs/checks.md).
Source   The pruning rule and its proof are ours.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from .. import _backends, _check, _checking, _transforms
from .. import _library as lib
from ..reference import upsample_argmax as reference
from ..reference.patch_text_similarity import accumulation_dtype
from ..results import LabelMaps
from . import _labels

LABEL_TYPES = reference.LABEL_TYPES

lib.define(
    "upsample_argmax",
    "upsample_argmax(Tensor logits, Tensor? bias, Tensor? class_labels, int height, int width, "
    "float? threshold, int background, int label_type, bool want_value) "
    "-> (Tensor labels, Tensor value)",
)
lib.define(
    "upsample_argmax",
    "upsample_argmax_flagging(Tensor logits, Tensor? bias, Tensor? class_labels, int height, "
    "int width, float? threshold, int background, int label_type, bool want_value, "
    "Tensor(a!) flags, int slot) -> (Tensor labels, Tensor value)",
    on_gpus=True,
)
lib.fallback("upsample_argmax", reference.upsample_argmax)


@overload
def upsample_argmax(
    logits: torch.Tensor,
    size: tuple[int, int],
    *,
    bias: torch.Tensor | None = ...,
    threshold: float | None = ...,
    background: int = ...,
    class_labels: torch.Tensor | None = ...,
    label_type: torch.dtype = ...,
    return_value: Literal[True],
) -> LabelMaps: ...


@overload
def upsample_argmax(
    logits: torch.Tensor,
    size: tuple[int, int],
    *,
    bias: torch.Tensor | None = ...,
    threshold: float | None = ...,
    background: int = ...,
    class_labels: torch.Tensor | None = ...,
    label_type: torch.dtype = ...,
    return_value: Literal[False] = ...,
) -> torch.Tensor: ...


def upsample_argmax(
    logits: torch.Tensor,
    size: tuple[int, int],
    *,
    bias: torch.Tensor | None = None,
    threshold: float | None = None,
    background: int = -1,
    class_labels: torch.Tensor | None = None,
    label_type: torch.dtype = torch.int64,
    return_value: bool = False,
) -> torch.Tensor | LabelMaps:
    """Return the labels of ``logits`` upsampled to ``size``, equation (3) of this file.

    Args:
        logits: [B, C, h, w], scores or probabilities.
        size: (H, W) of the labels.
        bias: [C], added to the classes.
        threshold: where the winning value lies below it, the label is ``background``.
        background: the label below the threshold.
        class_labels: [C] int64, the label of every class: synonyms share one, and the best of them
            counts.
        label_type: torch.int64, torch.int16 or torch.uint8.
        return_value: also return the winning value.

    Returns:
        labels [B, H, W], or LabelMaps: labels and value [B, H, W].

    Example:
        >>> upsample_argmax(torch.randn(1, 21, 14, 14), (224, 224)).shape
        torch.Size([1, 224, 224])
    """
    _check.tensor("logits", logits, 4, "[B, C, h, w]")
    if 0 in logits.shape[1:]:
        raise ValueError(
            f"logits has shape {list(logits.shape)}; expected at least one class and one sample"
        )
    _labels.label_rule(
        "logits",
        logits,
        logits.shape[1],
        size,
        bias,
        threshold,
        background,
        class_labels,
        label_type,
    )
    _check.flag("return_value", return_value)
    _transforms.no_derivative("upsample_argmax", logits, bias)
    _numbers(logits, bias)
    flags = _checking.flags_of(logits)
    dtype = accumulation_dtype(logits)
    bias = None if bias is None else bias.detach().to(dtype)
    logits = logits.detach().to(dtype)
    options = (
        size[0],
        size[1],
        None if threshold is None else float(threshold),
        background,
        LABEL_TYPES.index(label_type),
        return_value,
    )
    arguments = logits, bias, class_labels, *options
    definition = _backends.use_definition("upsample_argmax", logits.device)
    found = _labels.answer(
        "upsample_argmax", definition, logits, arguments, flags, _checking.UPSAMPLE
    )
    return LabelMaps(*found) if return_value else found[0]


def _refused(logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return, for every class of an image, whether it holds NaN, or infinities of both signs.

    One of the infinities may be the bias; together they would make a NaN.
    """
    least, most = logits.amin((2, 3)), logits.amax((2, 3))
    return (least + most if bias is None else (least + bias) + (most + bias)).isnan()


def _flagging(*arguments):
    *given, flags, slot = arguments
    _checking.flag(flags, slot, _refused(*given[:2]))
    return reference.upsample_argmax(*given)


lib.fallback("upsample_argmax_flagging", _flagging)


def _numbers(logits: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Check that no class of an image is refused, where numbers are looked at in the call."""
    if not logits.numel() or not _checking.looks_at_values(logits):
        return
    bad = _refused(logits.detach(), None if bias is None else bias.detach())
    if any(bool(each.any()) for each in _checking.looked_at(bad)):
        given = (
            x for name in (logits, bias) if name is not None for x in _checking.looked_at(name)
        )
        if any(bool(x.isnan().any()) for x in given):
            raise ValueError("logits or bias holds NaN; expected numbers")
        raise ValueError(
            "logits and bias hold infinities of both signs in one class; expected one sign in a "
            "class of an image"
        )


@lib.fake("upsample_argmax")
@lib.fake("upsample_argmax_flagging")
def _(logits, bias, class_labels, height, width, threshold, background, label_type, want_value, *_):
    B = logits.shape[0]
    labels = logits.new_empty((B, height, width), dtype=LABEL_TYPES[label_type])
    return labels, logits.new_empty((B if want_value else 0, height, width))


for _schema in ("upsample_argmax", "upsample_argmax_flagging"):
    _transforms.no_second_derivative(_schema)
    _transforms.vmap(_schema, images=(0,))
