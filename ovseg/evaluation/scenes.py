"""The embedded scenes as a data set to evaluate on: all classes, or the things with the stuff as background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import distributed
from ..data.scenes import VOCABULARIES, Scenes
from ..data.segmentation_sets import SetDescription
from ..figures import beside_the_work
from ..inference import Predictor, Segmentation
from ..inference.pictures import colour, contact_sheet, palette, save_result
from ..models import OVSegModel
from .evaluate import Report, evaluate, rounded, table
from .metrics import harmonic_mean
from .protocols import protocol

SCENE_SETS = tuple(form + ending for form in VOCABULARIES for ending in ("", "_things"))


class SceneSet:
    """Validation scenes: ``digits``, ``shapes``; ``digits_things``, ``shapes_things`` count all stuff as background."""

    def __init__(self, name: str, count: int = 300, seed: int = 0):
        form, self.things_only = name.removesuffix("_things"), name.endswith("_things")
        self.scenes = Scenes(form, "val", count, seed)
        words = self.scenes.vocabulary
        names = ("background", *words.things) if self.things_only else words.classes
        texts = dict(zip(words.classes, words.prompts, strict=True))
        unseen = tuple(name for name, split in zip(words.classes, words.split_of_class, strict=True) if split == "unseen")
        title = f"embedded scenes, {form}" + (", stuff as background" if self.things_only else "") + f", {count} of seed {seed}"
        self.description = SetDescription(name, title, names, self.things_only, unseen, {c: texts[c] for c in names if c in texts}, {}, {})

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        scene = self.scenes[i]
        truth = scene.mask.astype(np.int64)
        if self.things_only:
            truth = np.where(truth < len(self.scenes.vocabulary.things), truth + 1, 0)
        return Image.fromarray(scene.image), truth


def evaluate_scenes(model: OVSegModel, scenes: Scenes, *, keep: int = 0, progress: bool = False) -> Report:
    """Zero-shot segmentation with all class names by the protocol ``plain``, and image classification by the same texts.

    Classification: is the most similar class one that is in the picture, among the things (chance: about 1 in their number)?
    """
    return evaluate_scene_set(model, SceneSet(scenes.form, len(scenes), scenes.seed), keep=keep, progress=progress)


def evaluate_scene_set(model: OVSegModel, data: SceneSet, *, chosen=None, **options: Any) -> Report:
    """``evaluate``, by ``chosen`` or the protocol ``plain``, and what only scenes can tell."""
    words, hits = data.scenes.vocabulary, np.zeros(2, np.int64)
    things = set(words.things)

    def observe(i: int, predictor: Predictor, found: Segmentation) -> None:
        present = data.scenes[i].things
        best = next(name for name in predictor.classify() if name in things)
        hits[0] += best in present
        hits[1] += bool(present)

    report = evaluate(model, data, chosen or protocol("plain", data.description, model), observe=observe, **options)
    distributed.all_reduce_sum(hits)
    split = np.array(["stuff" if name not in things else "thing" for name in report.scores.classes])
    matrix = report.scores.matrix[:, : len(split)]
    confused = matrix[split == "thing"]
    seen = [name for name, split_ in zip(words.classes, words.split_of_class, strict=True) if split_ == "seen"]  # without the stuff
    seen_miou, unseen_miou = report.scores.miou_of(seen), report.scores.miou_of(data.description.unseen)
    report.summary |= {"seen_miou": rounded(seen_miou), "hiou": rounded(harmonic_mean(seen_miou, unseen_miou))}
    if not data.things_only:
        report.summary["stuff_miou"] = rounded(report.scores.miou_of(words.stuff))
    report.summary["things_called_stuff"] = round(100 * float(confused[:, split == "stuff"].sum()) / max(1, int(confused.sum())), 2)
    report.summary["classification"] = round(100 * int(hits[0]) / max(1, int(hits[1])), 2)
    return report


def scene_table(rows: list[dict[str, Any]]) -> str:
    """The summaries that the demo shows, as a Markdown table."""
    columns = {"model": "model", "seen_miou": "seen mIoU", "unseen_miou": "unseen mIoU", "hiou": "hIoU", "stuff_miou": "stuff mIoU",
               "things_called_stuff": "things called stuff %", "classification": "top-1 %", "train_seconds": "training s"}
    return table(rows, columns)


def gallery(reports: dict[str, Report], count: int = 10, scale: int | None = None) -> Image.Image:
    """Picture, truth and each prediction of the examples that the reports share, with a legend of the classes seen there."""
    first = next(iter(reports.values()))
    examples, classes = first.examples[:count], first.data.classes
    side = max(max(picture.shape[:2]) for picture, _, _ in examples)
    smaller = max(1, side // 320)
    rows = [[picture[::smaller, ::smaller] for picture, _, _ in examples],
            [colour(truth[::smaller, ::smaller], len(classes)) for _, truth, _ in examples]]
    for report in reports.values():
        rows.append([colour(labels[::smaller, ::smaller], len(classes)) for _, _, labels in report.examples[:count]])
    present = sorted({int(i) for _, truth, labels in examples for x in (truth, labels) for i in np.unique(x) if i >= 0})
    legend = [(tuple(int(v) for v in palette(len(classes))[i]), classes[i]) for i in present]
    return contact_sheet(rows, ["image", "truth", *reports], legend, scale=scale or max(1, 96 // max(1, side // smaller)))


@beside_the_work("gallery")
def save_gallery(reports: dict[str, Report], out: Path) -> Path | None:
    """Write ``gallery`` as a picture."""
    return save_result(gallery(reports), out)
