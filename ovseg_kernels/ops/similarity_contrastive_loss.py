"""similarity_contrastive_loss: symmetric InfoNCE on a given similarity matrix.

    z_ij = lambda phi_ij                                                                        (1)
    L_i  = logsumexp_j z_ij - sum_j p_ij z_ij / p_i.  rows: image to text; columns likewise     (2)
    L    = (mean_i L_i + mean_j L_j) / 2              over rows and columns with a positive     (3)

p_ij >= 0 says how much a text is a positive of an image: 1 for equal ids and 0 for others; without
ids, 1 for the one text at the image's own position; or what ``positives`` holds. p_i. is the sum of
a row, p_.j that of a column: several positives share the target in proportion. Pairs left out by
``pair_mask`` take part in no sum. With w_i = 1 / (2 number of rows with a positive), w_j likewise:

    dL/dz_ij = w_i (exp(z_ij - lse_i) - p_ij / p_i.) + w_j (exp(z_ij - lse_j) - p_ij / p_.j)    (4)

Shapes   similarity [B, T]; logit_scale one element; image_ids [B], text_ids [T] int64; pair_mask
  [B, T] bool; positives [B, T] bool or float; scalar out.
Dtypes   float16 and bfloat16 are computed in float32; the loss is float32, or float64 for float64.
  Weights of any float dtype become that of the sums; a bool is read as it is.
Ranks    with ``group``, similarity holds this rank's images against the texts of all ranks, in the
  order of the ranks, or against texts that all ranks have in common, such as a vocabulary; only 3 T
  numbers cross: log-sum-exp and positives of the columns. Every rank returns the loss of the whole
  batch. The gradient is that of the sum over ranks of what they return, as for torch's own
  differentiable collectives: with texts gathered differentiably, or computed on every rank, and
  DDP's mean over ranks, parameters get exactly the gradient of one process.
Cost     two reads of the matrix forward, one read and one write backward, and as many reads of
  ``positives``; kept: the matrix and 3 (B + T) numbers. No other [B, T] is made of a bool; of
  weights one where their dtype is another.
Errors   ValueError for ranks, sizes, devices, one id vector without the other, ids beside
  positives, B != T without either, a logit_scale that is not finite or weights that are negative or
  not finite, left-out pairs' too (numbers are looked at on the CPU only: on a GPU a NaN arrives in
  the loss); TypeError for dtypes. Without any positive the loss is 0, and so its gradient.
Source   Radford et al., CLIP, 2021; multi-positive form: Khosla et al., Supervised Contrastive
  Learning, 2020, L_out.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .. import _backends, _check, _distributed, _transforms
from .. import _library as lib
from ..reference import similarity_contrastive_loss as reference
from ..reference.patch_text_similarity import accumulation_dtype

_PAIRS = "Tensor? image_ids, Tensor? text_ids, Tensor? pair_mask, Tensor? positives"
lib.define(
    "similarity_contrastive_loss",
    f"similarity_contrastive_stats(Tensor similarity, Tensor logit_scale, {_PAIRS}, int offset) "
    "-> (Tensor, Tensor)",
)
lib.define(
    "similarity_contrastive_loss",
    f"similarity_contrastive_loss(Tensor similarity, Tensor logit_scale, {_PAIRS}, Tensor rows, "
    "Tensor columns, Tensor row_weight, Tensor column_weight, int offset) -> Tensor",
)
lib.define(
    "similarity_contrastive_loss",
    "similarity_contrastive_loss_backward(Tensor grad, Tensor similarity, Tensor logit_scale, "
    f"{_PAIRS}, Tensor rows, Tensor columns, Tensor row_weight, Tensor column_weight, int offset) "
    "-> (Tensor, Tensor)",
)
lib.fallback("similarity_contrastive_stats", reference.stats)
lib.fallback("similarity_contrastive_loss_backward", reference.backward)


def similarity_contrastive_loss(
    similarity: torch.Tensor,
    logit_scale: float | torch.Tensor,
    *,
    image_ids: torch.Tensor | None = None,
    text_ids: torch.Tensor | None = None,
    pair_mask: torch.Tensor | None = None,
    positives: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the symmetric InfoNCE of ``similarity`` [B, T], equation (3) of this file.

    Args:
        similarity: [B, T].
        logit_scale: multiplies it; number or tensor of one element, which gets a gradient.
        image_ids: [B] int64, given with ``text_ids``; equal ids are positives. No ids and no
            ``positives``: B = T and the diagonal. Ids that match nowhere leave no positive: 0, with
            a gradient of 0. Telling would wait for a GPU.
        text_ids: [T] int64, given with ``image_ids``.
        pair_mask: [B, T] bool; False leaves a pair out, as one does with negatives that are true by
            accident.
        positives: [B, T] in place of the ids: bool, or weights of at least 0 in any float dtype,
            which get no gradient. Rows and columns of zeros are left out of the mean. With
            ``group`` this rank's images against all texts, as in ``similarity``.
        group: the process group whose ranks hold the other images; None for one process.

    Returns:
        The loss, a scalar; with ``group`` that of the whole batch on every rank.
    """
    _check.tensor("similarity", similarity, 2, "[B, T]")
    _check.group(group)
    dtype = accumulation_dtype(similarity)
    scale = _check.scalar("logit_scale", logit_scale, similarity, dtype)
    _check.pair_ids(
        image_ids, similarity.shape[0], text_ids, similarity.shape[1], "similarity", similarity
    )
    if pair_mask is not None:
        _check.tensor("pair_mask", pair_mask, 2, "[B, T]", (torch.bool,))
        _check.shape("pair_mask", pair_mask, tuple(similarity.shape), "that of similarity")
        _check.same("pair_mask", pair_mask, "similarity", similarity, dtype=False)
    offset = 0
    if positives is not None:
        if image_ids is not None:
            raise ValueError(
                "positives and ids were both given; expected positives, or image_ids and text_ids"
            )
        positives = _weights(positives, similarity, dtype)
    elif image_ids is None:
        offset = _offset(similarity, group)
    similarity = similarity.to(dtype)
    pairs = (image_ids, text_ids, pair_mask, positives)
    if group is None and _backends.use_definition("similarity_contrastive_loss", similarity.device):
        return reference.similarity_contrastive_loss(similarity, scale, *pairs)
    rows, columns = torch.ops.ovseg.similarity_contrastive_stats(
        similarity.detach(), scale.detach(), *pairs, offset
    )
    if group is not None:
        columns = _distributed.merge_columns(columns, group)
    row_weight = _distributed.weights(rows, group)
    column_weight = _distributed.weights(columns, None)
    loss = torch.ops.ovseg.similarity_contrastive_loss(
        similarity, scale, *pairs, rows, columns, row_weight, column_weight, offset
    )
    if group is None:
        return loss
    return _distributed.of_the_whole_batch(loss, _distributed.terms(rows, row_weight), group)


def _weights(positives: torch.Tensor, similarity: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``positives`` as the kernels read them, checked: bool, or of ``dtype``."""
    _check.tensor("positives", positives, 2, "[B, T]", (torch.bool, *_check.FLOATS))
    _check.shape("positives", positives, tuple(similarity.shape), "that of similarity")
    _check.same("positives", positives, "similarity", similarity, dtype=False)
    if positives.dtype == torch.bool:
        return positives
    positives = positives.detach().to(dtype)  # what that dtype cannot hold is infinite
    _check.weights("positives", positives)
    return positives


def _offset(similarity: torch.Tensor, group: dist.ProcessGroup | None) -> int:
    """Return the column of the first row's positive, where those are the diagonal."""
    offset = 0
    total = similarity.shape[0]
    if group is not None:
        sizes = [
            size for (size,) in _distributed.sizes_of_ranks((total,), group, similarity.device)
        ]
        offset, total = sum(sizes[: dist.get_rank(group)]), sum(sizes)
    if total != similarity.shape[1]:
        raise ValueError(
            f"similarity has shape {list(similarity.shape)} and the batch has {total} images; "
            "without ids expected as many texts as images: pass image_ids and text_ids, or "
            "positives"
        )
    return offset


@lib.fake("similarity_contrastive_stats")
def _(similarity, *_):
    return similarity.new_empty(3, similarity.shape[0]), similarity.new_empty(
        3, similarity.shape[1]
    )


def _loss(
    similarity,
    logit_scale,
    image_ids,
    text_ids,
    pair_mask,
    positives,
    rows,
    columns,
    row_weight,
    column_weight,
    offset,
):
    """Return (3) from the statistics: a handful of additions, the same on every device."""
    return _distributed.terms(rows, row_weight) + _distributed.terms(columns, column_weight)


lib.composite("similarity_contrastive_loss", _loss)
lib.fake("similarity_contrastive_loss")(lambda similarity, *_: similarity.new_empty(()))


@lib.fake("similarity_contrastive_loss_backward")
def _(grad, similarity, *_):
    return similarity.new_empty(similarity.shape), similarity.new_empty(())


def _setup(ctx, inputs, output):
    *tensors, ctx.offset = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    d_similarity, d_scale = torch.ops.ovseg.similarity_contrastive_loss_backward(
        grad, *ctx.saved_tensors, ctx.offset
    )
    return d_similarity, d_scale, *(None,) * 9


_transforms.autograd("similarity_contrastive_loss", _backward, _setup)
_transforms.no_second_derivative("similarity_contrastive_loss_backward")
_transforms.no_second_derivative("similarity_contrastive_stats")
for _name in (
    "similarity_contrastive_stats",
    "similarity_contrastive_loss",
    "similarity_contrastive_loss_backward",
):
    _transforms.vmap(_name)
