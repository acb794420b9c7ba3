"""OVSegmentor's objective, both stages. Xu et al., arXiv:2301.09121.

    total = w_c contrastive + w_e entity + w_m mask

Entity: a caption with its entities masked looks at the picture's groups; what is read at its [CLS]
    should be the text that names the
entities, among those of all pictures. Mask: the groups of a picture, by their queries, mark on
another picture that shares an entity what the groups of that picture mark there themselves,
``mask_consistency.py``; keys and targets are a teacher's, an average of the image tower over the
steps, which stops where they are there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ...data.batches import CrossEntityBatch, EntityBatch, PairBatch
from ...errors import ConfigError, InputError
from ...nn.tensors import at_least_float32
from ..contrast import image_text_contrast, mean_of_rows, sum_of_rows
from ..grouping import TEXTS, group_noises
from ..objective import Losses, Objective, Progress, Rows
from .mask_consistency import mask_consistency
from .model import OVSegmentor

LOSSES = ("contrastive", "entity", "mask")
PADDING = ("packed", "published")


@dataclass
class OVSegmentorTraining:
    """Attributes: weights: of the losses, 1, 1 and 0.1 as published; 0 switches one off.

    ``entity`` is there from the model's stage 1 on, ``mask`` in its stage 2. padding: packed:
    padding is not computed, and the decoder of entities does not look at it. published: it is, as
    published training did: the decoder looks at it, and the projectors' running statistics take in
    every token and all that the teacher gives. momentum: of the teacher. teacher: copy: it begins
    as the image tower; keep: as it is. mask_ratio: share of a map's largest value above which a
    pixel is marked. spared: share of the groups, those least like the shared entity, that the mask
    loss does not train. mask_scale: how many times finer than the patches the masks are compared;
    16 as published. mask_batch: the mask loss is (mask_batch / groups) times the mean dice. As
    published it is the sum over the pictures of one process divided by the groups, averaged over
    processes: 128. None: the pictures of the whole batch.
    """

    ends: ClassVar[dict[str, tuple[float, float]]] = {
        "weights": (0, math.inf),
        "momentum": (0, 1),
        "mask_ratio": (0, 1),
        "spared": (0, 1),
        "mask_scale": (1, math.inf),
        "mask_batch": (1, math.inf),
    }

    weights: dict[str, float] = field(default_factory=dict)
    padding: str = "packed"
    momentum: float = 0.99
    teacher: str = "copy"
    mask_ratio: float = 0.6
    spared: float = 0.5
    mask_scale: int = 16
    mask_batch: int | None = None


class OVSegmentorObjective(Objective):
    """The losses of this file.

    ``batch.noise`` may hold ``groups_0`` and, with ``padding=published``, ``teacher_0``, Gumbel
    noise [B, G, L]; what it does not hold is drawn. Projectors run in ``loss``, over the whole
    batch.
    """

    Options = OVSegmentorTraining
    on_host = TEXTS
    model: OVSegmentor

    def __init__(self, model: OVSegmentor, options: OVSegmentorTraining = OVSegmentorTraining()):  # noqa: B008
        super().__init__(model)
        there = {
            "contrastive": True,
            "entity": model.entities is not None,
            "mask": model.teacher is not None,
        }
        unknown = set(options.weights) - set(LOSSES)
        if unknown:
            raise ConfigError(f"weights names {sorted(unknown)}; expected some of {list(LOSSES)}")
        lacking = [name for name, weight in options.weights.items() if weight and not there[name]]
        if lacking:
            raise ConfigError(
                f"weights gives {lacking[0]} a weight and {model.name} is built for stage "
                f"{model.options.stage}; expected "
                f"model.options.stage={LOSSES.index(lacking[0])} or more"
            )
        if options.padding not in PADDING or options.teacher not in ("copy", "keep"):
            raise ConfigError(
                f"padding is {options.padding!r} and teacher {options.teacher!r}; expected one of "
                f"{list(PADDING)} and of "
                "['copy', 'keep']"
            )
        self.options = options
        self.weights = {
            name: float(there[name]) * usual
            for name, usual in zip(LOSSES, (1.0, 1.0, 0.1), strict=True)
        } | options.weights
        kinds = {"mask": CrossEntityBatch, "entity": EntityBatch, "contrastive": PairBatch}
        self.batch_type = next(kind for name, kind in kinds.items() if self.weights[name])  # type: ignore[misc]
        if there["entity"] and not self.weights["entity"]:
            model.train_parts([part for part in model.options.trained if part != "entities"])
        if self.weights["mask"] and options.teacher == "copy":
            model.start_teacher()

    def encode(self, batch: Any, progress: Progress) -> Rows:
        model, entity, mask, published = (
            self.model,
            self.weights["entity"],
            self.weights["mask"],
            self.options.padding == "published",
        )
        texts = {"text": batch.token_ids}
        texts |= {"question": batch.question_ids, "answer": batch.answer_ids} if entity else {}
        texts |= {"prompt": batch.entity_token_ids} if mask else {}
        counts = {name: len(ids) for name, ids in texts.items() if name != "text"}
        if any(count != len(batch) for count in counts.values()):
            raise InputError(
                f"the batch has {len(batch)} pictures and {counts}; expected one each a picture"
            )
        states = dict(
            zip(
                texts, model.text.encode_together(list(texts.values()), pads=published), strict=True
            )
        )
        images = self.images(batch)
        found = model.image(images, group_noises(model, batch, progress))
        rows = {"image": found.pooled, "groups": found.groups}
        rows |= {name: state.sentence for name, state in states.items()}
        if published:
            rows |= {f"{name}_tokens": state.padded()[0].detach() for name, state in states.items()}
        if entity:
            assert model.entities is not None
            tokens, seen = states["question"].padded()
            rows["completed"] = model.entities(tokens, found.groups, None if published else seen)
        if mask:
            assert model.teacher is not None
            partner = (
                batch.partner
                if batch.partner.is_floating_point()
                else model.normalize(batch.partner)
            )
            with torch.no_grad():
                if published:
                    whole = model.teacher(partner, group_noises(model, batch, progress, "teacher"))
                    rows |= {"teacher": whole.pooled, "teacher_groups": whole.groups}
                queries, patches = model.teacher.first_centers(partner)
                rows["target"] = at_least_float32(
                    model.teacher.groupings[0].scores(queries, patches)
                )
            rows["marked"] = at_least_float32(
                model.teacher.groupings[0].scores(found.stages[0].queries, patches)
            )
        return rows

    def loss(
        self, rows: Rows, batch: Any, progress: Progress, group: dist.ProcessGroup | None
    ) -> Losses:
        model = self.model
        projected = {"image": model.image_projector(rows["image"], group)}
        # Windows are labelled by projected groups: their statistics belong into the running ones,
        # as in published training.
        with torch.no_grad():
            groups = model.image_projector(rows["groups"], group)
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
        scale = model.logit_scale
        losses = {}
        if self.weights["contrastive"]:
            losses["contrastive"] = image_text_contrast(
                projected["image"], projected["text"], scale, batch, group
            )
        if self.weights["entity"]:
            assert model.bridge_projector is not None
            completed = model.bridge_projector(rows["completed"], group)
            answers = replace(batch, text_ids=batch.image_ids, text_entities=batch.answer_entities)
            losses["entity"] = image_text_contrast(
                completed, projected["answer"], scale, answers, group
            )
        if self.weights["mask"]:
            losses["mask"] = self._mask(
                rows, groups, projected["prompt"], model.image.grid(batch.partner.shape[2:]), group
            )
        total = torch.stack(
            [self.weights[name] * at_least_float32(loss) for name, loss in losses.items()]
        ).sum()
        return {"total": total, **losses}

    def after_step(self, progress: Progress) -> None:
        if self.weights["mask"]:
            self.model.move_teacher(self.options.momentum)

    def _mask(
        self,
        rows: Rows,
        groups: torch.Tensor,
        prompt: torch.Tensor,
        grid: tuple[int, int],
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        """(mask_batch / groups) times the mean dice, without the gradient of the groups that are
        least like the shared entity.
        """
        marked, options = rows["marked"], self.options
        G = marked.shape[1]
        alike = (at_least_float32(groups) * at_least_float32(prompt)[:, None]).sum(-1)
        least = alike.topk(int(options.spared * G), largest=False).indices
        spared = torch.zeros_like(alike, dtype=torch.bool).scatter_(1, least, True)
        marked = torch.where(spared[..., None], marked.detach(), marked)
        size = (options.mask_scale * grid[0], options.mask_scale * grid[1])
        with torch.autocast(marked.device.type, enabled=False):
            dice, _ = mask_consistency(
                marked.unflatten(2, grid),
                rows["target"].unflatten(2, grid),
                size,
                options.mask_ratio,
            )
        if options.mask_batch is None:
            return sum_of_rows(dice, group) / G
        return mean_of_rows(dice, group) * options.mask_batch / G
