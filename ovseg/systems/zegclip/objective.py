"""ZegCLIP's objective: the mask of every class, present or not, by focal loss and dice.

Zhou et al., arXiv:2212.03588.

    N = max(1, sum over pictures of the number of classes that are labelled in them)             (1)
    focal = w_f / N sum_bc focal_bc          over all classes, those of no pixel too             (2)
    dice  = w_d / N sum_bc present_bc dice_bc                                                    (3)

A pixel without a label is a negative for every class, as published: what lies in no class belongs
to none. Three settings:

inductive      masks of the seen classes; pixels of the unseen are without a label
transductive   masks of all classes; pixels of the unseen get the most probable unseen class of the model's own maps: self-training
supervised     masks of all classes as they are labelled

No map of the pictures' size exists: ``ovseg_kernels.upsample_mask_loss`` and ``upsample_argmax``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

import ovseg_kernels as ok

from ...data.batches import MaskBatch
from ...data.class_lists import class_list, read_class_embeddings
from ...errors import ConfigError, InputError
from ..objective import Losses, Objective, Progress, Rows
from .model import ZegCLIP

SETTINGS = ("inductive", "transductive", "supervised")
_NONE = -1  # no class's pixel


@dataclass
class ZegCLIPTraining:
    """Attributes:
    setting: inductive, transductive, supervised.
    classes: of the masks: a data set's name (``voc20``, ``digits``), or their names in order.
    unseen: names; None: those that the data set names.
    templates: prompt templates of the classes; the model's own if None.
    class_embeddings: a ``.npy`` file [C, E] in place of the text tower, such as the published ones.
    focal, dice: weights of the losses; early configurations of the published code have 20 for the
        first.
    alpha, gamma: of the focal loss.
    """

    ends: ClassVar[dict[str, tuple[float, float]]] = {
        "focal": (0, math.inf),
        "dice": (0, math.inf),
        "alpha": (0, 1),
        "gamma": (0, math.inf),
    }

    setting: str = "inductive"
    classes: Any = "digits"
    unseen: list[str] | None = None
    templates: Any = None
    class_embeddings: str | None = None
    focal: float = 100.0
    dice: float = 1.0
    alpha: float = 0.25
    gamma: float = 2.0


class ZegCLIPObjective(Objective):
    """The losses of this file. The text tower runs once, here."""

    Options = ZegCLIPTraining
    batch_type = MaskBatch
    model: ZegCLIP
    texts: torch.Tensor
    target: torch.Tensor
    unseen: torch.Tensor

    def __init__(self, model: ZegCLIP, options: ZegCLIPTraining = ZegCLIPTraining()):  # noqa: B008
        super().__init__(model)
        if options.setting not in SETTINGS:
            raise ConfigError(f"setting is {options.setting!r}; expected one of {list(SETTINGS)}")
        self.options, self.classes = options, class_list(options.classes, options.unseen)
        names, seen, unseen = self.classes.names, self.classes.seen_ids, self.classes.unseen_ids
        if options.setting != "supervised" and not seen:
            raise ConfigError(
                f"unseen names all {len(names)} classes; expected at least one that is seen, or "
                "setting supervised"
            )
        if options.setting == "transductive" and not unseen:
            raise ConfigError(
                "setting is 'transductive' and no class is unseen; expected unseen classes, or "
                "setting supervised"
            )
        inductive = options.setting == "inductive"
        device = next(model.parameters()).device
        texts = self._texts().to(device)
        target = torch.full((len(names),), _NONE) if inductive else torch.arange(len(names))
        if inductive:
            target[seen] = torch.arange(len(seen))
        self.register_buffer("texts", texts[seen] if inductive else texts, persistent=False)
        self.register_buffer("target", target.to(device), persistent=False)
        self.register_buffer(
            "unseen", torch.tensor(unseen, dtype=torch.int64, device=device), persistent=False
        )

    @torch.no_grad()
    def _texts(self) -> torch.Tensor:
        """[C, E], once for the whole training."""
        path, texts = self.options.class_embeddings, self.classes.texts
        if path is not None:
            try:
                return read_class_embeddings(path, len(texts), self.model.spec.embed_dim)
            except InputError as error:
                raise ConfigError(str(error)) from error
        templates = self.options.templates
        return self.model.encode_labels(
            texts, tuple(templates) if isinstance(templates, list) else templates
        )

    def check_source(self, source: Any) -> None:
        given = getattr(source, "classes", None)
        if given is not None and tuple(given) != self.classes.names:
            raise ConfigError(
                f"data gives {len(given)} classes ({', '.join(given[:3])}, ...) and "
                "objective.options.classes "
                f"{len(self.classes.names)} ({', '.join(self.classes.names[:3])}, ...); expected "
                "the same in the same order"
            )

    def encode(self, batch: MaskBatch, progress: Progress) -> Rows:
        images = self.images(batch)
        with progress.seeded(images.device, "dropout", on=self.training):
            return {"logits": self.model.segment_logits(self.model(images), self.texts)}

    def loss(
        self, rows: Rows, batch: MaskBatch, progress: Progress, group: dist.ProcessGroup | None
    ) -> Losses:
        logits, size, options = (
            rows["logits"],
            (batch.masks.shape[1], batch.masks.shape[2]),
            self.options,
        )
        labels = self.labels(logits, batch)
        focal, dice, present = ok.upsample_mask_loss(
            logits, labels, alpha=options.alpha, gamma=options.gamma
        )
        sums = torch.stack([options.focal * focal.sum(), options.dice * (dice * present).sum()])
        hits = (ok.upsample_argmax(_numbers(logits), size) == labels).sum()
        counts = torch.stack([present.sum(), hits, (labels != _NONE).sum()]).to(sums.dtype)
        if group is None:
            losses = sums / counts[0].clamp(min=1)
        # of the whole batch; the mean over ranks of the gradients is then that of one process
        else:
            whole = torch.cat([sums.detach(), counts])
            dist.all_reduce(whole, group=group)
            counts = whole[2:]
            share = dist.get_world_size(group) * sums / counts[0].clamp(min=1)
            losses = share + (whole[:2] / counts[0].clamp(min=1) - share).detach()
        return {
            "total": losses.sum(),
            "focal": losses[0],
            "dice": losses[1],
            "accuracy": 100 * counts[1] / counts[2].clamp(min=1),
        }

    @torch.no_grad()
    def labels(self, logits: torch.Tensor, batch: MaskBatch) -> torch.Tensor:
        """What each pixel is to be, [B, H, W]: a row of ``texts``, or -1; in self-training
        ``logits`` say it where a class is unseen.
        """
        masks, C = batch.masks, len(self.target)
        known = (masks >= 0) & (masks < C)
        if masks.device.type == "cpu" and not bool((known | (masks == batch.ignore_index)).all()):
            bad = int(masks[~known & (masks != batch.ignore_index)][0])
            raise InputError(
                f"batch.masks holds {bad}; expected 0 to {C - 1}, or {batch.ignore_index} where "
                "there is no label"
            )
        index = masks.clamp(0, C - 1)
        labels = self.target[index].masked_fill(~known, _NONE)
        if self.options.setting != "transductive":
            return labels
        own = ok.upsample_argmax(
            _numbers(logits)[:, self.unseen],
            (masks.shape[1], masks.shape[2]),
            class_labels=self.unseen,
        )
        hidden = torch.zeros(C, dtype=torch.bool, device=masks.device).index_fill(
            0, self.unseen, True
        )
        return torch.where(hidden[index] & known, own, labels)


def _numbers(logits: torch.Tensor) -> torch.Tensor:
    """Without NaN, which the argmax would refuse: training has its own way with losses that are not
    finite.
    """
    return logits.detach().nan_to_num()
