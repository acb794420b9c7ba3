"""MGCA-style objective: texts aligned with objects, regions and pixels, from pairs alone.

It is a reconstruction, docs/mgca.md.

    L = w_o L_object + w_r L_region + w_p(t) L_pixel                                             (1)

object: symmetric InfoNCE over phi(i, j), text j against its own weighted mean of picture i's pixels
(PACL's compatibility), all pairs.

region: R groups of each picture by ``nn.units.cluster`` of the detached pixels; symmetric InfoNCE
over the cosine of text j and the group of picture i that is most like it, all pairs: the best group
of its own picture against the hardest of each other one.

pixel: the k_pos pixels of the text's own picture that are most like it, against pixels of other
pictures that are sampled hard, and those pixels against all texts:

    L_pixel = ovseg_kernels.dense_contrastive_loss                                               (2)

Pictures whose id is the text's are never negatives. w_p is 0 up to ``pixel_start`` of the stage and
rises over ``pixel_ramp`` of it: the pixels that an untrained decoder finds for a text are noise.
``reference.py`` has all of it in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

import ovseg_kernels as ok
from ovseg_kernels.distributed import gather_rows
from ovseg_kernels.results import SelectedPixels

from ...bounds import bounded
from ...data.batches import PairBatch, TagBatch
from ...nn.tensors import at_least_float32
from ...nn.units import cluster, mean_weights
from ..contrast import image_text_contrast
from ..objective import Losses, Objective, Progress, Ranks, Rows, loss_weights
from .model import MGCA
from .one_gradient import OneGradient

LEVELS = ("object", "region", "pixel")
_NOISY = ("gumbel", "random")


@dataclass
class MGCATraining:
    """Options of the objective.

    Attributes:
        weights: of the levels; 0 switches one off.
        regions: R.
        positives, negatives: k_pos and k_neg of the pixel level.
        sampling: of its negatives: ``topk``, ``semi``, ``gumbel`` or ``random``.
        skip: so many of the hardest are left out, as probable false negatives: with ``topk`` a
            window of ranks.
        margin: of ``semi``.
        sampling_temperature: of ``gumbel``.
        reduction: ``mean_of_log`` pushes every positive, ``log_of_sum`` is satisfied by one.
        terms: ``both``, ``text_to_pixel`` or ``pixel_to_text``.
        pixel_start, pixel_ramp: shares of the stage.
    """

    weights: dict[str, float] = bounded(default_factory=dict, low=0)
    regions: int = bounded(8, low=1)
    positives: int = bounded(32, low=1)
    negatives: int = bounded(64, low=1)
    sampling: str = bounded("topk", one_of=("topk", "semi", "gumbel", "random"))
    skip: int = bounded(0, low=0)
    margin: float = bounded(0.1, low=1e-6)
    sampling_temperature: float = bounded(0.07, low=1e-6)
    reduction: str = bounded("mean_of_log", one_of=("mean_of_log", "log_of_sum"))
    terms: str = bounded("both", one_of=("both", "text_to_pixel", "pixel_to_text"))
    pixel_start: float = bounded(0.3, low=0, high=1)
    pixel_ramp: float = bounded(0.1, low=0, high=1)


class MGCAObjective(Objective):
    """The losses of (1)."""

    Options = MGCATraining
    batch_types = (PairBatch, TagBatch)
    takes_features = True
    model: MGCA

    def __init__(self, model: MGCA, options: MGCATraining | None = None):
        super().__init__(model)
        options = options or MGCATraining()
        self.options = options
        self.weights = loss_weights(options.weights, dict.fromkeys(LEVELS, 1.0))

    @override
    def encode(self, batch: PairBatch | TagBatch, progress: Progress) -> Rows:
        tokens = self.encoded(batch).tokens
        return {"tokens": tokens, **self.own_texts(batch)}

    @override
    def loss(
        self, rows: Rows, batch: PairBatch | TagBatch, progress: Progress, group: Ranks
    ) -> Losses:
        tokens = at_least_float32(rows["tokens"])
        text = at_least_float32(self.all_texts(rows, batch))
        model = self.model
        weights = self.weights | {"pixel": self.pixel_weight(progress.share)}
        shared = OneGradient(tokens)
        losses = {}
        if weights["object"]:
            losses["object"] = image_text_contrast(
                shared.pixels, text, model.logit_scale, batch, group, model.compatibility
            )
        if weights["region"]:
            R = self.options.regions
            means = mean_weights(cluster(tokens.detach(), R), R, tokens.dtype)
            losses["region"] = image_text_contrast(
                shared.weighted(means), text, model.logit_scale, batch, group, best_unit
            )
        if weights["pixel"]:
            losses["pixel"] = self._pixel(shared, text, batch, progress, group)
        nothing = 0.0 if losses else 0.0 * tokens.sum()
        total = sum((weights[name] * loss for name, loss in losses.items()), start=nothing)
        return {"total": total, **losses}

    def pixel_weight(self, share: float) -> float:
        """Return w_p of (1) at this share of the stage."""
        start = self.options.pixel_start
        ramp = self.options.pixel_ramp
        rise = min(1.0, max(0.0, (share - start) / ramp)) if ramp else float(share >= start)
        return self.weights["pixel"] * rise

    def _pixel(
        self,
        shared: OneGradient,
        text: Tensor,
        batch: PairBatch | TagBatch,
        progress: Progress,
        group: Ranks,
    ) -> Tensor:
        """Return (2), in two steps: what is selected, and the loss of those rows.

        Over ranks the pixels travel: the hardest of all are to be found, whatever the sampling.
        Every rank then has the whole loss, and ``gather_rows`` gives each its own rows' gradient
        from all: their mean is that of one process.
        """
        o = self.options
        pixels = shared.pixels
        if isinstance(batch, TagBatch):  # one of a picture's words is its text, drawn anew
            drawn = progress.uniform(text.device, "words", tuple(batch.positives.shape))
            image_ids = text_ids = drawn.masked_fill(~batch.positives, -1).argmax(1)
            text = text[text_ids]
        else:
            image_ids = batch.image_ids
            text_ids = batch.text_ids
        if group is not None:
            pixels, text, image_ids, text_ids = (
                gather_rows(x, group) for x in (pixels, text, image_ids, text_ids)
            )
        noise = None
        if o.sampling in _NOISY:
            noise = replace(progress, rank=0).rng(pixels.device, "negatives")
        chosen = ok.select_pixels(
            pixels.detach(),
            text,
            k_pos=o.positives,
            k_neg=o.negatives,
            sampling=o.sampling,
            skip=o.skip,
            rng=noise,
            image_ids=image_ids,
            text_ids=text_ids,
            margin=o.margin,
            sampling_temperature=o.sampling_temperature,
        )
        if group is None:  # text j's rows are a picture of their own, whose id is the text's
            index = torch.cat(chosen, 1)
            pixels = shared.rows(index)
            image_ids = text_ids
            place = torch.arange(index.numel(), device=index.device).view_as(index)
            place = place.masked_fill(index < 0, -1)
            chosen = SelectedPixels(*place.split([part.shape[1] for part in chosen], 1))
        return ok.dense_contrastive_loss(
            pixels,
            text,
            temperature=1 / self.model.logit_scale,
            selected=chosen,
            image_ids=image_ids,
            text_ids=text_ids,
            reduction=o.reduction,
            terms=o.terms,
        )

    @override
    def after_step(self, progress: Progress) -> None:
        self.model.limit_logit_scale()


def best_unit(units: Tensor, text: Tensor) -> Tensor:
    """Return the largest cosine of a text with a picture's ``units`` [B, R, D], [B, T]."""
    return ok.patch_text_similarity(units, text, pool="max")
