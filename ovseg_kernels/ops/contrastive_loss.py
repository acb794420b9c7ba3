"""contrastive_loss: InfoNCE or sigmoid loss between images and texts, without the [B, T] matrix.

    s_ij = image_i . text_j                     unit vectors, with normalize                    (1)
    z_ij = lambda s_ij + beta                   beta: logit_bias, sigmoid only                  (2)
    softmax:  L = (mean_i (lse_j z_ij - sum_j p_ij z_ij / sum_j p_ij)
                   + mean_j (lse_i z_ij - sum_i p_ij z_ij / sum_i p_ij)) / 2                    (3)
    sigmoid:  L = sum_ij (softplus(z_ij) - min(p_ij, 1) z_ij) / B                               (4)

p_ij is 1 for a positive pair and 0 for any other: texts with the image's id; without ids, the one
text at the image's own position. Of listed ``positives`` it is the pair's weight, 1 where none are
given, and the sum of its weights where the pair is listed more than once. Means run over rows and
columns whose p sums to more than 0; w_i, w_j are 1 / (2 their number), and 1 / B for the sigmoid.
There p is the target of a binary cross-entropy, -p log sigmoid(z) - (1 - p) log sigmoid(-z), a soft
label: SigLIP's softplus(-y z) where it is 1 (y = 1) or 0 (y = -1). It stops at 1: above, (4) would
fall without end as z grows.

    softmax:  dL/dz_ij = w_i (exp(z_ij - lse_i) - p_ij / sum_j p_ij)
                         + w_j (exp(z_ij - lse_j) - p_ij / sum_i p_ij)                          (5)
    sigmoid:  dL/dz_ij = w_i (sigmoid(z_ij) - min(p_ij, 1))                                     (6)
    d image = lambda dz text    d text = lambda dz^T image
    d lambda = sum dz s         d beta = sum dz                                                 (7)

Shapes   image [B, D]; text [T, D]; logit_scale, logit_bias one element; image_ids [B], text_ids
  [T], positives [P, 2] int64; positive_weights [P]; scalar out.
Dtypes   float16 and bfloat16 are computed in float32 on the CPU. On a GPU two of one dtype are
  multiplied as they are, with float32 sums, and normalised behind that; their gradients have their
  dtype. Two different ones are made float32, with tf32 products. The loss is float32, or float64
  for float64. Autocast lowers nothing.
Ranks    with ``group``, image, text and ids are this rank's, and so is a list of positives: of this
  rank's images with the texts of all ranks. Texts are gathered with their gradient, 3 T numbers
  reduced. Every rank returns the loss of the whole batch; with DDP's mean
  over ranks, parameters get exactly the gradient of one process. Uneven batches are allowed.
Cost     2 B T D flops forward, 6 B T D backward (the logits again, and two products). Never stored:
  anything of size B T; on the CPU a block of at most 2 M logits and packed copies of the texts, on
  a GPU partial statistics of 64 MiB and a block of 32 MiB. Kept: features and 3 (B + T) numbers. A
  list is sorted by image and by text, P log P, and read beside the logits: O(P) memory, and the
  bits of equal ids where it lists exactly their pairs, in any order, with weight 1.
Errors   ValueError for ranks, sizes, devices, one id vector without the other, B != T without ids,
  a scale or bias that is not finite (looked at on the CPU only), a bias with softmax, ids beside
  positives, weights without; TypeError for dtypes. Looked at on the CPU only too: listed pairs
  outside of [B, T], which a GPU leaves out, and weights that are neither 0 nor 1e-15 to 1e15, which
  a GPU computes with (a NaN arrives in the loss). Without any positive the softmax loss is 0.
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
    "Tensor? image_ids, Tensor? text_ids, Tensor? pair_weights"
)  # with pair_weights, the ids are a list of pairs: see sorted_both_ways
# ``normalize`` comes with 16-bit features, which stay what they are; others are unit vectors.
_OPTIONS = "int offset, bool sigmoid, bool tf32, bool normalize"
_SAVED = "Tensor rows, Tensor columns, Tensor row_weight, Tensor column_weight, " + _OPTIONS
lib.define("contrastive_loss", f"contrastive_stats({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
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
    positives: torch.Tensor | None = None,
    positive_weights: torch.Tensor | None = None,
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
        positives: [P, 2] int64, pairs (row of this rank's images, row of the texts of all ranks in
            their order), in place of ids: any number for an image or a text. A row or column that
            is not listed has no positive. An empty list is what ids that match nowhere are.
        positive_weights: [P], how much each counts, without a gradient; None: 1 each. A pair that
            is listed twice has the sum, at most 1 for ``sigmoid``, where it is a soft label.

    Returns:
        The loss, a scalar; with ``group`` that of the whole batch on every rank.
    """
    pairs = positives, positive_weights
    return compute(
        image,
        text,
        logit_scale,
        image_ids,
        text_ids,
        group,
        normalize,
        kind,
        logit_bias,
        pairs=pairs,
    )


def compute(
    image,
    text,
    logit_scale,
    image_ids,
    text_ids,
    group,
    normalize,
    kind,
    logit_bias,
    value="batch",
    pairs=(None, None),
):
    """Return ``contrastive_loss``, or this rank's value of it.

    With ``value="rank"`` the number returned is the mean over this rank's rows and columns, as
    open_clip's local loss is; the gradient is the same. ``pairs`` are positives and their weights.
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
    whole = not _stay_16_bit(image, text)
    if whole:
        image, text = image.to(dtype), text.to(dtype)
    scale = _check.scalar("logit_scale", logit_scale, image, dtype)
    bias = _check.scalar("logit_bias", logit_bias, image, dtype)
    if kind == "softmax" and (isinstance(logit_bias, torch.Tensor) or logit_bias != 0):
        raise ValueError(
            "logit_bias was given with kind='softmax', which it cannot change; expected "
            "kind='sigmoid'"
        )
    _check.pair_ids(image_ids, image.shape[0], text_ids, text.shape[0], "image", image)
    pair_index, pair_weights = pairs
    if image_ids is not None and pair_index is not None:
        raise ValueError("positives was given with image_ids and text_ids; expected one of the two")
    given = "positives" if pair_index is not None else "ids" if image_ids is not None else "neither"
    needed = _check.pair_list(pair_index, pair_weights, image.shape[0], "image", image)
    sizes, rank = _sizes(image, text, given, needed, group)
    with torch.autocast(lib.autocast_type(image.device), enabled=False):
        if group is None and _backends.use_definition("contrastive_loss", image.device):
            return reference.contrastive_loss(
                image, text, scale, bias, image_ids, text_ids, normalize, kind, *pairs
            )
        if normalize and whole:
            image, text = unit(image), unit(text)
        offset, total = sum(b for b, _ in sizes[:rank]), sum(b for b, _ in sizes)
        if group is not None:
            texts = [t for _, t in sizes]
            text = _distributed.gather_rows(text, texts, group)
            text_ids = (
                None if text_ids is None else _distributed.gather_rows(text_ids, texts, group)
            )
        positives = image_ids, text_ids, None
        if pair_index is not None:
            positives = sorted_both_ways(pair_index, pair_weights, image, text)
        options = (
            offset,
            kind == "sigmoid",
            whole and dtype == torch.float32 and (low or _backends.allow_tf32(image)),
            normalize and not whole,
        )
        plain = (x.detach() for x in (image, text, scale, bias))
        rows, columns = torch.ops.ovseg.contrastive_stats(*plain, *positives, *options)
        if kind == "sigmoid":
            weights = torch.full_like(rows[0], 1 / max(1, total)), torch.zeros_like(columns[0])
        else:
            columns = columns if group is None else _distributed.merge_columns(columns, group)
            weights = _distributed.weights(rows, group), _distributed.weights(columns, None)
        loss = torch.ops.ovseg.contrastive_loss(
            image, text, scale, bias, *positives, rows, columns, *weights, *options
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


def _stay_16_bit(image: torch.Tensor, text: torch.Tensor) -> bool:
    """Return whether the kernels take these features as they are, with the factors of their rows.

    Triton's do, and the closed form that answers for them on a GPU.
    """
    if image.dtype != text.dtype or image.dtype.itemsize > 2:
        return False
    forced = _backends.forced()
    return forced != "reference" and (image.device.type == "cuda" or forced == "triton")


def _sizes(image, text, given, needed, group):
    """Return the (B, T) of every rank, and this one's place, where they fit to what is given.

    ``given`` are ids, positives or neither; ``needed`` is how many texts the positives speak of.
    """
    sizes: list[tuple[int, ...]] = [(image.shape[0], text.shape[0])]
    rank = 0
    most = [needed]
    if group is not None:
        number = _check.FLOATS.index(torch.promote_types(image.dtype, text.dtype))
        # What must agree goes along, so that all ranks raise, and none waits for one that did.
        agree = (image.shape[1], ("neither", "ids", "positives").index(given), number)
        mine = (*sizes[0], *agree, needed)
        found, rank = _distributed.sizes_of_ranks(mine, group, image.device), dist.get_rank(group)
        if len({x[2:5] for x in found}) > 1:
            raise ValueError(
                f"(B, T, D, ids given: 1 or positives: 2, dtype) of the ranks are "
                f"{[(*x[:4], str(_check.FLOATS[x[4]])[6:]) for x in found]}; expected the last "
                "three to agree"
            )
        sizes = [x[:2] for x in found]
        most = [x[5] for x in found]
    texts = sum(t for _, t in sizes)
    for at, count in enumerate(most):
        if count > texts:
            where = "" if group is None else f" of rank {at}"
            raise ValueError(
                f"positives{where} holds text {count - 1}; expected 0 or more, below the {texts} "
                f"rows of text{' of all ranks' if group is not None else ''}"
            )
    if given == "neither" and any(b != t for b, t in sizes):
        raise ValueError(
            f"image and text have {', '.join(f'{b} and {t}' for b, t in sizes)} rows; "
            "without ids expected as many texts as images: pass image_ids and text_ids"
        )
    return sizes, rank


def sorted_both_ways(positives, weights, image, text):
    """Return a list of pairs as the kernels read it: (by image, by text, weights).

    By image [B + 1 + P] are the places where the pairs of each image begin, with their end, and
    behind them the text of every pair; by text [T + 1 + P] likewise. Weights [2, P] are in either
    order. What is listed twice stays side by side, in the order it came in; pairs outside of [B, T]
    lie behind the end, where nobody reads.
    """
    if weights is None:
        weights = image.new_ones(positives.shape[0])
    weights = weights.detach().to(accumulation_dtype(image))
    images, texts = positives.unbind(1)
    B, T = image.shape[0], text.shape[0]
    inside = (images >= 0) & (images < B) & (texts >= 0) & (texts < T)
    lists = []
    sorted_weights = []
    for own, other, rows, columns in ((images, texts, B, T), (texts, images, T, B)):
        key = torch.where(inside, own * columns + other, rows * columns)
        key, order = key.sort(stable=True)
        starts = torch.arange(rows + 1, device=key.device) * columns
        lists.append(torch.cat([torch.searchsorted(key, starts), other[order]]))
        sorted_weights.append(weights[order])
    return *lists, torch.stack(sorted_weights)


def rows_only(image, text, logit_scale, offset):
    """Return the mean over the images of (3)'s first half.

    The positive of row i is text i + ``offset``: unit features, one process.
    """
    dtype = accumulation_dtype(image)
    tf32 = dtype == torch.float32 and (image.dtype.itemsize == 2 or _backends.allow_tf32(image))
    if _stay_16_bit(image, text):
        tf32 = False
    else:
        image, text = image.to(dtype), text.to(dtype)
    weight = image.new_full((len(image),), 1 / max(1, len(image)), dtype=dtype)
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
    inputs = (scale, torch.zeros_like(scale), image_ids, text_ids, None)
    options = (offset, False, tf32, False)
    plain = (x.detach() for x in (image, text, *inputs[:2]))
    rows, columns = torch.ops.ovseg.contrastive_stats(*plain, *inputs[2:], *options)
    weights = row_weight.to(rows.dtype), torch.zeros_like(columns[0])
    return torch.ops.ovseg.contrastive_loss(image, text, *inputs, rows, columns, *weights, *options)


@lib.fake("contrastive_stats")
def _(image, text, logit_scale, *_):
    return logit_scale.new_empty(3, image.shape[0]), logit_scale.new_empty(3, text.shape[0])


def _loss(
    image,
    text,
    logit_scale,
    logit_bias,
    image_ids,
    text_ids,
    pair_weights,
    rows,
    columns,
    row_weight,
    column_weight,
    *_,
):
    """Return (3) or (4) from the statistics: a few additions, the same on every device."""
    return _distributed.terms(rows, row_weight) + _distributed.terms(columns, column_weight)


lib.composite("contrastive_loss", _loss)
lib.fake("contrastive_loss")(lambda image, text, logit_scale, *_: logit_scale.new_empty(()))


@lib.fake("contrastive_loss_backward")
def _(grad, image, text, logit_scale, *rest):
    sides = zip((image, text), rest[-2:], strict=True)
    return (
        *(x.new_empty((x.shape[0] if need else 0, x.shape[1])) for x, need in sides),
        logit_scale.new_empty(()),
        logit_scale.new_empty(()),
    )


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-4])
    ctx.options = inputs[-4:]


def _backward(ctx, grad):
    needs = ctx.needs_input_grad[:2]
    found = torch.ops.ovseg.contrastive_loss_backward(
        grad, *ctx.saved_tensors, *ctx.options, *needs
    )
    return *(x if need else None for x, need in zip(found, (*needs, True, True), strict=True)), *(
        None,
    ) * 11


_transforms.autograd("contrastive_loss", _backward, _setup)
_transforms.no_second_derivative("contrastive_loss_backward")
_transforms.no_second_derivative("contrastive_stats")
for _name in ("contrastive_stats", "contrastive_loss", "contrastive_loss_backward"):
    _transforms.vmap(_name)
