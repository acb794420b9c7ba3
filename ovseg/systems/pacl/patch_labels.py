"""Patches taught by masks: what weak supervision can be measured against.

    p_nj   = softmax_j(lambda c_nj) over the words of the classes and those of stuff             (1)
    L      = mean_i sum_nc s_inc (-log sum_{j in c} p_nj) / sum_nc s_inc                         (2)

c_nj is the cosine of patch n and word j, lambda the logit scale, s_inc the labelled pixels of patch
n of picture i that are of class c: the mean cross-entropy of the pixels, each of which gets the
probabilities of its patch. A class has one word, the background those of stuff.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.batches import MaskBatch
from ...data.class_lists import class_list
from ...errors import ConfigError, InputError
from ...nn.features import Grid

_BACKGROUND = "background"


class PatchClasses:
    """The classes of masks, and the words that stand for them.

    Args:
        classes: a data set's name, or names in the order of the labels.
        stuff: token ids [S, L] of the words of the background.
        tokenizer: of the model.

    Attributes:
        names: of the classes.
        token_ids: [W, L].
        own: of each class the numbers of its words.

    Raises:
        ConfigError: for classes that the model does not know, and a background without words.
    """

    def __init__(self, classes: Any, stuff: Tensor, tokenizer: Any):
        found = class_list(classes)
        self.names = found.names
        named = [i for i, name in enumerate(found.names) if name != _BACKGROUND]
        texts = [found.texts[i] for i in named]
        ask: Callable[[str], list[str]] = getattr(tokenizer, "unknown", lambda text: [])
        if unknown := [text for text in texts if ask(text)]:
            raise ConfigError(
                f"objective.options.classes has {unknown[0]!r}, which the model does not know; "
                "expected words of its vocabulary"
            )
        C = len(found.names)
        rows = len(stuff) if len(named) < C else 0
        if len(named) < C and not rows:
            raise ConfigError(
                f"objective.options.classes is {classes!r}, which has a background, and "
                "objective.options.stuff is empty; expected words that stand for it"
            )
        ids = tokenizer(texts)
        longest = max(ids.shape[1], stuff.shape[1] if rows else 0)
        parts = [ids, stuff] if rows else [ids]
        self.token_ids = torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])
        numbers = {name: slice(i, i + 1) for i, name in enumerate(found.names[k] for k in named)}
        numbers[_BACKGROUND] = slice(len(named), None)
        self.own = [numbers[name] for name in found.names]


def labelled_pixels(batch: MaskBatch, grid: Grid, classes: int) -> Tensor:
    """Return s_inc of (2), [B, N, C] float32, on the device of the masks.

    Raises:
        InputError: for a label that is no class.
    """
    masks = batch.masks
    B, H, W = masks.shape
    h, w = grid
    known = (masks >= 0) & (masks < classes)
    bad = masks[~known & (masks != batch.ignore_index)]
    if bad.numel():
        raise InputError(
            f"batch.masks holds {int(bad[0])}; expected 0 to {classes - 1}, or "
            f"{batch.ignore_index} where there is no label"
        )
    rows = torch.arange(H, device=masks.device) * h // H
    columns = torch.arange(W, device=masks.device) * w // W
    patch = rows[:, None] * w + columns
    picture = torch.arange(B, device=masks.device)[:, None, None] * (h * w)
    place = (picture + patch) * classes + masks
    counts = torch.bincount(place[known], minlength=B * h * w * classes)
    return counts.view(B, h * w, classes).float()


def patch_loss(scores: Tensor, pixels: Tensor, own: Sequence[slice], scale: Tensor) -> Tensor:
    """Return the inner sum of (2) for each picture, [B]; 0 for one without a labelled pixel.

    Args:
        scores: cosines c [B, N, W].
        pixels: s [B, N, C].
        own: see ``PatchClasses``.
        scale: lambda.
    """
    logs = (scale * scores).log_softmax(2)  # (1)
    parts = [logs[:, :, words].logsumexp(2) for words in own]
    of_class = torch.stack(parts, 2)
    counted = pixels.sum((1, 2)).clamp(min=1)
    return -(pixels.to(of_class) * of_class).sum((1, 2)) / counted
