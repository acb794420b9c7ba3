"""MGCA-style objective: texts aligned with objects, regions and pixels, from image-text pairs
alone. A reconstruction, docs/mgca.md.

    L = w_o L_object + w_r L_region + w_p(t) L_pixel                                             (1)

object   symmetric InfoNCE over phi(i, j), text j against its own weighted mean of picture i's pixels (PACL's compatibility), all pairs
region   R groups of each picture by ``layers.units.cluster`` of the detached pixels; symmetric InfoNCE over the cosine of text j and the
         group of picture i that is most like it, all pairs: the best group of its own picture
         against the hardest of each other one
pixel    the k_pos pixels of the text's own picture that are most like it, against pixels of other pictures that are sampled hard, and those
         pixels against all texts: ``ovseg_kernels.dense_contrastive_loss``                      (2)

Pictures whose id is the text's are never negatives. w_p is 0 up to ``pixel_start`` of the stage and
rises over ``pixel_ramp`` of it: the pixels that an untrained decoder finds for a text are noise.
``mgca_reference.py`` has all of it in plain torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.distributed as dist

import ovseg_kernels as ok
from ovseg_kernels.distributed import gather_rows
from ovseg_kernels.results import SelectedPixels

from ...data.batches import PairBatch
from ...errors import ConfigError
from ...nn.tensors import at_least_float32
from ...nn.units import cluster, mean_weights
from ..contrast import image_text_contrast
from ..objective import Losses, Objective, Progress, Rows
from .model import MGCA
from .one_gradient import OneGradient

LEVELS = ("object", "region", "pixel")
SAMPLINGS = ("topk", "semi", "gumbel", "random")
_NOISY = ("gumbel", "random")


@dataclass
class MGCATraining:
    """Attributes:
    weights: of the levels; 0 switches one off.
    regions: R.
    positives, negatives: k_pos and k_neg of the pixel level.
    sampling: of its negatives: ``topk``, ``semi``, ``gumbel`` or ``random``.
    skip: so many of the hardest are left out, as probable false negatives: with ``topk`` a window
        of ranks.
    margin: of ``semi``. sampling_temperature: of ``gumbel``.
    reduction: ``mean_of_log`` pushes every positive, ``log_of_sum`` is satisfied by one.
    terms: ``both``, ``text_to_pixel`` or ``pixel_to_text``.
    pixel_start, pixel_ramp: shares of the stage.
    """

    ends: ClassVar[dict[str, tuple[float, float]]] = {
        "weights": (0, math.inf),
        **dict.fromkeys(("regions", "positives", "negatives"), (1, math.inf)),
        "skip": (0, math.inf),
        **dict.fromkeys(("margin", "sampling_temperature"), (1e-6, math.inf)),
        "pixel_start": (0, 1),
        "pixel_ramp": (0, 1),
    }

    weights: dict[str, float] = field(default_factory=dict)
    regions: int = 8
    positives: int = 32
    negatives: int = 64
    sampling: str = "topk"
    skip: int = 0
    margin: float = 0.1
    sampling_temperature: float = 0.07
    reduction: str = "mean_of_log"
    terms: str = "both"
    pixel_start: float = 0.3
    pixel_ramp: float = 0.1


class MGCAObjective(Objective):
    """The losses of this file."""

    Options = MGCATraining
    model: MGCA

    def __init__(self, model: MGCA, options: MGCATraining = MGCATraining()):  # noqa: B008
        super().__init__(model)
        if unknown := set(options.weights) - set(LEVELS):
            raise ConfigError(f"weights names {sorted(unknown)}; expected some of {list(LEVELS)}")
        for name, known in (
            ("sampling", SAMPLINGS),
            ("reduction", ("mean_of_log", "log_of_sum")),
            ("terms", ("both", "text_to_pixel", "pixel_to_text")),
        ):
            if getattr(options, name) not in known:
                raise ConfigError(
                    f"{name} is {getattr(options, name)!r}; expected one of {list(known)}"
                )
        self.options, self.weights = options, dict.fromkeys(LEVELS, 1.0) | options.weights

    def encode(self, batch: PairBatch, progress: Progress) -> Rows:
        return {
            "tokens": self.model(self.images(batch)).tokens,
            "text": self.model.encode_text(batch.token_ids),
        }

    def loss(
        self, rows: Rows, batch: PairBatch, progress: Progress, group: dist.ProcessGroup | None
    ) -> Losses:
        tokens, text, options = (
            at_least_float32(rows["tokens"]),
            at_least_float32(rows["text"]),
            self.options,
        )
        weights = self.weights | {"pixel": self.pixel_weight(progress.share)}
        shared, losses = OneGradient(tokens), {}
        if weights["object"]:
            losses["object"] = image_text_contrast(
                shared.pixels, text, self.model.logit_scale, batch, group, self.model.compatibility
            )
        if weights["region"]:
            units = shared.weighted(
                mean_weights(
                    cluster(tokens.detach(), options.regions), options.regions, tokens.dtype
                )
            )
            losses["region"] = image_text_contrast(
                units, text, self.model.logit_scale, batch, group, best_unit
            )
        if weights["pixel"]:
            losses["pixel"] = self._pixel(shared, text, batch, progress, group)
        total = sum(
            (weights[name] * loss for name, loss in losses.items()),
            start=0.0 * tokens.sum() if not losses else 0.0,
        )
        return {"total": total, **losses}

    def pixel_weight(self, share: float) -> float:
        """w_p of (1) at this share of the stage."""
        start, ramp = self.options.pixel_start, self.options.pixel_ramp
        rise = min(1.0, max(0.0, (share - start) / ramp)) if ramp else float(share >= start)
        return self.weights["pixel"] * rise

    def _pixel(
        self,
        shared: OneGradient,
        text: torch.Tensor,
        batch: PairBatch,
        progress: Progress,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        """(2), in two steps: what is selected, and the loss of those rows.

        Over ranks the pixels travel: the hardest of all are to be found, whatever the sampling.
        Every rank then has the whole loss, and ``gather_rows`` gives each its own rows' gradient
        from all: their mean is that of one process.
        """
        o, pixels, image_ids, text_ids = (
            self.options,
            shared.pixels,
            batch.image_ids,
            batch.text_ids,
        )
        if group is not None:
            pixels, text, image_ids, text_ids = (
                gather_rows(x, group) for x in (pixels, text, image_ids, text_ids)
            )
        noise = (
            replace(progress, rank=0).rng(pixels.device, "negatives")
            if o.sampling in _NOISY
            else None
        )
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
            pixels, image_ids = shared.rows(index), text_ids
            place = (
                torch.arange(index.numel(), device=index.device)
                .view_as(index)
                .masked_fill(index < 0, -1)
            )
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

    def after_step(self, progress: Progress) -> None:
        self.model.limit_logit_scale()


def best_unit(units: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """[B, T], the largest cosine of a text with a picture's ``units`` [B, R, D]."""
    return ok.patch_text_similarity(units, text, pool="max")
