"""contrastive_loss: InfoNCE or sigmoid loss between images and texts, without the [B, T] matrix.

    s_ij = image_i . text_j                     unit vectors, with normalize                    (1)
    z_ij = lambda s_ij + beta                   beta: logit_bias, sigmoid only                  (2)
    softmax:  L = (mean_i (lse_j z_ij - mean_{j in P_i} z_ij)
                   + mean_j (lse_i z_ij - mean_{i in P_j} z_ij)) / 2                            (3)
    sigmoid:  L = sum_ij softplus(-y_ij z_ij) / B    y_ij = 1 for a positive pair, else -1      (4)

P_i are the texts with the image's id; without ids, the one text at the image's own position. Means
run over rows and columns that have a positive; w_i, w_j are 1 / (2 their number), and 1 / B for the
sigmoid.

    softmax:  dL/dz_ij = w_i (exp(z_ij - lse_i) - 1_ij / |P_i|)
                         + w_j (exp(z_ij - lse_j) - 1_ij / |P_j|)                               (5)
    sigmoid:  dL/dz_ij = w_i (sigmoid(z_ij) - 1_ij)                                             (6)
    d image = lambda dz text    d text = lambda dz^T image
    d lambda = sum dz s         d beta = sum dz                                                 (7)

Shapes   image [B, D]; text [T, D]; logit_scale, logit_bias one element; image_ids [B], text_ids [T]
  int64; scalar out.
Dtypes   float16 and bfloat16 are normalised and computed in float32, on CUDA with tf32 products;
  the loss is float32, or float64 for float64. Autocast lowers nothing.
Ranks    with ``group``, image, text and ids are this rank's; texts are gathered with their
  gradient, 3 T numbers reduced. Every rank returns the loss of the whole batch; with DDP's mean
  over ranks, parameters get exactly the gradient of one process. Uneven batches are allowed.
Cost     2 B T D flops forward, 6 B T D backward (the logits again, and two products). Never stored:
  anything of size B T; on the CPU a block of at most 2 M logits and packed copies of the texts, on
  a GPU a chunk of 64 MiB. Kept: features and 3 (B + T) numbers.
Errors   ValueError for ranks, sizes, devices, one id vector without the other, B != T without ids,
  a scale or bias that is not finite (looked at on the CPU only), a bias with softmax; TypeError for
  dtypes. Without any positive the softmax loss is 0.
Source   Radford et al., CLIP, 2021; Khosla et al., Supervised Contrastive Learning, 2020, L_out;
  Zhai et al., SigLIP, ICCV 2023.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .. import _backends, _check, _distributed, _transforms
from .. import _library as lib
from .._unit import unit
from ..reference import contrastive_loss as reference
from ..reference.patch_text_similarity import accumulation_dtype

_INPUTS = (
    "Tensor image, Tensor text, Tensor logit_scale, Tensor logit_bias, "
    "Tensor? image_ids, Tensor? text_ids"
)
_SAVED = (
    "Tensor rows, Tensor columns, Tensor row_weight, Tensor column_weight, "
    "int offset, bool sigmoid, bool tf32"
)
lib.define(
    "contrastive_loss",
    f"contrastive_stats({_INPUTS}, int offset, bool sigmoid, bool tf32) -> (Tensor, Tensor)",
)
lib.define("contrastive_loss", f"contrastive_loss({_INPUTS}, {_SAVED}) -> Tensor")
lib.define(
    "contrastive_loss",
    f"contrastive_loss_backward(Tensor grad, {_INPUTS}, {_SAVED}, "
    "bool need_image, bool need_text) -> (Tensor, Tensor, Tensor, Tensor)",
)
lib.fallback("contrastive_stats", reference.stats)
lib.fallback("contrastive_loss_backward", reference.backward)
KINDS = ("softmax", "sigmoid")


def contrastive_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: float | torch.Tensor,
    *,
    image_ids: torch.Tensor | None = None,
    text_ids: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    normalize: bool = True,
    kind: str = "softmax",
    logit_bias: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """Return the loss of matched ``image`` and ``text`` features, equation (3) or (4) of this file.

    Args:
        image: [B, D].
        text: [T, D].
        logit_scale: multiplies the similarities; number or tensor of one element, which gets a
            gradient.
        image_ids: [B] int64, given with ``text_ids``; equal ids are positives. Neither: B = T and
            the diagonal. Ids that match nowhere leave ``softmax`` without a positive: 0, with a
            gradient of 0. Telling would wait for a GPU; ``sigmoid`` has its negatives.
        text_ids: [T] int64, given with ``image_ids``.
        group: the process group whose ranks hold the rest of the batch; None for one process.
        normalize: False if the features have unit length already.
        kind: ``softmax`` (CLIP) or ``sigmoid`` (SigLIP).
        logit_bias: added to the logits, sigmoid only; number or tensor of one element, which gets a
            gradient.

    Returns:
        The loss, a scalar; with ``group`` that of the whole batch on every rank.
    """
    return compute(
        image, text, logit_scale, image_ids, text_ids, group, normalize, kind, logit_bias
    )


def compute(
    image, text, logit_scale, image_ids, text_ids, group, normalize, kind, logit_bias, value="batch"
):
    """Return ``contrastive_loss``, or this rank's value of it.

    With ``value="rank"`` the number returned is the mean over this rank's rows and columns, as
    open_clip's local loss is; the gradient is the same.
    """
    _check.tensor("image", image, 2, "[B, D]")
    _check.tensor("text", text, 2, "[T, D]")
    _check.shape("text", text, (text.shape[0], image.shape[1]), "the D of image")
    _check.same("text", text, "image", image, dtype=False)
    _check.one_of("kind", kind, KINDS)
    _check.flag("normalize", normalize)
    _check.group(group)
    low = image.dtype.itemsize == 2 or text.dtype.itemsize == 2
    dtype = accumulation_dtype(torch.empty((), dtype=torch.promote_types(image.dtype, text.dtype)))
    image, text = image.to(dtype), text.to(dtype)
    scale = _check.scalar("logit_scale", logit_scale, image, dtype)
    bias = _check.scalar("logit_bias", logit_bias, image, dtype)
    if kind == "softmax" and (isinstance(logit_bias, torch.Tensor) or logit_bias != 0):
        raise ValueError(
            "logit_bias was given with kind='softmax', which it cannot change; expected "
            "kind='sigmoid'"
        )
    _check.pair_ids(image_ids, image.shape[0], text_ids, text.shape[0], "image", image)
    sizes: list[tuple[int, ...]] = [(image.shape[0], text.shape[0])]
    rank = 0
    if group is not None:
        # What must agree goes along, so that all ranks raise, and none waits for one that did.
        mine = (*sizes[0], image.shape[1], int(image_ids is not None), dtype.itemsize)
        found, rank = _distributed.sizes_of_ranks(mine, group, image.device), dist.get_rank(group)
        if len({x[2:] for x in found}) > 1:
            raise ValueError(
                f"(B, T, D, ids given, bytes of a number) of the ranks are {found}; expected the "
                "last three to agree"
            )
        sizes = [x[:2] for x in found]
    if image_ids is None and any(b != t for b, t in sizes):
        raise ValueError(
            f"image and text have {', '.join(f'{b} and {t}' for b, t in sizes)} rows; "
            "without ids expected as many texts as images: pass image_ids and text_ids"
        )
    with torch.autocast(lib.autocast_type(image.device), enabled=False):
        if group is None and _backends.use_definition("contrastive_loss", image.device):
            return reference.contrastive_loss(
                image, text, scale, bias, image_ids, text_ids, normalize, kind
            )
        if normalize:
            image, text = unit(image), unit(text)
        offset, total = sum(b for b, _ in sizes[:rank]), sum(b for b, _ in sizes)
        if group is not None:
            texts = [t for _, t in sizes]
            text = _distributed.gather_rows(text, texts, group)
            text_ids = (
                None if text_ids is None else _distributed.gather_rows(text_ids, texts, group)
            )
        options = (
            offset,
            kind == "sigmoid",
            dtype == torch.float32 and (low or _backends.allow_tf32(image)),
        )
        inputs = (scale, bias, image_ids, text_ids)
        plain = (x.detach() for x in (image, text, scale, bias))
        rows, columns = torch.ops.ovseg.contrastive_stats(*plain, image_ids, text_ids, *options)
        if kind == "sigmoid":
            weights = torch.full_like(rows[0], 1 / max(1, total)), torch.zeros_like(columns[0])
        else:
            columns = columns if group is None else _distributed.merge_columns(columns, group)
            weights = _distributed.weights(rows, group), _distributed.weights(columns, None)
        loss = torch.ops.ovseg.contrastive_loss(
            image, text, *inputs, rows, columns, *weights, *options
        )
        if group is None:
            return loss
        if value == "batch":
            return _distributed.of_the_whole_batch(
                loss, _distributed.terms(rows, weights[0]), group
            )
        share, first = len(sizes) * loss, sum(t for _, t in sizes[:rank])
        if kind == "sigmoid":
            mine = rows[0].sum() / max(1, rows.shape[1])
        else:
            parts = rows, columns[:, first : first + sizes[rank][1]]
            mine = sum(_distributed.terms(part, _distributed.weights(part, None)) for part in parts)
        return share + (mine - share).detach()


def rows_only(image, text, logit_scale, offset):
    """Return the mean over the images of (3)'s first half.

    The positive of row i is text i + ``offset``: unit features, one process.
    """
    dtype = accumulation_dtype(image)
    tf32 = dtype == torch.float32 and (image.dtype.itemsize == 2 or _backends.allow_tf32(image))
    image, text = image.to(dtype), text.to(dtype)
    weight = torch.full_like(image[:, 0], 1 / max(1, len(image))).detach()
    return one_sided(
        image,
        text,
        _check.scalar("logit_scale", logit_scale, image, dtype),
        None,
        None,
        weight,
        offset,
        tf32,
    )


def one_sided(image, text, scale, image_ids, text_ids, row_weight, offset, tf32):
    """Return sum_i row_weight_i (lse_j z_ij - mean_{j in P_i} z_ij) of unit features.

    The operators built on these kernels share it.
    """
    inputs = (scale, torch.zeros_like(scale), image_ids, text_ids)
    options = (offset, False, tf32)
    plain = (x.detach() for x in (image, text, *inputs[:2]))
    rows, columns = torch.ops.ovseg.contrastive_stats(*plain, image_ids, text_ids, *options)
    weights = row_weight.to(rows.dtype), torch.zeros_like(columns[0])
    return torch.ops.ovseg.contrastive_loss(image, text, *inputs, rows, columns, *weights, *options)


@lib.fake("contrastive_stats")
def _(image, text, *_):
    return image.new_empty(3, image.shape[0]), image.new_empty(3, text.shape[0])


def _loss(
    image,
    text,
    logit_scale,
    logit_bias,
    image_ids,
    text_ids,
    rows,
    columns,
    row_weight,
    column_weight,
    *_,
):
    """Return (3) or (4) from the statistics: a few additions, the same on every device."""
    return _distributed.terms(rows, row_weight) + _distributed.terms(columns, column_weight)


lib.composite("contrastive_loss", _loss)
lib.fake("contrastive_loss")(lambda image, *_: image.new_empty(()))


@lib.fake("contrastive_loss_backward")
def _(grad, image, text, *rest):
    sides = zip((image, text), rest[-2:], strict=True)
    return (
        *(x.new_empty((x.shape[0] if need else 0, x.shape[1])) for x, need in sides),
        image.new_empty(()),
        image.new_empty(()),
    )


def _setup(ctx, inputs, output):
    *tensors, ctx.offset, ctx.sigmoid, ctx.tf32 = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    needs = ctx.needs_input_grad[:2]
    options = (ctx.offset, ctx.sigmoid, ctx.tf32)
    found = torch.ops.ovseg.contrastive_loss_backward(grad, *ctx.saved_tensors, *options, *needs)
    return *(x if need else None for x, need in zip(found, (*needs, True, True), strict=True)), *(
        None,
    ) * 9


_transforms.autograd("contrastive_loss", _backward, _setup)
_transforms.no_second_derivative("contrastive_loss_backward")
_transforms.no_second_derivative("contrastive_stats")
for _name in ("contrastive_stats", "contrastive_loss", "contrastive_loss_backward"):
    _transforms.vmap(_name)
