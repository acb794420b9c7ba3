"""similarity_contrastive_loss: symmetric InfoNCE on a given similarity matrix.

    z_ij = lambda phi_ij                                                                        (1)
    L_i  = logsumexp_j z_ij - mean_{j in P_i} z_ij    rows: image to text; columns likewise     (2)
    L    = (mean_i L_i + mean_j L_j) / 2              over rows and columns with a positive     (3)

P_i are the texts with the image's id; without ids, the one text at the image's own position. Pairs
left out by ``pair_mask`` take part in no sum. With w_i = 1 / (2 number of such rows), w_j likewise
and 1_ij a positive pair:

    dL/dz_ij = w_i (exp(z_ij - lse_i) - 1_ij / |P_i|) + w_j (exp(z_ij - lse_j) - 1_ij / |P_j|)  (4)

Shapes   similarity [B, T]; logit_scale one element; image_ids [B], text_ids [T] int64; pair_mask
  [B, T] bool; scalar out.
Dtypes   float16 and bfloat16 are computed in float32; the loss is float32, or float64 for float64.
Ranks    with ``group``, similarity holds this rank's images against the texts of all ranks, in the
  order of the ranks; only 3 T numbers cross: log-sum-exp and positives of the columns. Every rank
  returns the loss of the whole batch. The gradient is that of the sum over ranks of what they
  return, as for torch's own differentiable collectives: with texts gathered differentiably and
  DDP's mean over ranks, parameters get exactly the gradient of one process.
Cost     two reads of the matrix forward, one read and one write backward; kept: the matrix and 3 (B
  + T) numbers.
Errors   ValueError for ranks, sizes, devices, one id vector without the other, B != T without ids,
  a logit_scale that is not finite (looked at on the CPU only); TypeError for dtypes. Without any
  positive the loss is 0, and so its gradient.
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

_IDS = "Tensor? image_ids, Tensor? text_ids, Tensor? pair_mask"
lib.define(
    "similarity_contrastive_loss",
    f"similarity_contrastive_stats(Tensor similarity, Tensor logit_scale, {_IDS}, int offset) "
    "-> (Tensor, Tensor)",
)
lib.define(
    "similarity_contrastive_loss",
    f"similarity_contrastive_loss(Tensor similarity, Tensor logit_scale, {_IDS}, Tensor rows, "
    "Tensor columns, Tensor row_weight, Tensor column_weight, int offset) -> Tensor",
)
lib.define(
    "similarity_contrastive_loss",
    "similarity_contrastive_loss_backward(Tensor grad, Tensor similarity, Tensor logit_scale, "
    f"{_IDS}, Tensor rows, Tensor columns, Tensor row_weight, Tensor column_weight, int offset) "
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
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the symmetric InfoNCE of ``similarity`` [B, T], equation (3) of this file.

    Args:
        similarity: [B, T].
        logit_scale: multiplies it; number or tensor of one element, which gets a gradient.
        image_ids: [B] int64, given with ``text_ids``; equal ids are positives. Neither: B = T and
            the diagonal. Ids that match nowhere leave no positive: 0, with a gradient of 0. Telling
            would wait for a GPU.
        text_ids: [T] int64, given with ``image_ids``.
        pair_mask: [B, T] bool; False leaves a pair out, as one does with negatives that are true by
            accident.
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
    if image_ids is None:
        offset, total = 0, similarity.shape[0]
        if group is not None:
            sizes = [
                size for (size,) in _distributed.sizes_of_ranks((total,), group, similarity.device)
            ]
            offset, total = sum(sizes[: dist.get_rank(group)]), sum(sizes)
        if total != similarity.shape[1]:
            raise ValueError(
                f"similarity has shape {list(similarity.shape)} and the batch has {total} images; "
                "without ids expected as many texts as images: pass image_ids and text_ids"
            )
    similarity = similarity.to(dtype)
    if group is None and _backends.use_definition("similarity_contrastive_loss", similarity.device):
        return reference.similarity_contrastive_loss(
            similarity, scale, image_ids, text_ids, pair_mask
        )
    ids = (image_ids, text_ids, pair_mask)
    rows, columns = torch.ops.ovseg.similarity_contrastive_stats(
        similarity.detach(), scale.detach(), *ids, offset
    )
    if group is not None:
        columns = _distributed.merge_columns(columns, group)
    row_weight, column_weight = (
        _distributed.weights(rows, group),
        _distributed.weights(columns, None),
    )
    loss = torch.ops.ovseg.similarity_contrastive_loss(
        similarity, scale, *ids, rows, columns, row_weight, column_weight, offset
    )
    if group is None:
        return loss
    return _distributed.of_the_whole_batch(loss, _distributed.terms(rows, row_weight), group)


@lib.fake("similarity_contrastive_stats")
def _(similarity, logit_scale, image_ids, text_ids, pair_mask, offset):
    return similarity.new_empty(3, similarity.shape[0]), similarity.new_empty(
        3, similarity.shape[1]
    )


def _loss(
    similarity,
    logit_scale,
    image_ids,
    text_ids,
    pair_mask,
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
    return d_similarity, d_scale, *(None,) * 8


_transforms.autograd("similarity_contrastive_loss", _backward, _setup)
_transforms.no_second_derivative("similarity_contrastive_loss_backward")
_transforms.no_second_derivative("similarity_contrastive_stats")
for _name in (
    "similarity_contrastive_stats",
    "similarity_contrastive_loss",
    "similarity_contrastive_loss_backward",
):
    _transforms.vmap(_name)
