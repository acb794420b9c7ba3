"""Evaluate a model on the validation scenes: mIoU of seen, unseen and stuff classes, and what goes wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import ovseg_kernels as ok

from ..data.scenes import Scenes
from ..inference.pictures import colour, contact_sheet, palette
from ..models import OVSegModel
from ..progress import bar
from .metrics import ConfusionMatrix, Scores, harmonic_mean


@dataclass
class SceneReport:
    """Scores of one model on one set of scenes; ``summary`` is what tables and ``results.json`` show."""

    scores: Scores
    summary: dict[str, Any]
    predictions: list[np.ndarray]


@torch.no_grad()
def evaluate_scenes(model: OVSegModel, scenes: Scenes, *, batch_size: int = 50, keep: int = 0, progress: bool = False) -> SceneReport:
    """Zero-shot segmentation of ``scenes`` with all class names, and image classification by the same similarity.

    Protocol: labels with their article through the model's own templates; patch cosines, bilinear to full size, argmax
    over all classes, no background threshold. Classification: is the most similar class one that is in the picture,
    among the things (chance: about 1 in their number)?
    """
    vocabulary = scenes.vocabulary
    texts = model.encode_labels(vocabulary.prompts)
    device = texts.device
    matrix = ConfusionMatrix(vocabulary.classes)
    predictions: list[np.ndarray] = []
    hits = [0, 0]
    for start in bar(range(0, len(scenes), batch_size), show=progress, desc="evaluating", leave=False):
        chunk = scenes[start : start + batch_size]
        images = torch.from_numpy(np.stack([scene.image for scene in chunk])).permute(0, 3, 1, 2).float() / 255
        features = model.encode_image(model.backbone.normalize(images.to(device)))
        logits = model.segment_logits(features, texts)
        labels = ok.upsample_argmax(logits, chunk[0].mask.shape, label_type=torch.int16).cpu().numpy()
        best = model.similarity(features, texts[: len(vocabulary.things)]).argmax(1).tolist()
        for scene, label, thing in zip(chunk, labels, best, strict=True):
            matrix.update(label, scene.mask)
            hits[1] += bool(scene.things)
            hits[0] += vocabulary.things[thing] in scene.things
            if len(predictions) < keep:
                predictions.append(label)
    scores = matrix.scores()
    split = np.array(vocabulary.split_of_class)
    by = {kind: scores.miou_of([n for n, s in zip(vocabulary.classes, split, strict=True) if s == kind])
          for kind in ("seen", "unseen", "stuff")}
    things, stuff = split != "stuff", split == "stuff"
    summary = {
        "model": model.name,
        "data": scenes.form,
        "scenes": len(scenes),
        "seen_miou": by["seen"],
        "unseen_miou": by["unseen"],
        "hiou": harmonic_mean(by["seen"], by["unseen"]),
        "stuff_miou": by["stuff"],
        "miou": scores.miou,
        "pixel_accuracy": scores.pixel_accuracy,
        "things_called_stuff": 100 * float(matrix.counts[things][:, stuff].sum()) / max(1, int(matrix.counts[things].sum())),
        "classification": 100 * hits[0] / max(1, hits[1]),
    }
    return SceneReport(scores, {k: round(v, 2) if isinstance(v, float) else v for k, v in summary.items()}, predictions)


def scene_table(rows: list[dict[str, Any]]) -> str:
    """The summaries as a Markdown table."""
    columns = {"model": "model", "seen_miou": "seen mIoU", "unseen_miou": "unseen mIoU", "hiou": "hIoU", "stuff_miou": "stuff mIoU",
               "things_called_stuff": "things called stuff %", "classification": "top-1 %", "train_seconds": "training s"}
    shown = [key for key in columns if any(key in row for row in rows)]
    lines = ["| " + " | ".join(columns[key] for key in shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in shown) + " |" for row in rows]
    return "\n".join(lines)


def scene_gallery(scenes: Scenes, reports: dict[str, SceneReport], count: int = 10):
    """Image, truth and each model's prediction for the first scenes, with a legend of the classes seen there."""
    chosen = scenes[:count]
    classes = scenes.vocabulary.classes
    rows = [[scene.image for scene in chosen], [colour(scene.mask, len(classes)) for scene in chosen]]
    for report in reports.values():
        rows.append([colour(label, len(classes)) for label in report.predictions[:count]])
    present = sorted({int(i) for scene in chosen for i in np.unique(scene.mask)})
    legend = [(tuple(int(v) for v in palette(len(classes))[i]), classes[i]) for i in present]
    return contact_sheet(rows, ["image", "truth", *reports], legend, scale=2)
