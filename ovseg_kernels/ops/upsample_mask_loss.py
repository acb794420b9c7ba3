"""upsample_mask_loss: sigmoid focal loss and dice of upsampled maps, without upsampling a map.

    x_c(p)  = logits_c upsampled to the labels' size, bilinear, align_corners False;
              q_c(p) = sigmoid(x_c(p))                                                          (1)
    focal_c = mean over the pixels of a_t (1 - q_t)^gamma BCE(x_c, y_c),  y_c(p) = [label(p) = c],
              q_t = q and a_t = alpha where y = 1, else 1 - q and 1 - alpha                     (2)
    dice_c  = 1 - (2 S_qy + 1) / (S_q + S_y + 1),  sums over the pixels                         (3)
    present_c = S_y > 0                                                                         (4)

A label outside [0, C) is a negative for every class, as ZegCLIP's 255 is; only pixels of label
``ignore_index`` do not count, neither in sums nor in the mean. Backward, with t = x for y = 1 and
-x otherwise, v = sigmoid(-t), n the number of pixels that count:

    d focal / d x = -+ a_t v^gamma (gamma (1 - v) softplus(-t) + v) / n,  minus for y = 1
    d dice / d x  = ((2 S_qy + 1) / (S_q + S_y + 1) - 2 y) / (S_q + S_y + 1) q (1 - q)          (5)

go through the transposed upsampling into [B, C, h, w]; x is computed again, and nothing of size
[B, C, H, W] is kept or made.

Shapes   logits [B, C, h, w]; labels [B, H, W] of integers; focal and dice [B, C]; present [B, C]
  bool.
Dtypes   float16 and bfloat16 are computed in float32; focal and dice are float32, or float64 for
  float64.
Cost     B C H W (one exp, one logarithm and about 40 flops) each way. Extra memory: labels as
  int32, sums, and rows for each thread (CPU).
Errors   ValueError for ranks, sizes, devices, alpha outside 0 .. 1, gamma negative or not finite,
  an ignore_index beyond 64 bits; TypeError for dtypes and layouts. NaN logits give NaN losses of
  their class.
Source   Focal loss, arXiv:1708.02002; dice with one added above and below and their use on all
  classes: ZegCLIP, arXiv:2212.03588.
"""

from __future__ import annotations

import torch

from .. import _backends, _check, _transforms
from .. import _library as lib
from ..reference import upsample_mask_loss as reference
from ..reference.patch_text_similarity import accumulation_dtype
from ..results import MaskLosses

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)

lib.define(
    "upsample_mask_loss",
    "upsample_mask_loss(Tensor logits, Tensor codes, float alpha, float gamma) "
    "-> (Tensor focal, Tensor dice, Tensor present, Tensor sums)",
)
lib.define(
    "upsample_mask_loss",
    "upsample_mask_loss_backward(Tensor grad_focal, Tensor grad_dice, Tensor logits, "
    "Tensor codes, Tensor sums, float alpha, float gamma) -> Tensor",
)
lib.fallback("upsample_mask_loss", reference.upsample_mask_loss)
lib.fallback("upsample_mask_loss_backward", reference.backward)


def upsample_mask_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    ignore_index: int | None = None,
) -> MaskLosses:
    """Return focal loss and dice of the maps at the labels' size, equations (2)-(4) of this file.

    Args:
        logits: [B, C, h, w].
        labels: [B, H, W] of integers; those outside [0, C) are negatives for every class.
        alpha: weight of positives in the focal loss, 0 .. 1.
        gamma: exponent of the focal loss, at least 0.
        ignore_index: pixels of this label do not count.

    Returns:
        focal [B, C], dice [B, C], present [B, C].

    Example:
        >>> labels = torch.randint(0, 20, (2, 512, 512))
        >>> focal, dice, present = upsample_mask_loss(torch.randn(2, 20, 32, 32), labels)
        >>> masks = present.sum().clamp(min=1)
        >>> loss = (100 * focal.sum() + (dice * present).sum()) / masks      # ZegCLIP's
    """
    _check.tensor("logits", logits, 4, "[B, C, h, w]")
    if 0 in logits.shape[1:]:
        raise ValueError(
            f"logits has shape {list(logits.shape)}; expected at least one class and one sample"
        )
    _check.tensor("labels", labels, 3, "[B, H, W]", INTEGERS)
    if labels.shape[0] != logits.shape[0] or 0 in labels.shape[1:]:
        raise ValueError(
            f"labels has shape {list(labels.shape)}; expected [{logits.shape[0]}, H, W] with at "
            "least one pixel"
        )
    _check.same("labels", labels, "logits", logits, dtype=False)
    _check.number("alpha", alpha, "0 to 1", least=0, most=1)
    _check.number(
        "gamma", gamma, "a finite number of at least 0", least=0, dtype=accumulation_dtype(logits)
    )
    if ignore_index is not None:
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(
                f"ignore_index is a {type(ignore_index).__name__}; expected an integer or None"
            )
        _check.integer("ignore_index", ignore_index, -(2**63))
    # torch takes a number it compares with modulo what the tensor's dtype holds: 8 bits would take
    # 300 for 44, and -1 for 255.
    labels = labels if labels.dtype == torch.int64 else labels.to(torch.int32)
    codes = labels.to(torch.int32).masked_fill(
        (labels < 0) | (labels >= logits.shape[1]), reference.NEGATIVE
    )
    if (
        ignore_index is not None
        and torch.iinfo(labels.dtype).min <= ignore_index <= torch.iinfo(labels.dtype).max
    ):
        codes = codes.masked_fill(labels == ignore_index, reference.IGNORED)
    logits, exponents = logits.to(accumulation_dtype(logits)), (float(alpha), float(gamma))
    with torch.autocast(lib.autocast_type(logits.device), enabled=False):
        if _backends.use_definition("upsample_mask_loss", logits.device):
            return MaskLosses(*reference.upsample_mask_loss(logits, codes, *exponents)[:3])
        return MaskLosses(*torch.ops.ovseg.upsample_mask_loss(logits, codes, *exponents)[:3])


@lib.fake("upsample_mask_loss")
def _(logits, codes, alpha, gamma):
    shape = logits.shape[:2]
    return (
        logits.new_empty(shape),
        logits.new_empty(shape),
        logits.new_empty(shape, dtype=torch.bool),
        logits.new_empty((4, *shape)),
    )


@lib.fake("upsample_mask_loss_backward")
def _(grad_focal, grad_dice, logits, codes, sums, alpha, gamma):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    logits, codes, ctx.alpha, ctx.gamma = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, codes, output[3])


def _backward(ctx, grad_focal, grad_dice, *_):
    logits, codes, sums = ctx.saved_tensors
    op = torch.ops.ovseg.upsample_mask_loss_backward
    return (
        op(
            grad_focal.contiguous(),
            grad_dice.contiguous(),
            logits,
            codes,
            sums,
            ctx.alpha,
            ctx.gamma,
        ),
        None,
        None,
        None,
    )


_transforms.autograd("upsample_mask_loss", _backward, _setup)
_transforms.no_second_derivative("upsample_mask_loss_backward")
_transforms.vmap("upsample_mask_loss", images=(0, 1), outputs={3: 1})
_transforms.vmap("upsample_mask_loss_backward", images={0: 0, 1: 0, 2: 0, 3: 0, 4: 1})
