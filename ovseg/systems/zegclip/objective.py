"""ZegCLIP's objective: the mask of every class, present or not, by focal loss and dice.

Zhou et al., arXiv:2212.03588.

    N = max(1, sum over pictures of the number of classes that are labelled in them)             (1)
    focal = w_f / N sum_bc focal_bc          over all classes, those of no pixel too             (2)
    dice  = w_d / N sum_bc present_bc dice_bc                                                    (3)

A pixel without a label is a negative for every class, as published: what lies in no class belongs
to none. There are three settings:

    inductive      masks of the seen classes; pixels of the unseen are without a label
    transductive   masks of all classes; pixels of the unseen get the most probable unseen class of
                   the model's own maps: self-training
    supervised     masks of all classes as they are labelled

No map of the pictures' size exists: ``ovseg_kernels.upsample_mask_loss`` and ``upsample_argmax``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

import ovseg_kernels as ok

from ...bounds import bounded
from ...data.batches import MaskBatch
from ...data.class_lists import class_list, read_class_embeddings
from ...errors import ConfigError, InputError
from ..objective import Losses, Objective, Progress, Ranks, Rows
from .model import ZegCLIP

_NONE = -1  # no class's pixel


@dataclass
class ZegCLIPTraining:
    """Options of the objective.

    Attributes:
        setting: inductive, transductive, supervised.
        classes: of the masks: a data set's name (``voc20``, ``digits``), or their names in order.
        unseen: names; None: those that the data set names.
        templates: prompt templates of the classes; the model's own if None.
        class_embeddings: a ``.npy`` file [C, E] in place of the text tower, such as the published
            ones.
        focal, dice: weights of the losses; early configurations of the published code have 20 for
            the first.
        alpha, gamma: of the focal loss.
    """

    setting: str = bounded("inductive", one_of=("inductive", "transductive", "supervised"))
    classes: Any = "digits"
    unseen: list[str] | None = None
    templates: Any = None
    class_embeddings: str | None = None
    focal: float = bounded(100.0, low=0)
    dice: float = bounded(1.0, low=0)
    alpha: float = bounded(0.25, low=0, high=1)
    gamma: float = bounded(2.0, low=0)


class ZegCLIPObjective(Objective):
    """The losses (2) and (3). The text tower runs once, here."""

    Options = ZegCLIPTraining
    batch_types = (MaskBatch,)
    takes_features = True
    model: ZegCLIP
    class_texts: Tensor
    target: Tensor
    unseen: Tensor

    def __init__(self, model: ZegCLIP, options: ZegCLIPTraining | None = None):
        super().__init__(model)
        options = options or ZegCLIPTraining()
        self.options = options
        self.classes = class_list(options.classes, options.unseen)
        names = self.classes.names
        seen = self.classes.seen_ids
        unseen = self.classes.unseen_ids
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
        self.register_buffer("class_texts", texts[seen] if inductive else texts, persistent=False)
        self.register_buffer("target", target.to(device), persistent=False)
        self.register_buffer(
            "unseen", torch.tensor(unseen, dtype=torch.int64, device=device), persistent=False
        )

    @torch.no_grad()
    def _texts(self) -> Tensor:
        """Return the embeddings of the classes [C, E]."""
        path = self.options.class_embeddings
        texts = self.classes.texts
        if path is not None:
            try:
                return read_class_embeddings(path, len(texts), self.model.spec.embed_dim)
            except InputError as error:
                raise ConfigError(str(error)) from error
        templates = self.options.templates
        if isinstance(templates, list):
            templates = tuple(templates)
        return self.model.encode_labels(texts, templates)

    @override
    def check_source(self, source: Any) -> None:
        given = getattr(source, "classes", None)
        if given is not None and tuple(given) != self.classes.names:
            own = self.classes.names
            raise ConfigError(
                f"data gives {len(given)} classes ({', '.join(given[:3])}, ...) and "
                f"objective.options.classes {len(own)} ({', '.join(own[:3])}, ...); expected the "
                "same in the same order"
            )

    @override
    def encode(self, batch: MaskBatch, progress: Progress) -> Rows:
        with progress.seeded(batch.masks.device, "dropout", on=self.training):
            return {"logits": self.model.segment_logits(self.encoded(batch), self.class_texts)}

    @override
    def loss(self, rows: Rows, batch: MaskBatch, progress: Progress, group: Ranks) -> Losses:
        logits = rows["logits"]
        size = (batch.masks.shape[1], batch.masks.shape[2])
        o = self.options
        labels = self.labels(logits, batch)
        focal, dice, present = ok.upsample_mask_loss(logits, labels, alpha=o.alpha, gamma=o.gamma)
        sums = torch.stack([o.focal * focal.sum(), o.dice * (dice * present).sum()])
        hits = (ok.upsample_argmax(_numbers(logits), size) == labels).sum()
        counts = torch.stack([present.sum(), hits, (labels != _NONE).sum()]).to(sums.dtype)
        if group is None:
            losses = sums / counts[0].clamp(min=1)
        else:
            # Of the whole batch; the mean over ranks of the gradients is then that of one process.
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
    def labels(self, logits: Tensor, batch: MaskBatch) -> Tensor:
        """Return what each pixel is to be, [B, H, W]: a row of ``class_texts``, or -1.

        In self-training ``logits`` say it where a class is unseen.
        """
        masks = batch.masks
        C = len(self.target)
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
        size = (masks.shape[1], masks.shape[2])
        own = ok.upsample_argmax(_numbers(logits)[:, self.unseen], size, class_labels=self.unseen)
        hidden = torch.zeros(C, dtype=torch.bool, device=masks.device)
        hidden = hidden.index_fill(0, self.unseen, True)
        return torch.where(hidden[index] & known, own, labels)


def _numbers(logits: Tensor) -> Tensor:
    """Replace NaN, which the argmax would refuse.

    Training has its own way with losses that are not finite.
    """
    return logits.detach().nan_to_num()
