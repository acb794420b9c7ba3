"""GroupViT's objective: the contrast of pictures with captions, and with the nouns of captions.

Xu et al., arXiv:2202.11094.

    total = contrastive + w multi_label                                                          (1)

Multi-label contrast: K prompted nouns of a caption are texts of its picture, all of them positives,

    1/2 (mean_i of -1/K sum_k log p(noun_ik | i) + mean_ik of -log p(i | noun_ik))               (2)

over all nouns and pictures of the batch, with a temperature of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

import ovseg_kernels as ok

from ...bounds import bounded
from ...data.batches import NounBatch, PairBatch
from ...errors import ConfigError
from ...nn.tensors import at_least_float32
from ..contrast import image_text_contrast
from ..grouping import TEXTS, group_noises
from ..objective import Losses, Objective, Progress, Ranks, Rows
from .model import GroupViT


@dataclass
class GroupViTTraining:
    """Options of the objective.

    Attributes:
        multi_label: w of (1); 0 switches it off. It needs ``noun_ids`` in the batch and a model
            with ``multi_label``.
    """

    multi_label: float = bounded(0.0, low=0)


class GroupViTObjective(Objective):
    """The losses of (1).

    ``batch.noise`` may hold ``groups_0`` and ``groups_1``, Gumbel noise of the grouping blocks [B,
    G, L]; what it does not hold is drawn. Projectors run in ``loss``, over the whole batch: their
    statistics do not depend on chunks.
    """

    Options = GroupViTTraining
    on_host = TEXTS
    model: GroupViT

    def __init__(self, model: GroupViT, options: GroupViTTraining | None = None):
        super().__init__(model)
        options = options or GroupViTTraining()
        if options.multi_label and model.noun_scale is None:
            raise ConfigError(
                f"multi_label is {options.multi_label} and {model.name} has no temperature for "
                "nouns; expected a model with multi_label=true (model.options in a recipe)"
            )
        self.multi_label = options.multi_label
        self.batch_types = (NounBatch if options.multi_label else PairBatch,)  # type: ignore[misc]

    @override
    def encode(self, batch: PairBatch, progress: Progress) -> Rows:
        texts = [batch.token_ids]
        if self.multi_label:
            texts.append(batch.noun_ids.flatten(0, 1))  # type: ignore[attr-defined]
        found = self.model.text.encode_together(texts)
        noises = group_noises(self.model, batch, progress)
        image = self.model.image(self.images(batch), noises).pooled
        rows = {"image": image, "text": found[0].sentence}
        if self.multi_label:
            rows["nouns"] = found[1].sentence.unflatten(0, (len(batch), -1))
        return rows

    @override
    def loss(self, rows: Rows, batch: PairBatch, progress: Progress, group: Ranks) -> Losses:
        model = self.model
        image = model.image_projector(rows["image"], group)
        text = model.text_projector(rows["text"], group)
        losses = {"contrastive": image_text_contrast(image, text, model.logit_scale, batch, group)}
        total = at_least_float32(losses["contrastive"])
        if self.multi_label:
            nouns = model.text_projector(rows["nouns"], group)
            scale = model.noun_scale
            assert scale is not None
            losses["multi_label"] = ok.contrastive_loss(
                at_least_float32(image),
                at_least_float32(nouns).flatten(0, 1),
                scale,
                image_ids=batch.image_ids,
                text_ids=batch.image_ids.repeat_interleave(nouns.shape[1]),
                group=group,
            )
            total = total + self.multi_label * at_least_float32(losses["multi_label"])
        return {"total": total, **losses}
