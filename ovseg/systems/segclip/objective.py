"""SegCLIP's objective: contrast, superpixels, and pixels from groups.

    total = w_c contrastive + w_s superpixel + w_r reconstruction                                (1)

All three weigh 1 as published (Luo et al., arXiv:2211.14813). Patches of one superpixel should go
to the same center:

    q_l = mean of P over the patches of l's superpixel (l included)                              (2)
    superpixel_b = 1 / (2 L G) sum_lg (softmax(P)_blg - softmax(q)_blg)
                                      (log softmax(P)_blg - log softmax(q)_blg)                  (3)

P is the straight-through assignment, so softmax(P) takes two values and (3) lies below 0.0221: a
weak regulariser. As published, (2) is a product of an [L, L] matrix of equal labels with P; here it
is a sum over superpixels, O(L G), without that matrix. Gradients go to P directly and through q.

Reconstruction: a quarter of the patches is kept, gathered into groups and back, and a small decoder
predicts the pixels of the others; its loss is their mean squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from ...bounds import bounded
from ...data.batches import PairBatch
from ...errors import ConfigError, InputError
from ...nn.features import Grid
from ...nn.tensors import at_least_float32
from ..contrast import image_text_contrast, mean_of_rows
from ..objective import Losses, Objective, Progress, Ranks, Rows, loss_weights
from .layers import patchify
from .model import SegCLIP

LOSSES = ("contrastive", "superpixel", "reconstruction")


def superpixel_loss(assignment: Tensor, segments: Tensor) -> Tensor:
    """Return (3), one number a picture [B].

    Args:
        assignment: [B, G, L], P with its gradient.
        segments: [B, L] integers; equal numbers in one image are one superpixel.
    """
    B, G, L = assignment.shape
    if segments.shape != (B, L) or segments.is_floating_point():
        raise InputError(
            f"segments is {segments.dtype} of shape {list(segments.shape)}; expected integers of "
            f"[{B}, {L}]"
        )
    p = assignment.transpose(1, 2).reshape(B * L, G)
    rows = _numbered(segments).flatten()
    sums = p.new_zeros(B * L, G).index_add(0, rows, p)
    count = p.new_zeros(B * L).index_add(0, rows, p.new_ones(B * L))
    q = sums[rows] / count[rows, None]
    log_p = p.log_softmax(-1)
    log_q = q.log_softmax(-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).view(B, L * G).mean(1)


def _numbered(segments: Tensor) -> Tensor:
    """Number the superpixels [B, L] without gaps, those of image b from b L on.

    ``unique`` would make a GPU wait for its count.
    """
    B, L = segments.shape
    found, order = segments.sort(1)
    first = torch.arange(B, device=segments.device)[:, None] * L
    numbers = torch.cat([first, first + (found[:, 1:] != found[:, :-1]).cumsum(1)], 1)
    return torch.empty_like(numbers).scatter_(1, order, numbers)


@dataclass
class SegCLIPTraining:
    """Options of the objective.

    Attributes:
        weights: of the losses; 0 switches one off. ``superpixel`` needs ``segments`` in the batch.
        tau: of the Gumbel-softmax.
        kept: share of the tokens (class token counted) that the reconstruction sees.
    """

    weights: dict[str, float] = bounded(default_factory=dict, low=0)
    tau: float = bounded(0.9, low=0, above=True, expected="a positive finite number")
    kept: float = bounded(
        0.25, low=0, high=1, above=True, below=True, expected="a share between 0 and 1"
    )


class SegCLIPObjective(Objective):
    """The losses of (1).

    ``batch.noise`` may hold ``groups`` and ``kept_groups`` (Gumbel, [B, G, L] and [B, G, K]) and
    ``masking`` [B, L]; what it does not hold is drawn.
    """

    Options = SegCLIPTraining
    model: SegCLIP

    def __init__(self, model: SegCLIP, options: SegCLIPTraining | None = None):
        super().__init__(model)
        options = options or SegCLIPTraining()
        self.weights = loss_weights(options.weights, dict.fromkeys(LOSSES, 1.0))
        self.tau = options.tau
        self.kept = options.kept
        if not self.weights["reconstruction"]:
            model.train_parts([part for part in model.options.trained if part != "reconstruction"])

    @override
    def encode(self, batch: PairBatch, progress: Progress) -> Rows:
        images = self.images(batch)
        x, grid = self.model.embed(images)
        noise = self._gumbel(batch, progress, "groups", x)
        groups, image, _ = self.model.gather(x, noise, self.tau)
        rows = {"image": image, "text": self.model.encode_text(batch.token_ids)}
        if self.weights["superpixel"]:
            if batch.segments is None:
                raise InputError(
                    "batch holds no segments and the superpixel loss has a weight; expected "
                    "superpixels of the patches (data.superpixels in a recipe), or "
                    "weights={'superpixel': 0}"
                )
            rows["superpixel"] = superpixel_loss(groups.assignment(noise, self.tau), batch.segments)
        if self.weights["reconstruction"]:
            rows["reconstruction"] = self._reconstruction(images, x, grid, batch, progress)
        return rows

    @override
    def loss(self, rows: Rows, batch: PairBatch, progress: Progress, group: Ranks) -> Losses:
        scale = self.model.logit_scale
        contrastive = image_text_contrast(rows["image"], rows["text"], scale, batch, group)
        losses = {"contrastive": contrastive}
        losses |= {name: mean_of_rows(rows[name], group) for name in LOSSES[1:] if name in rows}
        total = torch.stack(
            [self.weights[name] * at_least_float32(loss) for name, loss in losses.items()]
        ).sum()
        return {"total": total, **losses}

    @override
    def after_step(self, progress: Progress) -> None:
        self.model.limit_logit_scale()

    def _reconstruction(
        self, images: Tensor, x: Tensor, grid: Grid, batch: PairBatch, progress: Progress
    ) -> Tensor:
        """Return the mean squared error of the removed patches' pixels, [B], one a picture."""
        B, N, D = x.shape
        shuffle = batch.noise.get("masking")
        if shuffle is None:
            shuffle = progress.uniform(x.device, "masking", (B, N))
        order = shuffle.argsort(dim=1, stable=True)
        count = int((N + 1) * self.kept) - 1  # the class token counts among the kept
        if not 0 < count < N:
            raise ConfigError(
                f"kept is {self.kept}; of {N} patches it keeps {count}, expected at least one and "
                "not all"
            )
        kept = x.gather(1, order[:, :count, None].expand(-1, -1, D))
        noise = self._gumbel(batch, progress, "kept_groups", kept)
        hidden = self.model.scatter(kept, noise, self.tau)
        removed = order[:, count:]
        found = self.model.decoder(hidden, order.argsort(1), grid, removed)
        truth = patchify(images, self.model.spec.patch_size)
        if truth.shape[1] != N:
            raise InputError(
                f"images give {N} tokens and {truth.shape[1]} patches; the reconstruction expects "
                "one token a patch, a stride of the patch size"
            )
        truth = truth.gather(1, removed[..., None].expand(-1, -1, truth.shape[2]))
        return (at_least_float32(found) - at_least_float32(truth)).square().mean((1, 2))

    def _gumbel(self, batch: PairBatch, progress: Progress, name: str, x: Tensor) -> Tensor:
        if name in batch.noise:
            return batch.noise[name]
        shape = (len(x), len(self.model.groups.semantic_center), x.shape[1])
        return progress.gumbel(x.device, name, shape)
