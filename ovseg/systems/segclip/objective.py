"""SegCLIP's superpixel loss: patches of one superpixel should go to the same center.

Luo et al., arXiv:2211.14813.

    q_l = mean of P over the patches of l's superpixel (l included)                              (1)
    loss_b = 1 / (2 L G) sum_lg (softmax(P)_blg - softmax(q)_blg) (log softmax(P)_blg - log softmax(q)_blg)      (2)

P is the straight-through assignment, so softmax(P) takes two values and the loss lies below 0.0221:
a weak regulariser. As published, (1) is a product of an [L, L] matrix of equal labels with P; here
it is a sum over superpixels, O(L G), without that matrix. Gradients go to P directly and through q.

SegCLIP's objective: contrast, superpixels, and pixels from groups.

    total = w_c contrastive + w_s superpixel + w_r reconstruction

Reconstruction: a quarter of the patches is kept, gathered into groups and back, and a small decoder
    predicts the pixels of the others; its
loss is their mean squared error. All three losses weigh 1 as published (Luo et al.,
arXiv:2211.14813).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ...data.batches import PairBatch
from ...errors import ConfigError, InputError
from ...nn.tensors import at_least_float32
from ..contrast import image_text_contrast, mean_of_rows
from ..objective import Losses, Objective, Progress, Rows
from .layers import patchify
from .model import SegCLIP


def superpixel_loss(assignment: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Equation (2), one number a picture [B].

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
    sums, count = (
        p.new_zeros(B * L, G).index_add(0, rows, p),
        p.new_zeros(B * L).index_add(0, rows, p.new_ones(B * L)),
    )
    q = sums[rows] / count[rows, None]
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).view(B, L * G).mean(1)


def _numbered(segments: torch.Tensor) -> torch.Tensor:
    """[B, L] int64: the superpixels numbered without gaps, those of image b from b L on.

    ``unique`` would make a GPU wait for its count.
    """
    (B, L), (found, order) = segments.shape, segments.sort(1)
    first = torch.arange(B, device=segments.device)[:, None] * L
    numbers = torch.cat([first, first + (found[:, 1:] != found[:, :-1]).cumsum(1)], 1)
    return torch.empty_like(numbers).scatter_(1, order, numbers)


LOSSES = ("contrastive", "superpixel", "reconstruction")


@dataclass
class SegCLIPTraining:
    """Attributes: weights: of the losses; 0 switches one off.

    ``superpixel`` needs ``segments`` in the batch. tau: of the Gumbel-softmax. kept: share of the
    tokens (class token counted) that the reconstruction sees.
    """

    weights: dict[str, float] = field(default_factory=dict)
    tau: float = 0.9
    kept: float = 0.25


class SegCLIPObjective(Objective):
    """The losses of this file.

    ``batch.noise`` may hold ``groups`` and ``kept_groups`` (Gumbel, [B, G, L] and [B, G, K]) and
    ``masking`` [B, L]; what it does not hold is drawn.
    """

    Options = SegCLIPTraining
    model: SegCLIP

    def __init__(self, model: SegCLIP, options: SegCLIPTraining = SegCLIPTraining()):  # noqa: B008
        super().__init__(model)
        unknown = set(options.weights) - set(LOSSES)
        if unknown:
            raise ConfigError(f"weights names {sorted(unknown)}; expected some of {list(LOSSES)}")
        if wrong := {
            name: weight
            for name, weight in options.weights.items()
            if not 0 <= weight < float("inf")
        }:
            raise ConfigError(f"weights is {wrong}; expected numbers of 0 or more")
        if not 0 < options.tau < float("inf"):
            raise ConfigError(f"tau is {options.tau}; expected a positive finite number")
        if not 0 < options.kept < 1:
            raise ConfigError(f"kept is {options.kept}; expected a share between 0 and 1")
        self.weights, self.tau, self.kept = (
            dict.fromkeys(LOSSES, 1.0) | options.weights,
            options.tau,
            options.kept,
        )
        if not self.weights["reconstruction"]:
            model.train_parts([part for part in model.options.trained if part != "reconstruction"])

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
                    "superpixels of the patches "
                    "(data.superpixels in a recipe), or weights={'superpixel': 0}"
                )
            rows["superpixel"] = superpixel_loss(groups.assignment(noise, self.tau), batch.segments)
        if self.weights["reconstruction"]:
            rows["reconstruction"] = self._reconstruction(images, x, grid, batch, progress)
        return rows

    def loss(
        self, rows: Rows, batch: PairBatch, progress: Progress, group: dist.ProcessGroup | None
    ) -> Losses:
        losses = {
            "contrastive": image_text_contrast(
                rows["image"], rows["text"], self.model.logit_scale, batch, group
            )
        }
        losses |= {name: mean_of_rows(rows[name], group) for name in LOSSES[1:] if name in rows}
        total = torch.stack(
            [self.weights[name] * at_least_float32(loss) for name, loss in losses.items()]
        ).sum()
        return {"total": total, **losses}

    def after_step(self, progress: Progress) -> None:
        self.model.limit_logit_scale()

    def _reconstruction(
        self,
        images: torch.Tensor,
        x: torch.Tensor,
        grid: tuple[int, int],
        batch: PairBatch,
        progress: Progress,
    ) -> torch.Tensor:
        """[B], of each picture the mean squared error of the removed patches' pixels."""
        B, N, D = x.shape
        shuffle = (
            batch.noise["masking"]
            if "masking" in batch.noise
            else progress.uniform(x.device, "masking", (B, N))
        )
        order = shuffle.argsort(dim=1, stable=True)
        count = int((N + 1) * self.kept) - 1  # the class token counts among the kept
        if not 0 < count < N:
            raise ConfigError(
                f"kept is {self.kept}; of {N} patches it keeps {count}, expected at least one and "
                "not all"
            )
        kept = x.gather(1, order[:, :count, None].expand(-1, -1, D))
        hidden = self.model.scatter(
            kept, self._gumbel(batch, progress, "kept_groups", kept), self.tau
        )
        removed = order[:, count:]
        found = self.model.decoder(hidden, order.argsort(1), grid, removed)
        truth = patchify(images, self.model.spec.patch_size)
        if truth.shape[1] != N:
            raise InputError(
                f"images give {N} tokens and {truth.shape[1]} patches; the reconstruction expects "
                "one token a patch, "
                "a stride of the patch size"
            )
        truth = truth.gather(1, removed[..., None].expand(-1, -1, truth.shape[2]))
        return (at_least_float32(found) - at_least_float32(truth)).square().mean((1, 2))

    def _gumbel(
        self, batch: PairBatch, progress: Progress, name: str, x: torch.Tensor
    ) -> torch.Tensor:
        if name in batch.noise:
            return batch.noise[name]
        return progress.gumbel(
            x.device, name, (len(x), len(self.model.groups.semantic_center), x.shape[1])
        )
