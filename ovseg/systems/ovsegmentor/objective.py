"""OVSegmentor's objective, both stages (Xu et al., arXiv:2301.09121).

    total = w_c contrastive + w_e entity + w_m mask                                              (1)

Entity: a caption with its entities masked looks at the picture's groups; what is read at its [CLS]
should be the text that names the entities, among those of all pictures.

Mask: the groups of a picture, by their queries, mark on another picture that shares an entity what
the groups of that picture mark there themselves (``mask_consistency.py``). Keys and targets are a
teacher's, an average of the image tower over the steps, which stops where they are there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ...bounds import bounded
from ...data.batches import CrossEntityBatch, EntityBatch, PairBatch
from ...errors import ConfigError, InputError
from ...nn.features import Grid
from ...nn.tensors import at_least_float32
from ..contrast import image_text_contrast, mean_of_rows, sum_of_rows
from ..grouping import TEXTS, group_noises
from ..objective import Losses, Objective, Progress, Ranks, Rows, loss_weights
from .mask_consistency import mask_consistency
from .model import OVSegmentor

LOSSES = {"contrastive": 1.0, "entity": 1.0, "mask": 0.1}  # and their weights as published
_BATCHES = {"mask": CrossEntityBatch, "entity": EntityBatch, "contrastive": PairBatch}


@dataclass
class OVSegmentorTraining:
    """Options of the objective.

    Attributes:
        weights: of the losses, 1, 1 and 0.1 as published; 0 switches one off. ``entity`` is there
            from the model's stage 1 on, ``mask`` in its stage 2.
        padding: ``packed``: padding is not computed, and the decoder of entities does not look at
            it. ``published``: it is, as published training did: the decoder looks at it, and the
            projectors' running statistics take in every token and all that the teacher gives.
        momentum: of the teacher.
        teacher: ``copy``: it begins as the image tower; ``keep``: as it is.
        mask_ratio: share of a map's largest value above which a pixel is marked.
        spared: share of the groups, those least like the shared entity, that the mask loss does
            not train.
        mask_scale: how many times finer than the patches the masks are compared; 16 as published.
        mask_batch: the mask loss is (mask_batch / groups) times the mean dice. As published it is
            the sum over the pictures of one process divided by the groups, averaged over
            processes: 128. None: the pictures of the whole batch.
    """

    weights: dict[str, float] = bounded(default_factory=dict, low=0)
    padding: str = bounded("packed", one_of=("packed", "published"))
    momentum: float = bounded(0.99, low=0, high=1)
    teacher: str = bounded("copy", one_of=("copy", "keep"))
    mask_ratio: float = bounded(0.6, low=0, high=1)
    spared: float = bounded(0.5, low=0, high=1)
    mask_scale: int = bounded(16, low=1)
    mask_batch: int | None = bounded(None, low=1)


class OVSegmentorObjective(Objective):
    """The losses of (1).

    ``batch.noise`` may hold ``groups_0`` and, with ``padding=published``, ``teacher_0``, Gumbel
    noise [B, G, L]; what it does not hold is drawn. Projectors run in ``loss``, over the whole
    batch.
    """

    Options = OVSegmentorTraining
    on_host = TEXTS
    model: OVSegmentor

    def __init__(self, model: OVSegmentor, options: OVSegmentorTraining | None = None):
        super().__init__(model)
        options = options or OVSegmentorTraining()
        there = {
            "contrastive": True,
            "entity": model.entities is not None,
            "mask": model.teacher is not None,
        }
        usual = {name: float(there[name]) * weight for name, weight in LOSSES.items()}
        self.options = options
        self.weights = loss_weights(options.weights, usual)
        lacking = [name for name, weight in self.weights.items() if weight and not there[name]]
        if lacking:
            raise ConfigError(
                f"weights gives {lacking[0]} a weight and {model.name} is built for stage "
                f"{model.options.stage}; expected "
                f"model.options.stage={list(LOSSES).index(lacking[0])} or more"
            )
        batch_type = next(kind for name, kind in _BATCHES.items() if self.weights[name])
        self.batch_types = (batch_type,)  # type: ignore[misc]
        if there["entity"] and not self.weights["entity"]:
            model.train_parts([part for part in model.options.trained if part != "entities"])
        if self.weights["mask"] and options.teacher == "copy":
            model.start_teacher()

    @override
    def encode(self, batch: Any, progress: Progress) -> Rows:
        model = self.model
        published = self.options.padding == "published"
        texts = {"text": batch.token_ids}
        if self.weights["entity"]:
            texts |= {"question": batch.question_ids, "answer": batch.answer_ids}
        if self.weights["mask"]:
            texts["prompt"] = batch.entity_token_ids
        counts = {name: len(ids) for name, ids in texts.items() if name != "text"}
        if any(count != len(batch) for count in counts.values()):
            raise InputError(
                f"the batch has {len(batch)} pictures and {counts}; expected one each a picture"
            )
        together = model.text.encode_together(list(texts.values()), pads=published)
        states = dict(zip(texts, together, strict=True))
        found = model.image(self.images(batch), group_noises(model, batch, progress))
        rows = {"image": found.pooled, "groups": found.groups}
        rows |= {name: state.sentence for name, state in states.items()}
        if published:
            rows |= {f"{name}_tokens": state.padded()[0].detach() for name, state in states.items()}
        if self.weights["entity"]:
            assert model.entities is not None
            tokens, seen = states["question"].padded()
            rows["completed"] = model.entities(tokens, found.groups, None if published else seen)
        if self.weights["mask"]:
            rows |= self._marks(batch, found.stages[0].queries, progress)
        return rows

    def _marks(self, batch: Any, queries: Tensor, progress: Progress) -> Rows:
        """Return what a picture's groups, by their queries, and the partner's own mark there."""
        model = self.model
        teacher = model.teacher
        assert teacher is not None
        partner = batch.partner
        if not partner.is_floating_point():
            partner = model.normalize(partner)
        rows = {}
        with torch.no_grad():
            if self.options.padding == "published":
                whole = teacher(partner, group_noises(model, batch, progress, "teacher"))
                rows = {"teacher": whole.pooled, "teacher_groups": whole.groups}
            own, patches = teacher.first_centers(partner)
            rows["target"] = at_least_float32(teacher.groupings[0].scores(own, patches))
        rows["marked"] = at_least_float32(teacher.groupings[0].scores(queries, patches))
        return rows

    @override
    def loss(self, rows: Rows, batch: Any, progress: Progress, group: Ranks) -> Losses:
        model = self.model
        scale = model.logit_scale
        projected = self._projected(rows, group)
        text = projected["text"]
        losses = {}
        if self.weights["contrastive"]:
            image = projected["image"]
            losses["contrastive"] = image_text_contrast(image, text, scale, batch, group)
        if self.weights["entity"]:
            assert model.bridge_projector is not None
            completed = model.bridge_projector(rows["completed"], group)
            answers = replace(batch, text_ids=batch.image_ids, text_entities=batch.answer_entities)
            losses["entity"] = image_text_contrast(
                completed, projected["answer"], scale, answers, group
            )
        if self.weights["mask"]:
            grid = model.image.grid(batch.partner.shape[2:])
            losses["mask"] = self._mask(rows, projected, grid, group)
        total = torch.stack(
            [self.weights[name] * at_least_float32(loss) for name, loss in losses.items()]
        ).sum()
        return {"total": total, **losses}

    def _projected(self, rows: Rows, group: Ranks) -> Rows:
        """Return the projections that losses compare.

        All that published training projected goes through, for the running statistics.
        """
        model = self.model
        projected = {"image": model.image_projector(rows["image"], group)}
        # Windows are labelled by projected groups: their statistics belong into the running ones,
        # as in published training.
        with torch.no_grad():
            projected["groups"] = model.image_projector(rows["groups"], group)
            for name in ("teacher", "teacher_groups"):
                if name in rows:
                    model.image_projector(rows[name], group)
        for name in ("text", "question", "answer", "prompt"):
            tokens = rows.get(f"{name}_tokens")
            if name in rows and (name != "question" or tokens is not None):
                with torch.set_grad_enabled(torch.is_grad_enabled() and name in ("text", "answer")):
                    projected[name] = model.text_projector(rows[name], group)
            if tokens is not None:
                with torch.no_grad():
                    model.text_projector(tokens, group)
        return projected

    @override
    def after_step(self, progress: Progress) -> None:
        if self.weights["mask"]:
            self.model.move_teacher(self.options.momentum)

    def _mask(self, rows: Rows, projected: Rows, grid: Grid, group: Ranks) -> Tensor:
        """Return (mask_batch / groups) times the mean dice.

        The groups that are least like the shared entity get no gradient.
        """
        options = self.options
        marked = rows["marked"]
        G = marked.shape[1]
        groups = at_least_float32(projected["groups"])
        alike = (groups * at_least_float32(projected["prompt"])[:, None]).sum(-1)
        least = alike.topk(int(options.spared * G), largest=False).indices
        spared = torch.zeros_like(alike, dtype=torch.bool).scatter_(1, least, True)
        marked = torch.where(spared[..., None], marked.detach(), marked)
        size = (options.mask_scale * grid[0], options.mask_scale * grid[1])
        with torch.autocast(marked.device.type, enabled=False):
            target = rows["target"].unflatten(2, grid)
            dice, _ = mask_consistency(marked.unflatten(2, grid), target, size, options.mask_ratio)
        if options.mask_batch is None:
            return sum_of_rows(dice, group) / G
        return mean_of_rows(dice, group) * options.mask_batch / G
