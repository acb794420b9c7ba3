"""window_argmax: labels of a picture seen through overlapping windows, without a map at full size.

    p_kc(v, u) = upsampled logits of window k, class c, at a pixel of its crop                  (1)
               or table_k[g, c] with g = argmax of the window's upsampled group maps
                 at that pixel                                                                  (2)
    m_c(v, u)  = sum over the windows k that cover (v, u) of p_kc(v - y_k, u - x_k),
                 divided by their number                                                        (3)
    z_c(Y, X)  = m_c resized from the canvas to the labels' size, bilinear, align_corners False,
                 plus bias_c                                                                    (4)
    label      = class_label(argmax_c z_c); the smaller class of equals;
                 ``background`` if max_c z_c < threshold                                        (5)

``activation`` (sigmoid, or softmax over the classes) acts on p ("window"), on m ("merged") or on z
before the bias ("output").

Every z_c is a mean of samples under monotone maps: over a tile of outputs it lies between what (3)
makes of the least and of the largest of the samples that reach the tile. A class whose upper bound
lies below the largest lower bound is nowhere the winner; only the others are computed. The result
is that of the five steps on whole maps, except where the two best values tie within rounding.

Shapes   logits [n, C, h, w], the windows of one picture; origins [n, 2] int64, row and column of
  each crop on the canvas; crop (hc, wc), canvas (Hc, Wc), size (H, W). With tables [n, G, C]:
  logits [n, G, h, w] of G groups. labels [H, W].
Dtypes   float16 and bfloat16 are computed in float32; labels int64, int16 or uint8; values in
  float32 or float64. No gradient.
Cost     about 10 C comparisons for each tile of 16 x 16 outputs and window, and 20 flops for each
  candidate and pixel; softmax adds two passes over the classes that are not negligible. Extra
  memory: a few tiles for each thread; with tables n hc wc int16; on a GPU softmax of the windows
  keeps two numbers for each pixel of a crop. Nothing of size C H W.
Errors   ValueError for ranks, sizes, devices, windows that leave the canvas or do not cover it, NaN
  or +infinity (softmax: any infinity), labels that the label type cannot hold; TypeError for
  dtypes. On a GPU numbers are found there and raised by a later call or by ``check_errors``,
  origins that are there already are not looked at (docs/checks.md), and no call is while it is
  compiled: pixels that such numbers or no window reach get the label of some class.
Source   (3) and (4): the sliding window of mmsegmentation; sigmoid in (1): ZegCLIP,
  arXiv:2212.03588; (2): GroupViT, arXiv:2202.11094, and SegCLIP, arXiv:2211.14813. The bounds are
  ours.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Literal, TypeAlias, overload

import torch

from .. import _backends, _check, _checking, _transforms
from .. import _library as lib
from ..reference import window_argmax as reference
from ..reference.patch_text_similarity import accumulation_dtype
from ..reference.upsample_argmax import LABEL_TYPES
from ..results import LabelMaps
from . import _labels
from .upsample_argmax import check_numbers

ACTIVATIONS, STAGES = reference.ACTIVATIONS, reference.STAGES
Origins: TypeAlias = torch.Tensor | Sequence[tuple[int, int]]

lib.define(
    "window_argmax",
    "window_argmax(Tensor values, Tensor? index, Tensor origins, Tensor? bias, "
    "Tensor? class_labels, int crop_height, int crop_width, int canvas_height, int canvas_width, "
    "int height, int width, int activation, int stage, float? threshold, int background, "
    "int label_type, bool want_value) -> (Tensor labels, Tensor value)",
)
lib.define(
    "window_argmax",
    "window_argmax_flagging(Tensor values, Tensor? index, Tensor origins, Tensor? bias, "
    "Tensor? class_labels, int crop_height, int crop_width, int canvas_height, int canvas_width, "
    "int height, int width, int activation, int stage, float? threshold, int background, "
    "int label_type, bool want_value, Tensor(a!) flags, int slot) "
    "-> (Tensor labels, Tensor value)",
    on_gpus=True,
)
lib.fallback("window_argmax", reference.window_argmax)


@overload
def window_argmax(
    logits: torch.Tensor,
    origins: Origins,
    crop: tuple[int, int],
    canvas: tuple[int, int],
    size: tuple[int, int],
    *,
    tables: torch.Tensor | None = ...,
    activation: str | None = ...,
    stage: str = ...,
    bias: torch.Tensor | None = ...,
    threshold: float | None = ...,
    background: int = ...,
    class_labels: torch.Tensor | None = ...,
    label_type: torch.dtype = ...,
    return_value: Literal[True],
) -> LabelMaps: ...


@overload
def window_argmax(
    logits: torch.Tensor,
    origins: Origins,
    crop: tuple[int, int],
    canvas: tuple[int, int],
    size: tuple[int, int],
    *,
    tables: torch.Tensor | None = ...,
    activation: str | None = ...,
    stage: str = ...,
    bias: torch.Tensor | None = ...,
    threshold: float | None = ...,
    background: int = ...,
    class_labels: torch.Tensor | None = ...,
    label_type: torch.dtype = ...,
    return_value: Literal[False] = ...,
) -> torch.Tensor: ...


def window_argmax(
    logits: torch.Tensor,
    origins: Origins,
    crop: tuple[int, int],
    canvas: tuple[int, int],
    size: tuple[int, int],
    *,
    tables: torch.Tensor | None = None,
    activation: str | None = None,
    stage: str = "window",
    bias: torch.Tensor | None = None,
    threshold: float | None = None,
    background: int = -1,
    class_labels: torch.Tensor | None = None,
    label_type: torch.dtype = torch.int64,
    return_value: bool = False,
) -> torch.Tensor | LabelMaps:
    """Return the labels of one picture from the logits of its windows, equation (5) of this file.

    Args:
        logits: [n, C, h, w], or [n, G, h, w] group maps with ``tables``.
        origins: [n, 2] int64 or a list of pairs, the upper left corner (row, column) of each window
            on the canvas. Best on the CPU, be the logits on a GPU: there they are checked, and
            reach the GPU without waiting.
        crop: (hc, wc), size of every window in pixels of the canvas.
        canvas: (Hc, Wc), size of the picture as it was cut into windows. The windows cover it.
        size: (H, W) of the labels.
        tables: [n, G, C], what each class scores in each group of each window.
        activation: None, "sigmoid" or "softmax".
        stage: where it acts: "window", "merged" or "output".
        bias: as in ``upsample_argmax``; it comes last.
        threshold: as in ``upsample_argmax``.
        background: as in ``upsample_argmax``.
        class_labels: as in ``upsample_argmax``.
        label_type: as in ``upsample_argmax``.
        return_value: as in ``upsample_argmax``.

    Returns:
        labels [H, W], or LabelMaps: labels and value [H, W].

    Example:
        >>> windows, origins = torch.randn(2, 20, 32, 32), torch.tensor([[0, 0], [0, 171]])
        >>> sizes = (512, 512), (512, 683), (480, 640)  # crop, canvas, labels
        >>> window_argmax(windows, origins, *sizes, activation="sigmoid").shape
        torch.Size([480, 640])
    """
    _check.tensor("logits", logits, 4, "[n, C, h, w]")
    if 0 in logits.shape:
        raise ValueError(
            f"logits has shape {list(logits.shape)}; expected at least one window, one class and "
            "one sample"
        )
    origins = origins if isinstance(origins, torch.Tensor) else _tensor_of(origins)
    _check.tensor("origins", origins, 2, "[n, 2]", (torch.int64,))
    _check.shape("origins", origins, (logits.shape[0], 2), "row and column of each window")
    _labels.pair("crop", crop, "(hc, wc)")
    _labels.pair("canvas", canvas, "(Hc, Wc)")
    if activation is not None:
        _check.one_of("activation", activation, ACTIVATIONS[1:])
    _check.one_of("stage", stage, STAGES)
    values = logits if tables is None else _tables(tables, logits)
    classes = values.shape[1 if tables is None else 2]
    _labels.label_rule(
        "logits", logits, classes, size, bias, threshold, background, class_labels, label_type
    )
    _check.flag("return_value", return_value)
    _transforms.no_derivative("window_argmax", logits, tables, bias)
    if crop[0] > canvas[0] or crop[1] > canvas[1]:
        raise ValueError(
            f"crop is {tuple(crop)} and canvas is {tuple(canvas)}; expected a crop that fits into "
            "the canvas"
        )
    for each in _checking.looked_at(origins):
        _covered(each, crop, canvas)
    origins = _beside(origins, logits)
    softmax = activation == "softmax"
    _numbers("tables" if tables is not None else "logits", values, bias, softmax=softmax)
    flags = _checking.flags_of(values)
    dtype = accumulation_dtype(values)
    bias = None if bias is None else bias.detach().to(dtype)
    definition = _backends.use_definition("window_argmax", values.device)
    index = None if tables is None else _groups(logits, crop, definition, flags)
    limit = None if threshold is None else float(threshold)
    options = (
        *crop,
        *canvas,
        *size,
        ACTIVATIONS.index(activation),
        STAGES.index(stage),
        limit,
        background,
        LABEL_TYPES.index(label_type),
    )
    arguments = (
        values.detach().to(dtype),
        index,
        origins,
        bias,
        class_labels,
        *options,
        return_value,
    )
    slot = _checking.WINDOW_SOFTMAX if softmax else _checking.WINDOW
    found = _labels.answer("window_argmax", definition, values, arguments, flags, slot)
    if flags is not None:
        flags.send()
    return LabelMaps(*found) if return_value else found[0]


def _groups(
    logits: torch.Tensor,
    crop: tuple[int, int],
    definition: bool,
    flags: _checking._Flags | None,
) -> torch.Tensor:
    """Return the group of every pixel of the crops, [n, hc, wc] int16: ``upsample_argmax``."""
    check_numbers(logits, None)
    maps = logits.detach().to(accumulation_dtype(logits))
    arguments = (maps, None, None, *crop, None, -1, LABEL_TYPES.index(torch.int16), False)
    return _labels.answer(
        "upsample_argmax", definition, maps, arguments, flags, _checking.UPSAMPLE
    )[0]


def _tables(tables: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    _check.tensor("tables", tables, 3, "[n, G, C]")
    _check.shape(
        "tables",
        tables,
        (*logits.shape[:2], tables.shape[2]),
        "a row of class scores for each group of each window",
    )
    _check.same("tables", tables, "logits", logits, dtype=False)
    if logits.shape[1] > 2**15:
        raise ValueError(
            f"logits has {logits.shape[1]} groups; expected at most {2**15} with tables: a "
            "pixel's group is kept in 16 bits"
        )
    if tables.shape[2] == 0:
        raise ValueError(f"tables has shape {list(tables.shape)}; expected at least one class")
    return tables


def _tensor_of(origins: Sequence[tuple[int, int]]) -> torch.Tensor:
    try:
        return torch.tensor(origins)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"origins is a {type(origins).__name__}; expected a tensor [n, 2] or a list of pairs "
            "of integers"
        ) from error


def _beside(origins: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return ``origins`` on the device of the logits.

    From pinned memory: a copy from any other waits for the GPU.
    """
    if origins.device == logits.device:
        return origins
    if origins.device.type != "cpu":
        raise ValueError(
            f"origins is on {origins.device} and logits is on {logits.device}; expected the CPU "
            "or one device"
        )
    if logits.device.type == "cuda" and not torch.compiler.is_compiling():
        if _checking.capturing():
            # A replay would read host memory that is long something else's.
            raise ValueError(
                "origins is on the CPU while a CUDA graph is captured; expected it on "
                f"{logits.device}"
            )
        origins = origins.pin_memory()
    return origins.to(logits.device, non_blocking=True)


def _covered(origins: torch.Tensor, crop: tuple[int, int], canvas: tuple[int, int]) -> None:
    """Check that windows lie inside of the canvas, and that no pixel is without one."""
    corners = [(y, x) for y, x in origins.tolist()]
    for y, x in corners:
        if not (0 <= y <= canvas[0] - crop[0] and 0 <= x <= canvas[1] - crop[1]):
            raise ValueError(
                f"origins holds ({y}, {x}); with a crop of {tuple(crop)} expected rows 0 to "
                f"{canvas[0] - crop[0]} and columns 0 to {canvas[1] - crop[1]}, inside the canvas "
                f"{tuple(canvas)}"
            )
    hole = _first_hole(sorted(corners), crop, canvas)
    if hole is not None:
        raise ValueError(
            f"origins leaves row {hole[0]}, column {hole[1]} of the canvas without a window; "
            "expected every pixel covered"
        )


def _first_hole(
    corners: list[tuple[int, int]], crop: tuple[int, int], canvas: tuple[int, int]
) -> tuple[int, int] | None:
    """Return row and column of the first pixel, row by row, that no window covers, or None.

    A sweep down the rows, which are all alike between two borders of windows. Windows are equally
    wide: those of a row cover it where none begins more than a width right of the one before.
    ``corners`` are the upper left ones, sorted.
    """
    height, width = crop
    # Columns of the windows of the present rows, between two that end and begin outside of the
    # canvas.
    columns = [-width, canvas[1]]
    gaps = int(canvas[1] > 0)
    begun = ended = 0
    for row in sorted(
        {0, *(y for y, _ in corners), *(y + height for y, _ in corners)} - {canvas[0]}
    ):
        while begun < len(corners) and corners[begun][0] == row:
            gaps += _changed(columns, corners[begun][1], width)
            bisect.insort(columns, corners[begun][1])
            begun += 1
        while ended < begun and corners[ended][0] + height == row:
            columns.pop(bisect.bisect_left(columns, corners[ended][1]))
            gaps -= _changed(columns, corners[ended][1], width)
            ended += 1
        if gaps:
            return row, next(a + width for a, b in itertools.pairwise(columns) if b - a > width)
    return None


def _changed(columns: list[int], column: int, width: int) -> int:
    """Return by how many the gaps change when a window is put at ``column``."""
    place = bisect.bisect(columns, column)
    left, right = columns[place - 1], columns[place]
    return (column - left > width) + (right - column > width) - (right - left > width)


def _numbers(name: str, x: torch.Tensor, bias: torch.Tensor | None, *, softmax: bool) -> None:
    """Check for NaN and +infinity; with softmax for any infinity in ``x``."""
    for each in _checking.looked_at(x) if softmax else []:
        if not bool(each.isfinite().all()):
            raise ValueError(
                f"{name} holds NaN or an infinity; expected finite numbers for softmax"
            )
    for what, numbers in ((name, x), ("bias", bias)):
        for each in [] if numbers is None else _checking.looked_at(numbers):
            if not bool((each < torch.inf).all()):  # false for NaN
                raise ValueError(
                    f"{what} holds NaN or +infinity; expected numbers, or -infinity where a class "
                    "is switched off"
                )


def _flagging(*arguments):
    *given, flags, slot = arguments
    values = given[0]
    bias = given[3]
    activation = given[11]
    most = values.amax()  # NaN, if there is one
    most = most if bias is None else torch.maximum(most, bias.amax())
    good = most < torch.inf
    good = good & (values.amin() > -torch.inf) if ACTIVATIONS[activation] == "softmax" else good
    _checking.flag(flags, slot, ~good)
    return reference.window_argmax(*given)


lib.fallback("window_argmax_flagging", _flagging)


@lib.fake("window_argmax")
@lib.fake("window_argmax_flagging")
def _(
    values,
    index,
    origins,
    bias,
    class_labels,
    crop_height,
    crop_width,
    canvas_height,
    canvas_width,
    height,
    width,
    activation,
    stage,
    threshold,
    background,
    label_type,
    want_value,
    *_,
):
    return values.new_empty((height, width), dtype=LABEL_TYPES[label_type]), values.new_empty(
        (height if want_value else 0, width)
    )


for _schema in ("window_argmax", "window_argmax_flagging"):
    _transforms.no_second_derivative(_schema)
    _transforms.vmap(_schema)
