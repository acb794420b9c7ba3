"""PACL's objective: the contrast by the compatibility of every text with every picture's patches.

    L = L_contrast + w L_self                                                                    (1)

L_contrast is symmetric InfoNCE over phi(i, j) (Mukhoti et al., arXiv:2212.04994): of the texts of a
batch, or of the words of a vocabulary, several of which are true of a picture.

L_self is self-training by pseudo-labels (Lee, ICML workshop 2013) under the constraint that weak
supervision knows from the words of a picture (Papandreou et al., ICCV 2015). With c_nj the cosine
of patch n and word j, lambda the logit scale, C_i the words that are true of picture i and those of
stuff, which may be seen in any:

    y_n    = argmax_{j in C_i} c_nj - penalty [j is stuff that is not said of i]                 (2)
    L_self = mean_i mean_{n in S_i} -log softmax_{j in R_i}(lambda c_nj)[y_n]                    (3)

S_i are the patches of picture i whose y_n is surest, a share ``keep`` of them. R_i are the
``rivals``: C_i, or with them the words that are known to be false of the picture. Those teach what
is background, and push down, patch by patch, words that few pictures show.

Where the data are pictures with masks the loss is that of ``patch_labels.py`` in place of (1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from ...bounds import bounded
from ...data.batches import MaskBatch, PairBatch, TagBatch
from ...data.entities import load_entities
from ...errors import ConfigError
from ...nn.features import PatchFeatures
from ...nn.tensors import at_least_float32, upload
from ..base import cosines
from ..contrast import image_text_contrast, mean_of_rows
from ..objective import Losses, Objective, Progress, Ranks, Rows
from .model import PACL
from .patch_labels import PatchClasses, labelled_pixels, patch_loss


@dataclass
class PACLTraining:
    """Options of the objective.

    Attributes:
        patches: of each picture that take part in a step, drawn anew in every one; None: all.
        self_training: w of (1); 0: the contrast alone. Only pictures with words have it.
        keep: share of a picture's patches that teach, the surest.
        stuff: what may be seen in any picture: a list of entities by name, a YAML file, or words.
            Of masks, what the background is.
        classes: of masks: a data set's name (``voc21``), or their names in the order of the labels.
        rivals: candidates: C_i; counted: with the words that are known to be false of the picture.
        penalty: taken off the cosines of stuff that is not said of the picture.
    """

    patches: int | None = bounded(None, low=1)
    self_training: float = bounded(0.0, low=0)
    keep: float = bounded(0.7, low=0, above=True, high=1)
    stuff: Any = field(default_factory=list)
    rivals: str = bounded("candidates", one_of=("candidates", "counted"))
    penalty: float = bounded(0.0, low=-2, high=2)
    classes: Any = None


class PACLObjective(Objective):
    """The losses of (1). Patches stay on their rank: only texts travel."""

    Options = PACLTraining
    batch_types = (PairBatch, TagBatch, MaskBatch)
    on_host = ("masks",)
    takes_features = True
    model: PACL

    def __init__(self, model: PACL, options: PACLTraining | None = None):
        super().__init__(model)
        self.options = options or PACLTraining()
        self.stuff = _stuff(self.options.stuff, model.tokenizer)
        self.classes: PatchClasses | None = None
        if self.options.classes is not None:
            self.classes = PatchClasses(self.options.classes, self.stuff, model.tokenizer)

    @override
    def check_source(self, source: Any) -> None:
        own = () if self.classes is None else self.classes.names
        masks = issubclass(source.batch_type, MaskBatch)
        if masks and not own:
            raise ConfigError(
                "the data give MaskBatch and objective.options.classes is null; expected pictures "
                "with texts or words, or the classes of the masks, which then teach the patches"
            )
        given = tuple(getattr(source, "classes", ())) if masks else ()
        if given != own:
            raise ConfigError(
                f"data gives {_in_words(given)} and objective.options.classes {_in_words(own)}; "
                "expected the same in the same order"
            )
        if self.options.self_training and not issubclass(source.batch_type, TagBatch):
            raise ConfigError(
                f"objective.options.self_training is {self.options.self_training:g} and the data "
                f"give {source.batch_type.__name__}; expected 0, or pictures with words "
                "(data.kind=tags), which say what a patch may be"
            )

    @override
    def encode(self, batch: PairBatch | TagBatch | MaskBatch, progress: Progress) -> Rows:
        drop = self.model.options.dropout > 0
        chosen = None
        with progress.seeded(batch.images.device, "dropout", on=drop):
            if self.options.patches is None:
                features = self.encoded(batch)
                grid = features.grid
            else:
                features = self.seen(batch)
                grid = features.grid
                chosen = self._chosen(features.tokens, progress)
                if chosen is not None:
                    tokens = _rows(features.tokens, chosen)
                    features = PatchFeatures(features.embedding, tokens, (1, tokens.shape[1]))
                features = self.model.encode_features(features)
        tokens = features.tokens
        if not isinstance(batch, MaskBatch):
            return {"tokens": tokens, **self.own_texts(batch)}
        assert self.classes is not None
        pixels = labelled_pixels(batch, grid, len(self.classes.names))
        pixels = upload(pixels, tokens.device)
        return {"tokens": tokens, "pixels": pixels if chosen is None else _rows(pixels, chosen)}

    def _chosen(self, tokens: Tensor, progress: Progress) -> Tensor | None:
        """Return random patches of each picture [B, P], its own whichever process it falls to.

        None: all of them.
        """
        B, N, _ = tokens.shape
        count = self.options.patches
        if count is None or count >= N:
            return None
        return progress.uniform(tokens.device, "patches", (B, N)).topk(count, dim=1).indices

    @override
    def loss(
        self, rows: Rows, batch: PairBatch | TagBatch | MaskBatch, progress: Progress, group: Ranks
    ) -> Losses:
        model = self.model
        tokens = rows["tokens"]
        if isinstance(batch, MaskBatch):
            assert self.classes is not None
            text = model.encode_text(self.classes.token_ids)
            scores = cosines(at_least_float32(tokens), at_least_float32(text))
            losses = patch_loss(scores, rows["pixels"], self.classes.own, model.logit_scale)
            return {"total": mean_of_rows(losses, group)}
        text = self.all_texts(rows, batch)
        contrast = image_text_contrast(
            tokens, text, model.logit_scale, batch, group, model.compatibility
        )
        if not self.options.self_training:
            return {"total": contrast}
        assert isinstance(batch, TagBatch)
        taught = mean_of_rows(self._self_training(tokens, text, batch), group)
        total = contrast + self.options.self_training * taught
        return {"total": total, "contrast": contrast, "self_training": taught}

    def _self_training(self, tokens: Tensor, text: Tensor, batch: TagBatch) -> Tensor:
        """Return the inner mean of (3) for each picture, [B]."""
        o = self.options
        scores = cosines(at_least_float32(tokens), at_least_float32(text))  # [B, N, W]
        stuff = _same_texts(batch.token_ids, self.stuff)
        candidates = batch.positives | stuff
        rivals = candidates | batch.counted if o.rivals == "counted" else candidates
        logits = self.model.logit_scale * scores
        logits = logits.masked_fill(~rivals[:, None], float("-inf"))
        with torch.no_grad():
            unsaid = (stuff & ~batch.positives)[:, None]
            chosen = (scores - o.penalty * unsaid).masked_fill(~candidates[:, None], float("-inf"))
            labels = chosen.argmax(2)  # (2)
            sure = logits.softmax(2).gather(2, labels[:, :, None])[:, :, 0]
            kept = sure.topk(max(1, round(o.keep * sure.shape[1])), dim=1).indices
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return losses.gather(1, kept).mean(1)


def _rows(x: Tensor, chosen: Tensor) -> Tensor:
    """Return the rows ``chosen`` [B, P] of [B, N, D], [B, P, D]."""
    return x.gather(1, chosen[:, :, None].expand(*chosen.shape, x.shape[2]))


def _in_words(names: Sequence[str]) -> str:
    """Say classes in a few words."""
    return f"{len(names)} classes ({', '.join(names[:3])}, ...)" if names else "no classes"


def _stuff(given: Any, tokenizer: Any) -> Tensor:
    """Return the token ids [S, L] of the words of stuff.

    Raises:
        ConfigError: for words that the model does not know, and for what is no list of words.
    """
    names = list(load_entities(given).names) if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"objective.options.stuff is {given!r}; expected a list of entities by name, a YAML "
            "file, or words"
        )
    unknown = [name for name in names if getattr(tokenizer, "unknown", lambda text: [])(name)]
    if unknown:
        raise ConfigError(
            f"objective.options.stuff has {unknown[0]!r}, which the model does not know; expected "
            "words of its vocabulary"
        )
    return tokenizer(names) if names else torch.zeros(0, 1, dtype=torch.int64)


def _same_texts(ids: Tensor, others: Tensor) -> Tensor:
    """Return which texts of ``ids`` [W, L] are one of ``others`` [S, L'], [W] bool; 0 pads both."""
    longest = max(ids.shape[1], others.shape[1])
    ids = F.pad(ids, (0, longest - ids.shape[1]))
    others = F.pad(others.to(ids.device), (0, longest - others.shape[1]))
    return (ids[:, None] == others).all(2).any(1)
