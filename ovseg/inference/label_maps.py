"""From the features of a picture's windows to its label map, by the rules of ``Settings``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels.reference.upsample_argmax import winners
from ovseg_kernels.reference.window_argmax import window_maps

from ..data.labels import LabelSet
from ..errors import InputError
from ..models import ImageFeatures, OVSegModel
from .pamr import pamr
from .settings import Settings
from .windows import View

NEVER = -1e4  # added to what may not win: below every cosine, probability and scaled cosine


@dataclass(frozen=True)
class Queries:
    """Texts as a model reads them.

    Attributes:
        names: of the classes.
        texts: unit embeddings [T, E].
        owners: [T] int64, the class of each text; -1 for the background's.
    """

    names: tuple[str, ...]
    texts: torch.Tensor
    owners: torch.Tensor

    @classmethod
    @torch.no_grad()
    def encode(cls, model: OVSegModel, labels: LabelSet, settings: Settings) -> Queries:
        both = sorted(set(labels.queries) & set(settings.background))
        if both:
            raise InputError(f"background holds {both[0]!r}, which is a label too; expected other texts")
        templates = settings.templates or labels.templates
        unit = settings.text_mean == "unit"
        texts = model.encode_labels([*labels.queries, *settings.background], templates, unit=unit)
        owners = torch.tensor(labels.owners + [-1] * len(settings.background), device=texts.device)
        if settings.synonyms == "mean" and len(labels.queries) > len(labels):
            sums = texts.new_zeros(len(labels), texts.shape[1]).index_add(0, owners[owners >= 0], texts[owners >= 0])
            texts = torch.cat([F.normalize(sums, dim=-1), texts[owners < 0]])
            owners = torch.tensor([*range(len(labels))] + [-1] * len(settings.background), device=texts.device)
        return cls(labels.names, texts, owners)

    def bias(self, settings: Settings) -> torch.Tensor | None:
        if not settings.bias:
            return None
        unknown = sorted(set(settings.bias) - set(self.names))
        if unknown:
            raise InputError(f"bias names {unknown[0]!r}; expected some of the labels")
        of_name = torch.tensor([settings.bias.get(name, 0.0) for name in self.names] + [0.0], device=self.texts.device)
        return of_name[self.owners]  # the background's -1 takes the last


@torch.no_grad()
def label_map(model: OVSegModel, features: ImageFeatures, queries: Queries, view: View, settings: Settings,
              picture: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels [H, W] int16, the winner's score [H, W]): -1 is background.

    Args:
        picture: [3, H, W] in 0..1, which ``refine`` needs.
    """
    if model.decision == "groups":
        return _by_groups(model, features, queries, view, settings)
    logits = model.segment_logits(features, queries.texts)
    scaled = logits if settings.scale is None else logits * settings.scale
    bias = queries.bias(settings)
    if settings.refine is None:
        labels, value = _winners(scaled, queries.owners, view, settings, bias)
        dropped = _small(labels, queries, settings)
        if dropped is not None:
            labels, value = _winners(scaled, queries.owners, view, settings, dropped if bias is None else bias + dropped)
    else:
        if picture is None:
            raise InputError("refine needs the picture and none is given")
        maps = window_maps(scaled, None, *view.placing, settings.activation, settings.stage)
        maps = pamr(picture.to(maps), maps)
        labels, value = winners(maps, bias, queries.owners, None, -1, 1, True)
        dropped = _small(labels, queries, settings)
        if dropped is not None:
            labels, value = winners(maps, dropped if bias is None else bias + dropped, queries.owners, None, -1, 1, True)
    if settings.background_threshold is not None:
        labels = labels.masked_fill(value < settings.background_threshold, -1)
    if settings.background_entropy is not None:
        p = scaled.float().softmax(1)
        entropy = torch.special.entr(p).sum(1, keepdim=True)
        labels = labels.masked_fill(window_maps(entropy, None, *view.placing)[0] > settings.background_entropy, -1)
    return labels, value


def _winners(logits: torch.Tensor, owners: torch.Tensor, view: View, settings: Settings, bias: torch.Tensor | None):
    options = {"class_labels": owners, "label_type": torch.int16, "return_value": True,
               "bias": None if bias is None else bias.to(logits.dtype)}
    if view.origins is None and settings.activation is None:
        labels, value = ok.upsample_argmax(logits, view.size, **options)
        return labels[0], value[0]
    origins, *sizes = view.placing
    return ok.window_argmax(logits, origins.to(logits.device), *sizes, activation=settings.activation, stage=settings.stage, **options)


def _small(labels: torch.Tensor, queries: Queries, settings: Settings) -> torch.Tensor | None:
    """What to add to each text's score so that classes below ``area_threshold`` cannot win; None if every class may."""
    if settings.area_threshold == 0:
        return None
    area = torch.bincount(labels[labels >= 0].long(), minlength=len(queries.names))
    small = area <= settings.area_threshold * area.sum()
    if bool(small.all()) or not bool((small & (area > 0)).any()):
        return None
    return torch.where((queries.owners >= 0) & small[queries.owners], NEVER, 0.0)


def group_tables(features: ImageFeatures, texts: torch.Tensor, scale: float, top: int,
                 background_threshold: float | None) -> torch.Tensor:
    """What each class scores in each group of each window: [n, G, T], or [n, G, 1 + T] with the background first.

        P = softmax_T(s e_g . t) * softmax_K(s e_g . t),    K the ``top`` texts most similar to the window's embedding
        background: 1 where max_T P_g < min(threshold, max_gT P), else 0

    The rule of GroupViT (arXiv:2202.11094), SegCLIP (arXiv:2211.14813) and OVSegmentor (arXiv:2301.09121).
    """
    assert features.groups is not None
    texts = F.normalize(texts, dim=-1)
    logits = scale * F.normalize(features.groups, dim=-1) @ texts.T
    of_window = F.normalize(features.embedding, dim=-1) @ texts.T
    kept = of_window.topk(min(top, len(texts)), dim=-1).indices
    among = torch.full_like(of_window, -torch.inf).scatter(1, kept, 0.0)
    table = logits.softmax(-1) * (logits + among[:, None]).softmax(-1)
    if background_threshold is None:
        return table
    limit = table.amax((1, 2)).clamp(max=background_threshold)
    return torch.cat([(table.amax(-1) < limit[:, None])[..., None].to(table.dtype), table], -1)


def _by_groups(model: OVSegModel, features: ImageFeatures, queries: Queries, view: View, settings: Settings):
    for name, given in (("refine", settings.refine), ("background_entropy", settings.background_entropy),
                        ("activation", settings.activation), ("area_threshold", settings.area_threshold or None)):
        if given is not None:
            raise InputError(f"{name} is {given!r} and {model.name} labels groups; expected {name} unset")
    assert features.soft is not None and features.groups is not None
    scale = settings.scale or min(float(model.backbone.logit_scale.exp()), 100.0)
    tables = group_tables(features, queries.texts, scale, settings.top_classes, settings.background_threshold)
    owners, bias = queries.owners, queries.bias(settings)
    if settings.background_threshold is not None:
        owners = F.pad(owners, (1, 0), value=-1)
        bias = None if bias is None else F.pad(bias, (1, 0))
    origins, *sizes = view.placing
    maps = features.soft.unflatten(2, features.grid)
    return ok.window_argmax(maps, origins.to(maps.device), *sizes, tables=tables.to(maps.dtype), class_labels=owners, bias=bias,
                            label_type=torch.int16, return_value=True)
